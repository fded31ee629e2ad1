"""Several data sets mixed by weight, split expressions, and what ``datasets`` loads offline."""

import json

import datasets
import pytest
from helpers.commands import assert_one_sentence, quick_train
from helpers.models import ROWS, tiny_tokenizer, write_jsonl
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tlora_mlx import CheckCommand, check
from tlora_mlx.config.parsing import parse
from tlora_mlx.data.reading import load_data
from tlora_mlx.errors import UserError
from tlora_mlx.runs.run_directory import CONFIG


@pytest.fixture(scope="module")
def plain():
    return TokenizerWrapper(tiny_tokenizer())


def texts(split, tokenizer):
    return [tokenizer.decode(sample.tokens).removesuffix("<eos>") for sample in split.samples]


def numbered(letter, count):
    return [{"text": f"{letter}{i}"} for i in range(count)]


def test_rows_are_mixed_by_weight(tmp_path, plain):
    """Twice: each row twice; by half: half of the rows, once. Validation is not weighted."""
    for name, letter in (("one", "a"), ("two", "b")):
        write_jsonl(tmp_path / name / "train.jsonl", numbered(letter, 6))
        write_jsonl(tmp_path / name / "valid.jsonl", numbered(letter.upper(), 2))
    file = write_jsonl(tmp_path / "more.jsonl", numbered("c", 3))
    data = [f"{tmp_path / 'one'}:2", {"path": str(tmp_path / "two"), "weight": 0.5}, str(file)]
    splits = load_data(data, plain, 100, None, seed=3)
    found = texts(splits["train"], plain)
    assert sorted(t for t in found if "a" in t) == sorted(2 * [f"a{i}" for i in range(6)])
    halved = [text for text in found if "b" in text]
    assert len(halved) == len(set(halved)) == 3
    assert [text for text in found if "c" in text] == ["c0", "c1", "c2"]
    assert len(found) == 12 + 3 + 3
    assert texts(splits["valid"], plain) == ["A0", "A1", "B0", "B1"]
    other = texts(load_data(data, plain, 100, None, seed=4)["train"], plain)
    assert [text for text in other if "b" in text] != halved
    few = [str(tmp_path / "one"), f"{tmp_path / 'more.jsonl'}:0.1"]  # of three rows, one is left
    assert len(load_data(few, plain, 100, None)["train"]) == 6 + 1
    place = splits["train"].place([splits["train"].samples[0], splits["train"].samples[-1]])
    assert place == f"{tmp_path}/one/train.jsonl, line 1; {file}, line 3"


def test_no_row_is_in_both_training_and_validation(tmp_path, plain):
    """The share is drawn before a row is there twice."""
    file = write_jsonl(tmp_path / "rows.jsonl", numbered("a", 10))
    splits = load_data([f"{file}:3"], plain, 100, None, val_split=0.2)
    train, valid = (set(texts(splits[name], plain)) for name in ("train", "valid"))
    assert (len(train), len(valid), len(splits["train"])) == (8, 2, 24)
    assert not train & valid


def test_each_source_has_columns_splits_and_format_of_its_own(tmp_path, plain):
    questions = [{"q": f"q{i}", "r": f"r{i}", "text": "not this"} for i in range(10)]
    datasets.Dataset.from_list(questions).to_parquet(str(tmp_path / "hub/data/train-0.parquet"))
    instructions = [{"instruction": "do", "output": "done"}]
    (tmp_path / "alpaca.json").write_text(json.dumps(instructions))
    first = {"path": str(tmp_path / "hub"), "train_split": "train[:80%]"}
    first |= {"valid_split": "train[-10%:]", "prompt_column": "q", "completion_column": "r"}
    splits = load_data([first, str(tmp_path / "alpaca.json")], plain, 500, None)
    found = texts(splits["train"], plain)
    assert found[:8] == [f"q{i}r{i}" for i in range(8)]
    assert found[8].endswith("do\n\n### Response:done")
    assert texts(splits["valid"], plain) == ["q9r9"]
    assert [sample.row for sample in splits["valid"].samples] == [10]


