"""Several processes calibrate their shares of the samples: the plan of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def launch(*arguments):
    scripts = str(Path(sys.executable).parent)
    script = shutil.which("mlx.launch", path=scripts)
    # "python" by PATH, as in the README: MLX 0.31 takes a full path for a script of Python's.
    command = [script, "-n", "2", "--", "python", "-m", *map(str, arguments)]
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    # mlx.launch exits with 0 even if a process failed: what was written counts.
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def test_the_plan_of_two_processes(model_path, data_path, run_path, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["--model", model_path, "--data", data_path, "--rank", 4, "--output", out]
    result = launch("tlora_mlx.plan", *arguments)
    assert out.exists(), result.stdout + result.stderr
    ours = json.loads(out.read_text())["modules"]
    one = json.loads((run_path / "rank_plan.json").read_text())["modules"]
    assert ours.keys() == one.keys()
    for name, module in one.items():
        assert (ours[name]["rank"], ours[name]["scale"]) == (module["rank"], module["scale"])
        assert ours[name]["sensitivity"] == pytest.approx(module["sensitivity"], rel=1e-5)
    assert result.stdout.count("rank × scale of each module") == 1


def test_training_on_several_machines_is_refused(model_path, data_path, tmp_path):
    arguments = ["--model", model_path, "--data", data_path, "--adapter-path", tmp_path / "run"]
    result = launch("tlora_mlx.train", *arguments)
    assert "one process" in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()
