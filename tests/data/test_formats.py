import pytest
from helpers.models import tiny_tokenizer, write_jsonl
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tlora_mlx.data.formats import FORMATS, to_prompt
from tlora_mlx.data.reading import load_data
from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.rows import read_rows

TASK = "Below is an instruction that describes a task"
HEAD = f"{TASK}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
QUESTION = "Choose: is it a?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
# Format, raw row as the data set has it, instruction, completion.
CASES = [
    (
        "metamath",
        {"type": "GSM_SV", "query": "1+1?", "original_question": "x", "response": "2\n#### 2"},
        "1+1?",
        "2\n#### 2",
    ),
    ("metamath", {"question": "1+1?", "answer": "#### 2"}, "1+1?", "#### 2"),  # openai/gsm8k
    (
        "codefeedback",
        {"query": "Write f.", "answer": "def f(): 1", "resource": "evolinstruct", "lang": "python"},
        "Write f.",
        "def f(): 1",
    ),
    (
        "wizardlm",
        {
            "idx": "a",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        },
        "Hi",
        "Ho",
    ),
    ("wizardlm", {"instruction": "Hi", "output": "Ho"}, "Hi", "Ho"),
    (
        "commonsense",
        {
            "instruction": QUESTION,
            "input": "",
            "output": "the correct answer is answer1",
            "answer": "answer1",
        },
        QUESTION,
        "the correct answer is answer1",
    ),
    (
        "glue",
        {"sentence1": "a", "sentence2": "b", "label": "equivalent", "idx": 3},
        "sentence1: a\nsentence2: b\nlabel:",
        "equivalent",
    ),
    ("glue", {"text": "a", "label": 1, "label_text": "good"}, "text: a\nlabel:", "good"),
    ("glue", {"sentence": "a", "label": 0}, "sentence: a\nlabel:", "0"),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho"}, "Hi", "Ho"),
]


@pytest.mark.parametrize(("name", "row", "instruction", "completion"), CASES)
def test_raw_rows(name, row, instruction, completion):
    made = to_prompt(name, row, chat=True)
    assert (made["prompt"], made["completion"]) == (instruction, completion)
    made = to_prompt(name, row, chat=False)
    assert made["prompt"] == f"{HEAD}{instruction}\n\n### Response:"
    assert to_prompt(name, made, chat=False) == made


def test_commonsense_has_choices_and_maybe_input():
    row = dict(CASES[5][1])
    choices = ["the correct answer is answer1", "the correct answer is answer2"]
    assert to_prompt("commonsense", row, True)["choices"] == choices
    row = {"instruction": "Say it.", "input": "it", "output": "It."}
    made = to_prompt("commonsense", row, False)
    assert made["prompt"].startswith(f"{TASK}, paired with an input")
    assert made["prompt"].endswith("### Instruction:\nSay it.\n\n### Input:\nit\n\n### Response:")
    assert "choices" not in made
    assert to_prompt("commonsense", row, True)["prompt"] == "Say it.\n\nit"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        *((name, {"a": 1}, "it has 'a', but no ") for name in FORMATS),
        ("metamath", {"query": None, "response": "2"}, "'query' is not a text but None"),
        ("metamath", [1], "it is not a JSON object"),
        ("wizardlm", {"conversations": "Hi"}, "not a list of objects"),
        ("wizardlm", {"conversations": [{"from": "gpt", "value": "a"}]}, "does not begin with"),
        ("glue", {"sentence": "a"}, "neither 'label' nor 'label_text'"),
        ("glue", {"sentence": "a", "label": 0.5}, "neither 'label' nor 'label_text'"),
    ],
)
def test_other_rows_are_named_by_file_and_line(tmp_path, name, row, message):
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    good = next((case[1] for case in CASES if case[0] == name), good)
    write_jsonl(tmp_path / "train.jsonl", [good, row])
    tokenizer = TokenizerWrapper(tiny_tokenizer())
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path), tokenizer, 512, None, name)
    text = str(error.value)
    assert f"train.jsonl, line 2 is no row for --format {name}: " in text
    assert message in text
    assert "\n" not in text


def test_the_first_rows_alone(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"query": str(i), "response": "x"} for i in range(9)])
    write_jsonl(tmp_path / "valid.jsonl", [{"query": str(i), "response": "x"} for i in range(5)])
    tokenizer = TokenizerWrapper(tiny_tokenizer())
    splits = load_data(str(tmp_path), tokenizer, 512, None, "metamath", 4)
    assert [sample.row for sample in splits["train"].samples] == [1, 2, 3, 4]
    assert len(splits["valid"]) == 5


def test_hub_data_sets(monkeypatch):
    """As the package ``datasets`` gives them: labels by name, a withheld test split, one file."""
    import datasets

    label = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    text = datasets.Value("string")
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})

    def split(*labels):
        rows = [{"sentence1": f"a{i}", "sentence2": "b", "label": x} for i, x in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)

    sums = datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])
    hub = {
        ("nyu-mll/glue", "mrpc"): {
            "train": split(1, 0, 1),
            "validation": split(0),
            "test": split(-1),
        },
        ("some/test",): {"test": sums},
        ("some/train",): {"train": split(1)},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: datasets.DatasetDict(hub[name]))
    tokenizer = TokenizerWrapper(tiny_tokenizer())
    splits = load_data("nyu-mll/glue:mrpc", tokenizer, 512, None, "glue")
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "valid": 1, "test": 0}
    decoded = tokenizer.decode(splits["train"].samples[0].tokens)
    assert decoded.endswith("sentence1: a0\nsentence2: b\nlabel:\n\n### Response:equivalent<eos>")
    (row,) = read_rows("nyu-mll/glue:mrpc")
    assert row.columns["label"] == "not_equivalent"
    assert row.where == "data set nyu-mll/glue:mrpc, split valid, row 1"
    assert [row.text("question") for row in read_rows("some/test")] == ["1+1?"]
    with pytest.raises(UserError, match="no split 'train'"):
        load_data("some/test", tokenizer, 512, None)
    with pytest.raises(UserError, match="has no split 'test' or 'valid', only train"):
        read_rows("some/train")
