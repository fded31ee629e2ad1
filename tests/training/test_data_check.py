"""``tlora check``: the data as the model will see it, with the tokenizer alone."""

import json
import re
import shutil

import pytest
from helpers.commands import assert_one_sentence
from helpers.models import save_model, write_jsonl
from helpers.paths import EXAMPLE
from helpers.templates import CHATML

import tlora_mlx
from tlora_mlx import CheckCommand
from tlora_mlx.training.data_check import check


def talk(question, answer):
    roles = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


@pytest.fixture(scope="module")
def tokenizer_alone(tmp_path_factory):
    """A model directory without its weights."""
    path = save_model(tmp_path_factory.mktemp("model") / "chat", chat_template=CHATML)
    (path / "model.safetensors").unlink()
    return path


def test_what_is_shown_without_any_weights(tokenizer_alone, tmp_path, tlora_here):
    rows = [talk(f"Is {n} odd?", "Yes" if n % 2 else "No") for n in range(6)]
    write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0]])
    write_jsonl(tmp_path / "valid.jsonl", [rows[1], talk("And 77?", "Yes")])
    output = tmp_path / "samples.jsonl"
    arguments = ("--model", tokenizer_alone, "--data", tmp_path, "--rows", 2, "--json", output)
    result = tlora_here("check", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("--- row ") == 2
    assert "⟦No<|im_end|>" in result.stdout
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["train", "7"] in [line[:2] for line in table]
    assert ["valid", "2"] in [line[:2] for line in table]
    assert "warning: train: 1 sample repeated within the training data" in result.stdout
    assert "warning: valid: 1 sample repeated from the training data" in result.stdout
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["split"], line["row"]) for line in lines] == [
        *(("train", n) for n in range(1, 8)),
        ("valid", 1),
        ("valid", 2),
    ]
    for line in lines:
        assert line.keys() == {"split", "row", "tokens", "counts", "text"}
        assert len(line["tokens"]) == len(line["counts"])
        assert set(line["counts"]) == {0, 1}
        assert line["text"].startswith("<|im_start|>user\n")


def test_figures_and_warnings(tokenizer_alone, tmp_path):
    rows = [talk("Hi", "a " * n) for n in (1, 3, 300)]
    write_jsonl(tmp_path / "train.jsonl", [*rows, talk("long " * 300, "Never seen")])
    options = {"model": str(tokenizer_alone), "data": str(tmp_path), "max_seq_length": 100}
    result = check(CheckCommand(**options))
    (summary,) = result.summaries
    assert (summary.name, summary.samples, summary.longest) == ("train", 3, 100)
    assert (summary.cut, summary.left_out, summary.repeated) == ([3], [4], 0)
    assert 0 < summary.counted < summary.tokens
    told = "\n".join(result.warnings)
    assert "train: 1 row left out, without a token that counts: row 4" in told
    assert "train: 1 row cut to --max-seq-length 100, so that the end is lost: row 3" in told
    assert "there is no validation data" in told


def test_it_is_what_training_trains_on(tmp_path):
    """The same samples as ``prepare`` gives, on the shipped example."""
    from tlora_mlx import TrainConfig
    from tlora_mlx.training.setup import prepare

    options = {"model": str(EXAMPLE / "model"), "data": str(EXAMPLE / "data"), "val_split": None}
    output = tmp_path / "samples.jsonl"
    tlora_mlx.check(CheckCommand(**options, json=str(output), rows=0))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    data = prepare(TrainConfig(**options)).data
    expected = [
        (name, sample.tokens, sample.counts().astype(int).tolist())
        for name, split in data.items()
        for sample in split.samples
    ]
    assert [(line["split"], line["tokens"], line["counts"]) for line in lines] == expected


