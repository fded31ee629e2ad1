import json
import sys

import numpy as np
import pytest
from helpers.models import ROWS, tiny_tokenizer, write_jsonl
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tlora_mlx.data.batches import batches_in_order, collate, epoch_order
from tlora_mlx.data.conversation import conversation_of, has_empty_answer
from tlora_mlx.data.reading import load_data
from tlora_mlx.data.row_files import read_row_file
from tlora_mlx.data.samples import Sample, Split, draw_samples, split_off
from tlora_mlx.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return TokenizerWrapper(tiny_tokenizer())


@pytest.fixture(scope="module")
def chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TokenizerWrapper(tokenizer)


def load(tmp_path, rows, tokenizer, max_seq_length=2048, mask_prompt=None):
    write_jsonl(tmp_path / "train.jsonl", rows)
    return load_data(str(tmp_path), tokenizer, max_seq_length, mask_prompt)["train"]


def test_prompt_completion_and_end_are_joined_without_a_chat_template(tmp_path, plain):
    (sample,) = load(tmp_path, [{"prompt": "Say it: ", "completion": "it."}], plain).samples
    assert plain.decode(sample.tokens) == "Say it: it.<eos>"
    assert sample.tokens[: sample.first_target] == plain.encode("Say it: ")
    (unmasked,) = load(tmp_path, ROWS[:1], plain, mask_prompt=False).samples
    assert unmasked.first_target == 1


def test_prompt_and_completion_go_through_the_chat_template(tmp_path, chat):
    (sample,) = load(tmp_path, [{"prompt": "Hi", "completion": "Ho"}], chat).samples
    assert chat.decode(sample.tokens) == "<user>Hi\n<assistant>Ho\n<eos>"
    assert chat.decode(sample.tokens[sample.first_target :]) == "Ho\n<eos>"


def test_messages(tmp_path, chat, plain):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    ]
    (sample,) = load(tmp_path, rows, chat).samples
    assert chat.decode(sample.tokens[sample.first_target :]) == "Ho\n<eos>"
    with pytest.raises(UserError, match="need a tokenizer with a chat template"):
        load(tmp_path, rows, plain)


def test_text(tmp_path, plain):
    split = load(tmp_path, [{"text": "some text"}, {"text": ""}], plain)
    (sample,) = split.samples
    assert (plain.decode(sample.tokens), sample.first_target) == ("some text<eos>", 1)
    assert split.left_out == [2]
    both = {"text": "not this", "prompt": "this ", "completion": "one"}  # as in mlx-lm
    (sample,) = load(tmp_path, [both], plain).samples
    assert plain.decode(sample.tokens) == "this one<eos>"
    with pytest.raises(UserError, match="--mask-prompt needs rows with a prompt"):
        load(tmp_path, [{"text": "some text"}], plain, mask_prompt=True)


def test_a_completion_that_is_cut_away_whole_is_left_out_and_counted(tmp_path, plain):
    rows = [
        {"prompt": "p" * 30, "completion": "abc"},
        {"prompt": "p", "completion": "c" * 30},
        {"prompt": "p", "completion": ""},
        {"prompt": "p" * 8, "completion": "abc"},
        {"prompt": "", "completion": ""},  # an end token, which nothing predicts
        {"prompt": "", "completion": "c"},
    ]
    split = load(tmp_path, rows, plain, max_seq_length=8)
    assert (split.left_out, split.truncated) == ([1, 4, 5], [2])
    assert [len(s.tokens) for s in split.samples] == [8, 2, 2]
    assert all(1 <= s.first_target < len(s.tokens) for s in split.samples)


def test_a_cut_within_a_gap_leaves_what_is_before_it():
    split = Split()
    split.add(Sample(list(range(12)), 2, 1, ((4, 11),)), 6)
    split.add(Sample(list(range(12)), 4, 2, ((5, 8),)), 5)
    assert [np.flatnonzero(s.counts()).tolist() for s in split.samples] == [[2, 3], [4]]
    assert split.truncated == [1, 2]


