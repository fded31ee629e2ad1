import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from helpers.commands import val_losses
from helpers.models import write_jsonl

from tlora_mlx import read_run
from tlora_mlx.evaluation.survival import Survival, TaskLosses

VOID = {"meta", "line", "polyline"}


class Page(HTMLParser):
    """Checks that tags are nested, and collects texts and external resources."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.loaded = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]
        assert tag not in ("script", "link", "iframe")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def run(run_path, tmp_path):
    return shutil.copytree(run_path, tmp_path / "a <run>")


def test_the_page(run, tlora_here, tmp_path):
    rows = [{"question": f"What is <{i}>?", "answer": f"{i}"} for i in range(5)]
    data = write_jsonl(tmp_path / "sums.jsonl", rows)
    flags = ["--task", "math", "--data", data, "--max-tokens", 4]
    assert tlora_here("evaluate", run, *flags).returncode == 0
    result = tlora_here("report", run, "--samples", 2, "--max-tokens", 6)
    assert result.returncode == 0, result.stderr
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.loaded == []
    assert not re.search(r"url\(|@import", text)

    plan = read_run(run).plan
    assert f"{len(plan.adapted())} of {len(plan.modules)}" in page.text
    for name, module in plan.modules.items():
        assert f"{name}: " in text  # the hint
        shown = f"{module.rank} × {module.scale:.3g}" if module.rank else "–"
        assert shown in page.text
    energies = json.loads((run / "captured_energy.json").read_text())
    assert set(energies) == set(plan.adapted())
    for energy in energies.values():
        assert 0 < energy["beyond"] <= energy["total"] <= 1
        assert f"{energy['total']:.1%}" in page.text
    losses = val_losses(run)
    assert f"{losses[0]:.3f} → {min(losses[1:]):.3f}" in page.text
    for heading in ("loss (nats per token)", "throughput", "peak memory", "learning rate"):
        assert heading in page.text
    assert "exact_match_flexible" in page.text
    assert "What is <0>?" in page.text  # an answer that was evaluated
    assert page.text.count("expected") == 2 + 3
    assert "Add 4 and" in page.text  # a validation prompt
    assert "PeftModel.from_pretrained" in page.text


def test_what_is_left_in_a_quantized_export(run, tlora_here, tmp_path):
    first, second = list(read_run(run).plan.adapted())[:2]
    losses = TaskLosses(base=3.0, adapter=1.0, merged=1.1, samples=48, split="validation")
    Survival(losses, {first: 0.4567}, [second]).write(tmp_path)
    assert tlora_here("report", run, "--merged", tmp_path).returncode == 0
    page = Page((run / "report.html").read_text())
    for shown in ("95.0%", "3.000 → 1.100", "48 validation samples", "0.46", "quantized again"):
        assert shown in page.text
    assert tlora_here("report", run).returncode == 0
    assert "quantized again" not in Page((run / "report.html").read_text()).text
    file = tmp_path / "survival.json"
    whole = json.loads(file.read_text())
    for damage in (
        {"losses": {}},
        {"losses": whole["losses"] | {"merged": None}},
        {"relative_output_errors": {first: "x"}},
        {"relative_output_errors": []},
    ):
        file.write_text(json.dumps(whole | damage))
        refused = tlora_here("report", run, "--merged", tmp_path)
        assert (refused.returncode, "does not say what" in refused.stderr) == (2, True), damage
    file.unlink()
    refused = tlora_here("report", run, "--merged", tmp_path)
    assert (refused.returncode, "has no survival.json" in refused.stderr) == (2, True)


def test_a_run_without_reports_and_energies(run, tlora_here, tmp_path):
    (run / "metrics.jsonl").unlink()
    (run / "captured_energy.json").unlink()
    output = tmp_path / "page.html"
    assert tlora_here("report", run, "--output", output).returncode == 0
    page = Page(output.read_text())
    assert "Nothing was reported" in page.text
    assert "this run did not form covariances" in page.text
    assert not (run / "report.html").exists()


def test_damaged_files(run, tlora_here, tmp_path):
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"iteration": 9')  # half a line, of a run that is going on
    assert tlora_here("report", run).returncode == 0
    metrics.write_text("{\n" + whole)
    assert "line 1 is damaged" in tlora_here("report", run).stderr
    metrics.write_text(whole)
    (run / "evaluations" / "math").mkdir(parents=True)
    result = tlora_here("report", run)
    assert (result.returncode, "an evaluation's summary is missing" in result.stderr) == (2, True)
    (run / "evaluations" / "math" / "summary.json").write_text('{"task": "math"}')
    assert "math is damaged ('data')" in tlora_here("report", run).stderr
    (run / "captured_energy.json").write_text('{"a": 0.5}')  # as the first runs wrote it
    assert "damaged ('data')" in tlora_here("report", run).stderr
    for content in ("[]", '{"a": null}', '{"a": {"total": 1, "beyond": "x"}}', '{"a": {"b": 1}}'):
        (run / "captured_energy.json").write_text(content)
        assert "does not contain captured energies" in tlora_here("report", run).stderr
    result = tlora_here("report", run, "--output", tmp_path / "none" / "page.html")
    assert (result.returncode, "a directory that exists" in result.stderr) == (2, True)
    assert tlora_here("report", tmp_path / "nothing").returncode == 2
