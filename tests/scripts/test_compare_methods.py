"""scripts/compare_methods.py: what it trains, how it picks rates, and that it can be resumed."""

import json
import math
import shutil
import statistics

import pytest
from helpers.commands import script

from tlora_mlx import load_base_model, target_linears
from tlora_mlx.method.layers import linear_shape

EQUAL = ["LoRA (equal parameters)", "TLoRA without scaling (equal parameters)"]
UNIFORM = [
    f"{a}, uniform"
    for a in ("task A", "gradient A", "gradients A", "task A whitened", "task A weighted")
]
METHODS = ["LoRA", "TLoRA", "TLoRA without scaling, floor", *EQUAL, *UNIFORM]
RATES = [1e-3, 1e-2, 1e3]


def compare(*arguments, code=0):
    return script("compare_methods.py", *arguments, code=code)


@pytest.fixture(scope="module")
def run(model_path, data_path, tmp_path_factory):
    data_path = shutil.copytree(data_path, tmp_path_factory.mktemp("data"), dirs_exist_ok=True)
    choices = {"prompt": "Say two.", "choices": ["two", "three"], "answer": 0}
    (data_path / "choices.jsonl").write_text(f"{json.dumps(choices)}\n" * 3)
    path = tmp_path_factory.mktemp("compare") / "results.jsonl"
    arguments = ["run", "--model", model_path, "--data", data_path, "--results", path]
    arguments += ["--iters", 3, "--seeds", 2, "--rates", *RATES, "--methods", *METHODS]
    compare(*arguments)
    return path, arguments


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_rises_until_the_loss_does_and_all_seeds_use_the_best(run, method):
    rows = [row for row in rows_of(run[0]) if row["method"] == method]
    first = {row["rate"]: row["valid"] for row in rows if row["seed"] == 0}
    losses = [first[rate] for rate in RATES[: len(first)]]
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    assert losses[-1] > losses[-2]  # 1e3 is no rate to learn with
    assert [row["rate"] for row in rows if row["seed"] == 1] == [min(first, key=first.get)]


def test_trained_parameters(run, model_path):
    shapes = [linear_shape(m) for m in target_linears(load_base_model(model_path).model).values()]
    outs, both = sum(o for o, _ in shapes), sum(map(sum, shapes))
    trained = {row["method"]: row["trained"] for row in rows_of(run[0]) if row["rate"]}
    assert trained["LoRA"] == 8 * both
    assert {trained[name] for name in UNIFORM} == {8 * outs}
    assert all(abs(trained[name] / (8 * outs) - 1) < 0.15 for name in EQUAL)


def test_what_a_run_records(run):
    base, *rows = rows_of(run[0])
    assert (base["method"], base["rate"]) == ("base", 0)
    for row in (base, *(row for row in rows if row["rate"] < 1)):
        losses, counts = zip(*row["test_rows"], strict=True)
        assert len(losses) == 5
        mean = sum(map(math.prod, row["test_rows"])) / sum(counts)
        assert row["test"] == pytest.approx(mean, abs=1e-4)
        assert row["right_rows"] in ([0] * 3, [1] * 3)
        assert row["accuracy_normalized"] == statistics.mean(row["right_rows"])
    assert min(row["test"] for row in rows) < base["test"]
    learnt = [row for row in rows if row["rate"] < 1]
    assert {row["method"] for row in learnt if row.get("a_moved", 0) > 0} == {"LoRA", EQUAL[0]}
    assert all(row["peak_memory"] > 0 < row["start_seconds"] for row in rows)


def test_a_finished_comparison_trains_nothing_and_prints_tables(run):
    path, arguments = run
    before = path.read_text()
    assert compare(*arguments) == ""
    assert path.read_text() == before
    printed = compare("table", "--results", path)
    seconds = [row for row in rows_of(path) if row["seed"] == 1]
    assert len({row["test"] for row in seconds}) == len(METHODS)
    firsts = {(row["method"], row["rate"]): row["test"] for row in rows_of(path) if not row["seed"]}
    tests = {row["method"]: (firsts[row["method"], row["rate"]], row["test"]) for row in seconds}
    gains = [a - b for a, b in zip(tests["TLoRA"], tests[EQUAL[0]], strict=True)]
    row = next(line for line in printed.splitlines() if line.startswith("| TLoRA |"))
    assert f"| {statistics.median(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})" in row
    assert (path.parent / "compare_methods_task.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_rate_at_another_rank_and_a_table_without_its_reference(
    model_path, data_path, tmp_path
):
    path = tmp_path / "results.jsonl"
    arguments = ["--model", model_path, "--data", data_path, "--results", path, "--iters", 1]
    compare("run", *arguments, "--seeds", 1, "--rates", 1e-3, "--methods", "TLoRA", "--rank", 4)
    assert [(row["rate"], row["seed"]) for row in rows_of(path)] == [(0, 0), (1e-3, 0)]
    assert rows_of(path)[1]["rank"] == 4
    refused = compare("table", "--results", path, code=1)
    assert refused.strip() == (
        "task, 1 updates: run 'LoRA (equal parameters)', which the others are compared with"
    )


def test_intervals_over_test_rows_and_rates_near_the_best(tmp_path):
    """From results as written down: one method always 0.1 better, one better on half the rows."""
    rows = [[1 + i / 10, 1 + i % 3] for i in range(20)]
    differences = {"TLoRA": [-0.1] * 20, "task A, uniform": [0.2, -0.2] * 10, EQUAL[0]: [0] * 20}
    base = {"test": 3.0, "valid": 3.0, "accuracy_normalized": 0.5}
    lines = [{"method": "base", "rate": 0, "seed": 0} | base]
    for method, less in differences.items():
        for rate, worse in ((1e-3, 0.015), (2e-3, 0), (4e-3, 0.03)):
            own = [[loss + d + worse, n] for (loss, n), d in zip(rows, less, strict=True)]
            mean = sum(map(math.prod, own)) / sum(n for _, n in own)
            found = {"valid": mean, "test": mean, "test_rows": own, "right_rows": [0, 1, 1, 1]}
            lines.append({"method": method, "rate": rate, "seed": 0, "trained": 10} | found)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps({'task': 't', 'iters': 1} | line)}\n" for line in lines))
    printed = compare("table", "--results", path)
    assert "Without an adapter the test loss is 3.000 and the accuracy 0.500." in printed
    of = {line.split(" | ")[0][2:]: line.split(" | ") for line in printed.splitlines()}
    assert of["TLoRA"][-3:] == ["-0.100 to -0.100", "0.001 to 0.002", "0.750 |"]
    low, high = map(float, of["task A, uniform"][-3].split(" to "))
    assert -0.1 < low < -0.05
    assert 0.05 < high < 0.1
    assert of[EQUAL[0]][-3] == ""