def test_splits_without_a_file_are_empty_and_blank_lines_are_passed_over(tmp_path, plain):
    (tmp_path / "train.jsonl").write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n")
    (tmp_path / "train.json").write_text(json.dumps(ROWS))  # JSON lines come first
    data = load_data(str(tmp_path), plain, 100, None)
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "valid": 0, "test": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train\.jsonl is empty"),
        ("\n \n", r"train\.jsonl is empty"),
        ('{"text": "a"}\n{"text": \n', r"train\.jsonl, line 2 is not valid JSON"),
        ('{"text": ' + "1" * 5000 + "}\n", r"train\.jsonl, line 1 is not valid JSON"),
        ("3\n", r"line 1 is not a JSON object"),
        (
            '[{"text": "a"}]',
            r"train\.jsonl is a JSON array, or part of one; give one",
        ),
        (
            '{\n    "text": "a"\n}\n',
            r"train\.jsonl has its first object on several lines; give each",
        ),
        ('{"txt": "a"}\n', r"line 1 has 'txt'; it needs 'text', or 'prompt' and 'completion'"),
        ("{}\n", r"line 1 has nothing; it needs"),
        ('{"text": "a"}\n\n{"body": "b"}\n', r"line 3 has no 'text' \(it has 'body'\)"),
        ('{"text": null}\n', r"line 1: 'text' is not a text but null"),
        ('{"messages": []}\n', r"line 1: 'messages' is not a list of objects with 'role'"),
        ('{"messages": "hi"}\n', r"line 1: 'messages' is not a list but \"hi\""),
        ('{"text": ""}\n', r"no row of .* has a token to learn from"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, chat, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_data(str(tmp_path), chat, 1 if "learn" in message else 100, None)
    assert "\n" not in str(error.value)


def test_arrays_with_a_byte_order_mark_and_damaged_ones(tmp_path, plain):
    file = tmp_path / "train.json"
    file.write_text("\ufeff" + json.dumps(ROWS))
    assert len(load_data(str(file), plain, 100, None)["train"]) == len(ROWS)
    file.write_text("\ufeff" + json.dumps(ROWS)[:-1])
    with pytest.raises(UserError, match=r"the data is not valid JSON: .*train\.json: Expecting"):
        load_data(str(file), plain, 100, None)


def test_bad_places(tmp_path, plain):
    with pytest.raises(
        UserError, match=r"has no train\.jsonl, train\.json, train\.parquet, train\.csv;"
    ):
        load_data(str(tmp_path), plain, 100, None)
    with pytest.raises(UserError, match="does not exist"):
        load_data(str(tmp_path / "nothing"), plain, 100, None)
    file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    text = write_jsonl(tmp_path / "train.txt", ROWS)
    with pytest.raises(UserError, match=r"is a file of a kind .*; give one of \.jsonl, \.json,"):
        load_data(str(text), plain, 100, None)
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="is not UTF-8"):
        load_data(str(tmp_path), plain, 100, None)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"train\.jsonl cannot be read: Is a directory"):
        load_data(str(tmp_path), plain, 100, None)
    with pytest.raises(UserError, match="data ~nobody-of-this-name/data does not exist"):
        load_data("~nobody-of-this-name/data", plain, 100, None)


def test_batches_are_padded_to_few_shapes():
    samples = [Sample(list(range(1, n + 1)), 2) for n in (5, 33, 34, 70, 150, 300, 1500)]
    widths = [collate([s], 2048).tokens.shape[1] for s in samples]
    assert widths == [9, 33, 41, 73, 161, 321, 1505]
    samples = samples[:4]
    assert collate(samples, 72).tokens.shape == (4, 72)
    batch = collate(samples[:2], 2048)
    assert batch.lengths.tolist() == [5, 33]
    assert [np.flatnonzero(row).tolist() for row in np.array(batch.counts)] == [
        [2, 3, 4],
        list(range(2, 33)),
    ]
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 5, *[0] * 28]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 700])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_epoch_has_every_sample_exactly_once(count, batch_size):
    lengths = np.random.default_rng(0).integers(1, 90, count).tolist()
    batches = epoch_order(lengths, batch_size, seed=3, epoch=2)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == -(-count // batch_size)
    assert batches == epoch_order(lengths, batch_size, seed=3, epoch=2)
    if count == 700:
        assert batches != epoch_order(lengths, batch_size, seed=3, epoch=3)
        assert batches != epoch_order(lengths, batch_size, seed=4, epoch=2)
        spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
        assert np.mean(spread) < 3 if batch_size > 1 else np.mean(spread) == 0
        # Neither short batches first, nor the same batches in every epoch.
        means = [np.mean([lengths[i] for i in b]) for b in batches[:64]]
        assert abs(np.corrcoef(means, range(64))[0, 1]) < 0.4
        if batch_size > 1:
            other = set(map(frozenset, epoch_order(lengths, batch_size, seed=3, epoch=3)))
            assert len(other & set(map(frozenset, batches))) < len(batches) / 10
    ordered = batches_in_order([Sample([1] * n, 1) for n in lengths], batch_size, 2048)
    assert [n for batch in ordered for n in batch.lengths.tolist()] == sorted(lengths)


def test_the_second_split_goes_by_two_names(tmp_path, plain):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "validation.jsonl", ROWS[4:6])
    splits = load_data(str(tmp_path), plain, 2048, None)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [4, 2, 0]
    assert splits["valid"].where == f"{tmp_path / 'validation'}.jsonl, line"
    assert [sample.row for sample in splits["valid"].samples] == [1, 2]
    write_jsonl(tmp_path / "valid.jsonl", ROWS[4:6])
    with pytest.raises(UserError, match="both 'valid' and 'validation'"):
        load_data(str(tmp_path), plain, 2048, None)


