"""What commands print: progress without a terminal, suggestions that can be pasted, nothing cut."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import write_jsonl
from helpers.paths import EXAMPLE

from tlora_mlx import ModulePlan, RankPlan, terminal
from tlora_mlx.adapters.readers import Reading
from tlora_mlx.evaluation.evaluate import EvaluationResult
from tlora_mlx.invocation import suggested
from tlora_mlx.reporting.inspection import readers_table
from tlora_mlx.reporting.tables import metrics_table
from tlora_mlx.training.data_check import SplitSummary


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


def wide_plan():
    module = ModulePlan(110, 11.25, 1.0, 8, 8)
    kinds = ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"]
    kinds += ["mlp.up_proj", "mlp.shared_experts.up_proj", "mlp.switch_mlp.up_proj"]
    terminal.print_plan(RankPlan(8, 8.0, {f"model.layers.0.{kind}": module for kind in kinds}))
    return ["110×11.2"] * 6 + ["kv_a_proj_with_mqa", "mlp.switch_mlp.up_proj"]


def wide_splits():
    name, rows = f"train of {'d' * 60}/a.jsonl", list(range(9_999))
    figures = (1_234_567, 123_456_789, 98_765_432, 131_072, rows, rows, 99_999)
    terminal.print_splits([SplitSummary(name, *figures)])
    return ["train", "repeated", "1,234,567", "123,456,789", "131,072", "99,999"]


def wide_readings():
    fault = "does not load it: its ranks differ"
    scales = {"a": 0.0001234, "b": 12345.6}
    reading = Reading("PEFT, transformers", "0.21.2, 5.24.0, run", scales, fault)
    terminal.console.print(readers_table([reading]))
    return ["transformers", "5.24.0,", "0.0001234", "1.235e+04", *fault.split()]


def wide_metrics():
    result = EvaluationResult(Path(), "m" * 60, {"exact match": 1 / 3}, {"exact match": 2 / 3})
    terminal.console.print(metrics_table(result))
    return ["exact", "match", "0.3333", "0.6667", "+0.3333"]


@pytest.mark.parametrize("show", [wide_plan, wide_splits, wide_readings, wide_metrics])
def test_no_table_is_cut_at_80_columns(show, monkeypatch, capsys):
    monkeypatch.setattr(terminal.console, "_width", 80)
    expected = show()
    shown = capsys.readouterr().out
    assert not [line for line in shown.splitlines() if len(line) > 80]
    for word in expected:
        assert shown.split().count(word) == expected.count(word), shown


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
