"""Large loads: many rows, many layers, long metrics; and a clock that is set back."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attacking.place import Place, content, tlora

ROWS, LAYERS, REPORTS = 200_000, 60, 15_000


def attack_loads(place: Place, number: int, deadline: float) -> Iterator[dict[str, dict]]:
    """Run each load once; processor seconds and peak memory of its process, and what is wrong."""
    figures: dict[str, dict] = {}
    loads = {
        f"{ROWS:,} rows, training's start": _rows,
        f"{LAYERS} layers, training and export": _layers,
        f"{REPORTS:,} reports, resumed and shown": _reports,
        "a clock set back while training": _clock,
    }
    for name, load in loads.items():
        if time.monotonic() < deadline:
            figures[name] = _measured(place, load(place))
            yield figures


def _measured(place: Place, work: Callable[[], int]) -> dict:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = place.root / "peak"

    def measured() -> int:
        code = work()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak.write_text(str(used * (1 if sys.platform == "darwin" else 1024)))
        return code

    ending = place.fork(measured)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lost = [] if ending.code == 0 else [str(ending)]
    gigabytes = int(peak.read_text()) / 1e9 if not lost else None
    return {"cpu_seconds": round(seconds, 1), "peak_gb": gigabytes, "lost": lost}


def _training(place: Place, run: Path, model: Path, data: Path) -> list[str]:
    arguments = place.training(run)
    arguments[1], arguments[3] = str(model), str(data)
    return [*arguments, "--iters", "1"]


def _rows(place: Place) -> Callable[[], int]:
    data = place.root / "many"
    shutil.copytree(place.data, data)
    lines = (place.data / "train.jsonl").read_text().splitlines()
    rows = (f'{lines[i % len(lines)][:-1]}, "number": {i}}}\n' for i in range(ROWS))
    with (data / "train.jsonl").open("w") as file:
        file.writelines(rows)
    return lambda: tlora("train", *_training(place, place.root / "r", place.model, data))


def _layers(place: Place) -> Callable[[], int]:
    def work() -> int:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from tlora_mlx.models.base_model import describe_base_model

        model = place.root / "tall"
        shutil.copytree(place.model, model)
        (model / "model.safetensors").unlink()
        config = json.loads((model / "config.json").read_text())
        config["num_hidden_layers"] = LAYERS
        (model / "config.json").write_text(json.dumps(config))
        weights = dict(tree_flatten(describe_base_model(str(model)).model.parameters()))
        mx.save_safetensors(str(model / "model.safetensors"), weights)
        run = place.root / "high"
        code = tlora("train", *_training(place, run, model, place.data))
        return code or tlora("export", run, "--output", place.root / "high-peft")

    return work


def _reports(place: Place) -> Callable[[], int]:
    """A run that is not finished, whose checkpoint knows of many reports."""
    run = place.root / "long"

    def work() -> int:
        from tlora_mlx.runs.checkpoint import _digest

        shutil.copytree(place.run, run)
        (run / "adapters.safetensors").unlink()
        shutil.rmtree(run / "checkpoints" / "0000003")
        line = (run / "metrics.jsonl").read_text().splitlines()[1] + "\n"
        (run / "metrics.jsonl").write_text(line * REPORTS)
        path = run / "checkpoints" / "0000002" / "state.json"
        state = json.loads(path.read_text())
        del state["sha256"]
        state["metrics_bytes"] = len(line) * REPORTS
        path.write_text(json.dumps({**state, "sha256": _digest(state)}))
        code = tlora("train", "--adapter-path", run, "--resume")
        kept = len((run / "metrics.jsonl").read_text().splitlines())
        return code or int(kept <= REPORTS) or tlora("report", run)

    return work


def _clock(place: Place) -> Callable[[], int]:
    """Half of a run, then the rest a day earlier: the same bytes as without."""
    run = place.root / "back"

    def work() -> int:
        now = time.time
        shutil.copytree(place.run, run)
        (run / "adapters.safetensors").unlink()
        shutil.rmtree(run / "checkpoints" / "0000003")
        time.time = lambda: now() - 86_400
        for path in (run, *run.rglob("*")):
            os.utime(path, (now() + 86_400, now() + 86_400))
        code = tlora("train", "--adapter-path", run, "--resume")
        return code or int(content(run) != content(place.run))

    return work
