"""The commands, as a user runs them and as a notebook does."""

import json
import os
import subprocess
import sys

from helpers.paths import ROOT
from tlora_mlx import Terminal, TrainConfig, train


def tlora(*arguments, **popen):
    """Run ``python -m tlora_mlx.COMMAND …`` as a process of its own."""
    command, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, "-m", f"tlora_mlx.{command}", *rest],
        capture_output=True,
        text=True,
        timeout=240,
        **popen,
    )


def script(name, *arguments, code=0):
    """Run a script of the project; returns what it printed, errors too where it has to fail."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == code, result.stderr
    return result.stdout + result.stderr if code else result.stdout


def quick_train(model, data, run, **options):
    """Train in this process with small settings; returns the run directory."""
    settings = {"iters": 6, "rank": 4, "learning_rate": 1e-2, "batch_size": 4, **options}
    data = data if isinstance(data, list) else str(data)
    config = TrainConfig(model=str(model), data=data, adapter_path=str(run), **settings)
    return train(config, Terminal()).directory


def val_losses(run):
    """The validation losses of a run, in the order of its reports."""
    reports = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [report["val_loss"] for report in reports if "val_loss" in report]


def arguments(model, data, run, *more):
    required = ["--model", model, "--data", data, "--adapter-path", run]
    return ["train", *required, "--iters", 4, "--rank", 4, *more]


def assert_one_sentence(result, code, message):
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.strip().endswith(errors[0])
