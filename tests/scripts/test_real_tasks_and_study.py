"""scripts/make_real_tasks.py and scripts/study_calibration.py, on small inputs."""

import json

import pytest
from helpers.commands import script
from helpers.models import save_model, write_jsonl


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_the_real_tasks(tmp_path):
    """Short rows alone, choices apart, and no validation row among the training rows."""
    save_model(tmp_path / "model", chat_template=CHATML)
    worked = [
        {"question": f"How many? {i}\u2028", "answer": f"It is {i}.\n#### {i}"} for i in range(3)
    ]
    worked[1]["answer"] += " very long" * 200
    asked = {
        "instruction": "Please choose the correct answer to the question: What is wet?\n\n"
        "Answer1: a stone Answer2: the sea: all of it Answer3: fire\n\n"
        "Answer format: answer1/answer2/answer3",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }
    for task, rows in (("gsm8k", worked), ("arc_easy", [asked] * 500), ("openbookqa", [asked])):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            path = tmp_path / task / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    places = ("--source", tmp_path, "--model", tmp_path / "model", "--output", tmp_path / "tasks")
    script("make_real_tasks.py", *places)
    found = lines_of(tmp_path / "tasks/gsm8k/train.jsonl")
    assert [row["completion"] for row in found] == ["It is 0.\n#### 0", "It is 2.\n#### 2"]
    assert not (tmp_path / "tasks/gsm8k/choices.jsonl").exists()
    sizes = {"train": 400, "valid": 48, "test": 96, "choices": 96}
    for name, size in sizes.items():
        assert len(lines_of(tmp_path / f"tasks/arc_easy/{name}.jsonl")) == size
    (choices,) = lines_of(tmp_path / "tasks/openbookqa/choices.jsonl")
    assert choices == {
        "prompt": "What is wet?",
        "choices": ["a stone", "the sea: all of it", "fire"],
        "answer": 1,
    }


def test_the_study_of_calibration(tmp_path):
    save_model(tmp_path / "model")
    path, data = tmp_path / "results.jsonl", [tmp_path / "data", tmp_path / "again"]
    data[0].mkdir()
    rows = [{"prompt": f"Add {7 * i}.\n", "completion": f"return {i * i}"} for i in range(64)]
    write_jsonl(data[0] / "train.jsonl", rows)
    data[1].symlink_to(data[0])
    places = ("--model", tmp_path / "model", "--data", *data, "--results", path, "--rank", 4)
    script("study_calibration.py", *places)
    *rows, both = lines_of(path)
    assert [row["samples"] for row in rows] == [8, 16, 32, 64] * 2
    for row in rows[:3]:
        mean, least, most = row["same_ranks"]
        assert 0.5 < least <= mean <= most <= 1
        assert 0 < row["captured"][1] < row["captured"][0] <= 1.0001
    # More samples agree better, and capture more.
    assert rows[0]["same_ranks"][0] < rows[2]["same_ranks"][0]
    assert rows[0]["captured"] < rows[2]["captured"]
    assert sum(rows[3]["ranks"]["share"].values()) == pytest.approx(1)
    assert (both["tasks"], both["same_ranks"]) == (["data", "again"], 1)