def test_a_hub_data_set(monkeypatch, plain):
    """The splits as the package ``datasets`` gives them; a stand-in for the Hub alone."""
    import datasets

    rows = datasets.Dataset.from_list
    splits = {"train": rows(ROWS[:4]), "validation": rows(ROWS[4:6]), "extra": rows(ROWS)}

    def load_dataset(name):
        if name != "org/data":
            raise FileNotFoundError(f"{name} doesn't exist on the Hub\nand so on")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("org/data", plain, 2048, None)
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "valid": 2, "test": 0}
    assert data["valid"].where == "data set org/data, split valid, row"
    with pytest.raises(UserError, match=r"did not provide it: org/none doesn't exist on the Hub$"):
        load_data("org/none", plain, 2048, None)
    splits["train"] = rows([{"prompt": "a"}])
    with pytest.raises(UserError, match="data set org/data, split train, row 1 has 'prompt'; it"):
        load_data("org/data", plain, 2048, None)
    del splits["train"]
    with pytest.raises(UserError, match="has no split 'train', only validation, extra"):
        load_data("org/data", plain, 2048, None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_data("org/data", plain, 2048, None)


def test_splitting_off(tmp_path, plain):
    split = load(tmp_path, ROWS, plain)
    train, valid = split_off(split, 0.2, 3)
    assert (len(train), len(valid)) == (14, 4)
    rows = [sample.row for part in (train, valid) for sample in part.samples]
    assert sorted(rows) == [sample.row for sample in split.samples]
    assert split_off(split, 0.2, 3)[1] == valid != split_off(split, 0.2, 4)[1]
    assert [len(part) for part in split_off(split, 0.999, 3)] == [1, 17]


def test_calibration_samples_are_drawn_without_replacement():
    drawn = draw_samples(range(50), 40, seed=3)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 40
    assert drawn == draw_samples(range(50), 40, seed=3) != draw_samples(range(50), 40, seed=4)
    assert draw_samples(range(50), 50, seed=3) == range(50)


def test_tables_that_have_no_rows_or_other_separators(tmp_path):
    """Excel writes semicolons in half of Europe; datasets fails on Parquet files without rows."""
    from datasets import Dataset

    (tmp_path / "a.csv").write_text("prompt;completion\na;b\n")
    with pytest.raises(UserError, match=r"a.csv has ';' between its columns; save it with commas"):
        read_row_file(tmp_path / "a.csv")
    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a.parquet has no rows"):
        read_row_file(tmp_path / "a.parquet")


def test_empty_answers_are_named(tmp_path, chat, plain):
    said = "train.jsonl, line 2: an answer is empty, so the model learns to say nothing"
    rows = [{"prompt": "Hi", "completion": text} for text in ("Ho", " ")]
    assert any(said in warning for warning in load(tmp_path, rows, plain).warnings)
    assert any(said in warning for warning in load(tmp_path, rows, chat).warnings)
    full = [{"prompt": "", "completion": "Ho"}]
    assert not any("empty" in warning for warning in load(tmp_path, full, plain).warnings)


@pytest.mark.parametrize(
    ("turn", "is_empty"),
    [
        ({"content": "\n"}, True),
        ({"content": [{"type": "text", "text": ""}]}, True),
        ({"content": "Ho"}, False),
        ({"content": "", "weight": 0}, False),
        ({"content": "", "reasoning_content": "hm"}, False),
        ({"content": None, "tool_calls": [{"function": {"name": "look"}}]}, False),
    ],
)
def test_what_counts_as_an_empty_answer(turn, is_empty):
    user = {"role": "user", "content": ""}
    row = {"messages": [user, {"role": "assistant"} | turn]}
    assert has_empty_answer(conversation_of(row)) == is_empty
