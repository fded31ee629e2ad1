"""The recipes can be trained and evaluated unchanged, on stand-ins with the same raw rows."""

import json
import re
import shlex

import pytest
from helpers.models import write_jsonl
from helpers.paths import EXAMPLE

from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import TrainConfig

CHOICE = "Please choose: question {}?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
# What the data set of each recipe looks like, and what its model is evaluated on.
RAW = {
    "math": (
        lambda i: {"type": "GSM_Rephrased", "query": f"{i}+1?", "response": f"The answer is: {i}"},
        lambda i: {"question": f"{i}+1?", "answer": f"{i} + 1\n#### {i + 1}"},
    ),
    "code": (
        lambda i: {"query": f"f {i}", "answer": "def f(): 1", "resource": "x", "lang": "python"},
        lambda i: {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def f{i}():\n",
            "entry_point": f"f{i}",
            "test": "def check(f):\n    f()\n",
            "canonical_solution": "    pass\n",
        },
    ),
    "chat": (
        lambda i: {
            "idx": str(i),
            "conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "yes"}],
        },
        lambda i: {"question_id": i, "category": "math", "turns": [f"{i}?", "Sure?"]},
    ),
    "commonsense": (
        lambda i: {
            "instruction": CHOICE.format(i),
            "input": "",
            "output": f"the correct answer is answer{1 + i % 2}",
            "answer": f"answer{1 + i % 2}",
        },
    ),
    "nlu": (
        lambda i: {
            "sentence1": f"a {i}",
            "sentence2": f"b {i}",
            "label": ["not_equivalent", "equivalent"][i % 2],
            "idx": i,
        },
    ),
}


def commands(recipe):
    """The commands in a recipe's comments, each on one line."""
    lines = [line[1:].strip() for line in (EXAMPLE / f"{recipe}.yaml").read_text().splitlines()
             if line.startswith("#")]  # fmt: skip
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("tlora ")]


@pytest.mark.parametrize("recipe", RAW)
def test_recipes(recipe, model_path, tmp_path, tlora_here):
    train_row, *evaluation_row = RAW[recipe]
    write_jsonl(tmp_path / "data" / "train.jsonl", [train_row(i) for i in range(5)])
    write_jsonl(tmp_path / "data" / "valid.jsonl", [train_row(i) for i in range(2)])
    rows = [(evaluation_row or [train_row])[0](i) for i in range(3)]
    evaluated = write_jsonl(tmp_path / "test.jsonl", rows)
    first, *middle, laptop = commands(recipe)
    for command in (first, laptop):
        run = tmp_path / ("laptop" if command is laptop else "run")
        local = ["--model", model_path, "--data", tmp_path / "data", "--adapter-path", run]
        result = tlora_here(*command, *local)
        assert result.returncode == 0, result.stderr
        stored = json.loads((run / "adapter_config.json").read_text())
        assert stored["format"] == parse(TrainConfig, "", "", command[1:]).format
        reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any(report.get("train_loss") for report in reports)
    assert middle
    for number, command in enumerate(middle):
        _, path, *flags = command
        assert path == f"runs/{recipe}"
        local = ["--data", evaluated, "--max-tokens", 4, "--output", tmp_path / f"{number}"]
        result = tlora_here("evaluate", tmp_path / "run", *flags, *local)
        assert result.returncode == 0, result.stderr
        summary = json.loads((tmp_path / f"{number}" / "summary.json").read_text())
        assert (summary["rows"], summary["task"]) == (3, recipe)


def test_the_authors_settings():
    """METHOD: rank, rate, schedule, samples an update, tokens, epochs of the released scripts."""
    table = {
        "math": (128, 2e-5, "cosine", 128, 512, 1, 100_000),
        "code": (128, 2e-5, "cosine", 128, 512, 1, 100_000),
        "chat": (128, 2e-5, "cosine", 128, 512, 1, 100_000),
        "commonsense": (32, 1e-4, "linear", 32, 512, 1, None),
    }
    for recipe, expected in table.items():
        c = parse(TrainConfig, "tlora train", "", ["-c", str(EXAMPLE / f"{recipe}.yaml")])
        batch = c.batch_size * c.grad_accumulation_steps
        found = (c.rank, c.learning_rate, c.lr_schedule, batch, c.max_seq_length, c.epochs)
        assert (*found, c.max_samples) == expected
        assert (c.alpha, c.warmup, c.weight_decay) == (c.rank, 0.03, 0.0)


def test_the_memory_calculation_in_the_readme():
    text = (EXAMPLE / "README.md").read_text()
    for terms, total in re.findall(r"((?:[\d.]+\s\+\s)+[\d.]+) = (\d+) GB", text):
        assert round(sum(map(float, re.split(r"\s\+\s", terms)))) == int(total)
