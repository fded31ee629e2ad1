import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx

from tlora_mlx import Adapter, ModulePlan, RankPlan
from tlora_mlx.method.energy import CapturedEnergy
from tlora_mlx.reporting.page import page, points

HOSTILE = "'\"><script>alert(1)</script>"


class Parsed(HTMLParser):
    """The page's tags, attribute values and texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.values, self.texts = set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.values += [value for _, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_hostile_run_injects_no_html(run_path, tlora_here, tmp_path):
    run = shutil.copytree(run_path, tmp_path / HOSTILE.replace("/", "_"))
    config = {"data": HOSTILE, "model": HOSTILE, "base_model": HOSTILE, HOSTILE: [HOSTILE]}
    edit(run / "adapter_config.json", lambda content: content.update(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 99, "val_loss": HOSTILE, "grad_norm": 10**400}) + "\n")
    evaluation = run / "evaluations" / "math"
    evaluation.mkdir(parents=True)
    metrics = {HOSTILE: 0.25, "text": HOSTILE, "list": [HOSTILE], "huge": 10**400, "none": None}
    summary = {"task": HOSTILE, "data": HOSTILE, "rows": HOSTILE}
    summary["metrics"] = {"base": metrics, "adapter": {HOSTILE: HOSTILE}}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    answers = {"answers": [f"{HOSTILE}\ud800"]}
    row = {"prompt": HOSTILE, "answer": HOSTILE, "base": answers, "adapter": {"response": HOSTILE}}
    (evaluation / "results.jsonl").write_text(json.dumps(row) + "\n")

    result = tlora_here("report", run, "--output", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html
    parsed = Parsed(html)
    assert "script" not in parsed.tags
    assert parsed.texts.count(run.name) == 1
    assert parsed.texts.count(f"{HOSTILE}, {HOSTILE}") == 2  # in the table and above the sample
    options, metric_cells, sample_boxes = 4, 4, 3
    assert parsed.texts.count(HOSTILE) == options + metric_cells + sample_boxes
    assert {"0.25", f"{HOSTILE}?", str(10**400), str([HOSTILE])} <= set(parsed.texts)


def test_names_of_modules_stay_inside_their_attributes():
    name = f"layers.0.{HOSTILE.replace('.', '')}"
    adapter = Adapter(
        RankPlan(1, 1.0, {name: ModulePlan(1, 1.0, 0.5, 2, 2)}),
        {f"{name}.lora_a": mx.ones((2, 1)), f"{name}.lora_b": mx.ones((1, 2))},
        "tlora",
        directory=Path("run"),
        config={},
        model="model",
    )
    parsed = Parsed(page(adapter, [], {name: CapturedEnergy(0.999, 0.506, 2)}, [], []))
    assert "script" not in parsed.tags
    hints = [value for value in parsed.values if value.startswith(f"{name}: 2 × 2, rank 1")]
    assert len(hints) == 5
    assert hints[0].endswith("captured energy 99.90%, 50.60% without the 2 leading directions")
    assert {"99.9%", "50.6% (2)"} <= set(parsed.texts)
    parsed = Parsed(page(adapter, [], {name: CapturedEnergy(0.999)}, [], []))  # an early run's
    assert "99.9%" in parsed.texts


def test_points_are_finite_numbers():
    values = [1, 2.5, None, "3", True, float("nan"), float("inf"), 10**400]
    reports = [{"iteration": i, "loss": value} for i, value in enumerate(values)]
    reports += [{"loss": 1.0}, {"iteration": "9", "loss": 1.0}, {"iteration": 10**400, "loss": 1.0}]
    assert points(reports, "loss") == [(0, 1), (1, 2.5)]