def test_a_fault_of_the_data_costs_no_weights(tokenizer_alone, tmp_path, tlora_here):
    """Training looks at the data first: the missing weights are not even missed."""
    write_jsonl(tmp_path / "train.jsonl", [talk("Hi", "Ho"), {"messages": [{"role": "user"}]}])
    fault = "line 2, message 1 has 'role', but no 'content'"
    paths = ("--model", tokenizer_alone, "--data", tmp_path)
    for command in (("check", *paths), ("train", *paths, "--adapter-path", tmp_path / "run")):
        assert_one_sentence(tlora_here(*command), 2, fault)
    assert not (tmp_path / "run").exists()


def test_what_is_refused(tokenizer_alone, data_path, tmp_path, tlora_here):
    model, data = ("--model", tokenizer_alone), ("--data", data_path)
    for arguments, message in (
        ((*model, "--data", tmp_path / "none"), "does not exist"),
        (("--model", tmp_path / "none", *data), "does not exist"),
        ((*model, *data, "--json", tmp_path), "--json"),
        ((*model, *data, "--json", data_path / "train.jsonl"), "is a file of the data itself"),
        ((*model, *data, "--prompt-column", "q"), "must be given together"),
        ((*model, *data, "--rows", -1), "--rows must be at least 0"),
        ((*model, *data, "--prompt-column", "q", "--completion-column", "completion"), "no 'q'"),
    ):
        assert_one_sentence(tlora_here("check", *arguments), 2, message)


def test_a_stray_weight_file_is_refused_everywhere(model_path, data_path, tmp_path, tlora_here):
    """Five shards, their index, and an older file that mlx-lm would load as well."""
    import mlx.core as mx

    model = shutil.copytree(model_path, tmp_path / "sharded")
    tensors = mx.load(str(model / "model.safetensors"))
    names = sorted(tensors)
    index = {}
    for n in range(5):
        shard = f"model-{n + 1:05d}-of-00005.safetensors"
        part = {name: tensors[name] for name in names[n::5]}
        mx.save_safetensors(str(model / shard), part, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    arguments = ("--model", model, "--data", data_path, "--adapter-path", tmp_path / "run")
    refused = tlora_here("train", *arguments, "--iters", 1)
    assert_one_sentence(refused, 2, "has model.safetensors beside the weight files that model.saf")
    (model / "model.safetensors").rename(model / "consolidated.safetensors")  # that is fine
    assert tlora_here("train", *arguments, "--iters", 1, "--rank", 2).returncode == 0
    merge = ("export", tmp_path / "run", "--format", "merged", "--output", tmp_path / "merged")
    (model / "consolidated.safetensors").rename(model / "model.safetensors")
    assert_one_sentence(tlora_here(*merge), 2, "has model.safetensors beside the weight files")
    (model / "model.safetensors").unlink()
    assert tlora_here(*merge).returncode == 0


def test_samples_longer_than_the_model_was_made_for(tmp_path, tlora_here):
    model = save_model(tmp_path / "model", max_position_embeddings=32)
    write_jsonl(tmp_path / "train.jsonl", [{"text": "return " * n} for n in (8, 40)])
    said = " ".join(tlora_here("check", "--model", model, "--data", tmp_path).stdout.split())
    longest = re.search(r"has samples of up to (\d+) tokens, and the model was made for 32;", said)
    assert int(longest[1]) > 32
    arguments = ("--model", model, "--data", tmp_path, "--max-seq-length", 32)
    assert "was made for" not in tlora_here("check", *arguments).stdout


def test_samples_beyond_a_table_of_positions(tmp_path, tlora_here):
    """MLX would read what lies behind the table, with the default --max-seq-length of 2048."""
    model = save_model(tmp_path / "model", "gpt2", max_position_embeddings=32)
    write_jsonl(tmp_path / "train.jsonl", [{"text": "return " * 40}])
    arguments = ("check", "--model", model, "--data", tmp_path)
    expected = "has positions for 32; pass --max-seq-length 32"
    assert_one_sentence(tlora_here(*arguments), 2, expected)
    assert tlora_here(*arguments, "--max-seq-length", 32).returncode == 0