@pytest.mark.parametrize("expression", ["train[:80%]", "train[-3:]", "train[2:5]+extra", "extra"])
@pytest.mark.parametrize("kind", ["files", "saved", "builder"])
def test_split_expressions_are_those_of_datasets(tmp_path, plain, kind, expression):
    """Compared with ``datasets.load_dataset(split=…)`` itself."""
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "extra")}
    for name, file in files.items():
        write_jsonl(tmp_path / file, numbered(name[0], 11))
    arguments = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    expected = datasets.load_dataset("json", split=expression, **arguments)["text"]
    source = {"path": str(tmp_path), "train_split": expression}
    if kind == "saved":
        datasets.load_dataset("json", **arguments).save_to_disk(str(tmp_path / "saved"))
        source["path"] = str(tmp_path / "saved")
    elif kind == "builder":
        source |= {"path": "json", "config": arguments}
    splits = load_data([source], plain, 100, None)
    assert texts(splits["train"], plain) == list(expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "--data is empty"),
        ([3], "entry 1 of 'data' is neither a path nor a mapping"),
        ([{"weight": 2}], "entry 1 of 'data' has no 'path'"),
        (["x.jsonl", {"paht": "x"}], "entry 2 of 'data' has an unknown key 'paht'.* 'path'"),
        ([{"path": "x", "weight": "much"}], "'weight' must be a number, not 'much'"),
        (["x:0"], "--data x:0: the weight must be above 0"),
        (["x:-1"], "the weight must be above 0"),
        (["x:nan"], "the weight must be above 0"),
        ([{"path": "x", "format": "alpacca"}], "'format' must be one of alpaca,"),
        ([{"path": "x", "config": {"split": "train"}}], "'config' cannot have split"),
        ([{"path": "x", "config": "main"}], "'config' must be a mapping"),
        ([{"path": "x", "train_split": 3}], "'train_split' must be text, not 3"),
    ],
)
def test_faults_of_a_mixture_are_found_before_anything_is_read(data, message):
    with pytest.raises(UserError, match=message):
        CheckCommand(model="m", data=data)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("trian[:3]", r"split 'trian\[:3\]': there is no split 'trian', only "),
        ("train[:3", "Unrecognized instruction format"),
        ("train[5:5]", "has no rows"),
    ],
)
def test_split_expressions_that_select_nothing(tmp_path, plain, expression, message):
    write_jsonl(tmp_path / "train.jsonl", numbered("a", 5))
    source = {"path": str(tmp_path), "train_split": expression}
    with pytest.raises(UserError, match=message):
        load_data([source], plain, 100, None)


def test_the_command_line_and_yaml(tmp_path):
    flags = ["--model", "m", "--data", "one:2", "--data", "two"]
    assert parse(CheckCommand, "tlora check", "", flags).data == ["one:2", "two"]
    one = parse(CheckCommand, "tlora check", "", ["--model", "m", "--data", "one"])
    assert one.data == "one"
    (tmp_path / "c.yaml").write_text("{model: m, data: [{path: one, weight: 2}, two]}")
    config = parse(CheckCommand, "tlora check", "", ["-c", str(tmp_path / "c.yaml")])
    assert config.data == [{"path": "one", "weight": 2}, "two"]


def test_check_and_train_take_a_mixture(model_path, tmp_path, monkeypatch, tlora_here):
    """A run records absolute paths; ``check`` shows each part with its weight."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "one.jsonl", ROWS[:6])
    write_jsonl(tmp_path / "two.jsonl", [*ROWS[6:9], ROWS[0]])
    config = CheckCommand(model=str(model_path), data=["one.jsonl:2", "two.jsonl"], val_split=0.2)
    summaries = {s.name: (s.samples, s.repeated) for s in check(config).summaries}
    assert [samples for samples, _ in summaries.values()] == [10, 3, 1, 1]
    assert "train: data set one.jsonl" not in summaries
    assert [name.split("/")[0] for name in summaries] == [
        "train: one.jsonl", "train: two.jsonl", "valid: one.jsonl", "valid: two.jsonl",
    ]  # fmt: skip
    whole = CheckCommand(model=str(model_path), data=["one.jsonl:2", "two.jsonl"])
    assert [s.repeated for s in check(whole).summaries] == [0, 1]
    run = quick_train(model_path, ["one.jsonl:2", "two.jsonl"], tmp_path / "run", iters=2)
    stored = json.loads((run / CONFIG).read_text())["data"]
    assert stored == [f"{tmp_path}/one.jsonl:2", f"{tmp_path}/two.jsonl"]
    assert tlora_here("report", run, "--samples", 2, "--max-tokens", 4).returncode == 0
    arguments = ("--model", model_path, "--data", "one.jsonl", "--data", "none.jsonl")
    assert_one_sentence(tlora_here("check", *arguments), 2, "data none.jsonl does not exist")
