"""What commands print: progress without a terminal, suggestions that can be pasted, nothing cut."""

import os
import shlex
import subprocess
import sys

from helpers.models import write_jsonl
from helpers.paths import EXAMPLE

from tlora_mlx import terminal
from tlora_mlx.invocation import suggested


def test_a_piped_stage_says_how_far_it_is_every_half_minute(monkeypatch, capsys):
    """Ten steps of eight seconds each: a line after 32 and one after 64."""
    clock = [0.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: clock[0])
    with terminal.Terminal().stage("calibrating", 10) as advance:
        for step in range(10):
            clock[0] += 8
            advance(text=f"batch {step + 1}")
    assert capsys.readouterr().out.splitlines() == [
        "calibrating: 4 of 10, batch 4",
        "calibrating: 8 of 10, batch 8",
    ]


def test_suggestions_are_spelt_as_the_program_was_started(monkeypatch):
    path = "it's my run"
    for script, start in (
        ("/opt/bin/tlora", ["tlora"]),
        ("/x/tlora_mlx/train.py", ["python", "-m", "tlora_mlx"]),
        ("/x/ipykernel_launcher.py", ["python", "-m", "tlora_mlx"]),
    ):
        monkeypatch.setattr(sys, "argv", [script, "train"])
        command = suggested("export", path, "--format", "peft")
        assert shlex.split(command) == [*start, "export", path, "--format", "peft"]


def test_the_first_line_comes_before_anything_heavy(tmp_path):
    """``tlora train`` speaks before numpy, MLX or transformers are imported."""
    code = f"""
import sys
import tlora_mlx.cli as cli

def told(text):
    heavy = {{"mlx", "numpy", "transformers", "torch", "mlx_lm", "datasets"}}
    print(text, sorted(heavy & set(sys.modules)), flush=True)

cli.announce = told
cli.main(["train", "--model", {str(EXAMPLE / "model")!r}, "--data", "no-such.jsonl"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == f"loading model {EXAMPLE / 'model'} … []\n", result.stderr
    assert result.stderr == "error: data no-such.jsonl does not exist\n"


def test_the_script_loads_no_torch(tmp_path):
    """A fault of the data costs no transformers, a look at it no torch."""
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "some text"}] * 2)
    write_jsonl(tmp_path / "bad.jsonl", [{"txt": "some text"}])
    code = """
import sys
from tlora_mlx.cli import script
code = script()
print(code, [m for m in ("torch", "transformers") if sys.modules.get(m)])
"""
    for name, end in (("rows", "0 ['transformers']"), ("bad", "2 []")):
        arguments = ["check", "--model", EXAMPLE / "model", "--data", tmp_path / f"{name}.jsonl"]
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "80"},
        )
        assert result.stdout.splitlines()[-1] == end, result.stderr
