"""Damaged inputs: files of runs, adapters, models, data and options, each read by a command."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from attacking.place import Place, tlora

# Processor time after which a command counts as hanging.
SECONDS = 20.0
# Inputs to a fork: what one leaves in the process may hide another's fault.
BATCH = 50
TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\x1b[31m\n", "x" * 5000, "../x", "/etc/passwd", "/dev/full",
    "~nobody/x", "a/b", "<script>", "[/red]", "\u202e", "{{ 1 }}", "%s", "1e400", "nan", "9" * 5000,
    "(a+)+$", "F64", "F8_E4M3", "llama", "model.layers.99999999999.x", "True", "٣",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 3, 10**7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 5e-324, 1e308,
    float("nan"), float("inf"), [], {}, [[]], {"a": []}, [1, 2, 3], ["x"], [None],
)  # fmt: skip
YAML = (
    "rank: 2026-13-45", "rank: !!int abc", "rank: 0x_", "rank: " + "[" * 3000, "model: &a [*a]",
    "rank: 0x" + "f" * 6000, "rank: !!bool x", "rank: !!timestamp x", "? [a]\n: 1", "<<: 3",
    "!!python/object/apply:os.getpid []: 1", "rank: .inf", "model: !!binary aGk=", "rank: 1:30:20",
    "%YAML 9.9\n---\nrank: 1", "a: b: c", "model: " + "{a: " * 3000, '"ra\\e[31mnk": 1', "- a",
    "model: [&a [x, x], &b [*a, *a], &c [*b, *b]" + ", &c [*c, *c, *c]" * 20 + "]",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file to damage, and a command that reads it.

    Attributes:
        kind: for the figures.
        path: the file.
        command: what reads it, given a directory in which it may write ``out``.
    """

    kind: str
    path: Path
    command: Callable[[Path], list[object]]


def targets(place: Place) -> list[Target]:
    """The files of every kind; what several commands read is there several times."""
    root, run = place.root, place.run
    peft, mlx_lm, cached = root / "peft", root / "mlx-lm", root / "unfinished"
    compact, plan, options = root / "compact", root / "plan.json", root / "options.yaml"
    place.succeed("export", run, "--output", peft)
    place.succeed("export", run, "--output", compact, "--layout", "compact")
    place.succeed("export", run, "--output", mlx_lm, "--format", "mlx-lm")
    shutil.copy(run / "rank_plan.json", plan)
    shutil.copytree(run, cached)
    (cached / "adapters.safetensors").unlink()
    evaluation = run / "evaluations" / "math"
    evaluation.mkdir(parents=True)
    figures = {"base": {"accuracy": 0.25}, "adapter": {"accuracy": 0.5}}
    summary = {"task": "math", "data": "d", "rows": 1, "metrics": figures}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    answers = {"answers": ["4"], "response": "4"}
    row = {"prompt": "2+2", "answer": "4", "base": answers, "adapter": answers}
    (evaluation / "results.jsonl").write_text(json.dumps(row) + "\n")
    options.write_text(
        "rank: 4\nalpha: 8.0\nmodel: nonesuch/x\ndata: y\ntarget_modules: [q_proj]\n"
    )
    (place.model / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")

    def exported(source: Path, *more: str) -> Callable[[Path], list[object]]:
        return lambda scratch: ["export", source, "--output", scratch / "out", *more]

    def report(scratch: Path) -> list[object]:
        return ["report", run, "--output", scratch / "out"]

    def resumed(_: Path) -> list[object]:
        return ["train", "--adapter-path", cached, "--resume", "--iters", "3"]

    # The quick ones more often than those that export a model or train.
    found = [Target("options", options, lambda scratch: ["plan", "-c", options])] * 8
    found += [
        Target("plans", plan, lambda s: ["plan", "--sensitivities", plan, "--output", s / "out"])
    ] * 8
    for name in ("train.jsonl", "valid.jsonl"):
        check = ["check", "--model", place.model, "--data", place.data]
        found += [Target("data", place.data / name, lambda _, c=check: c)] * 2
    for name in ("adapter_config.json", "rank_plan.json", "adapters.safetensors"):
        found += [
            Target("runs", run / name, exported(run)),
            *[Target("runs", run / name, lambda _: ["inspect", run])] * 5,
            Target("reports", run / name, report),
        ]
    for path in (run / "metrics.jsonl", run / "captured_energy.json", *evaluation.iterdir()):
        found += [Target("reports", path, report)] * 4
    for source in (peft, compact, mlx_lm):
        for path in (source / "adapter_config.json", *source.glob("*.safetensors")):
            found += [
                *[Target("adapters", path, lambda _, source=source: ["inspect", source])] * 6,
                Target("adapters", path, exported(source, "--format", "run")),
            ]
    for name in ("config.json", "model.safetensors", "README.md", "tokenizer_config.json"):
        found.append(Target("models", place.model / name, exported(run, "--format", "merged")))
    for path in cached.glob("checkpoints/0000003/*"):
        found.append(Target("checkpoints", path, resumed))
    return found


def attack_inputs(place: Place, number: int, deadline: float) -> Iterator[dict[str, dict]]:
    """Damage ``number`` files and read each; the figures by kind."""
    chosen = targets(place)
    figures = {t.kind: {"inputs": 0, "refused": 0, "lost": []} for t in chosen}
    scratch = place.root / "scratch"
    scratch.mkdir()
    first, seed = 0, place.draw.random()
    while first < number and time.monotonic() < deadline:
        results = place.root / "results.jsonl"
        results.write_text("")
        last = min(first + BATCH, number)
        numbers = range(first, last)
        ending = place.fork(partial(_batch, chosen, scratch, results, numbers, seed))
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        for line in lines:
            found = figures[line["kind"]]
            found["inputs"] += 1
            found["refused"] += line["code"] != 0
            if line["fault"]:
                found["lost"].append(line["fault"])
        if ending.code:  # the process itself ended
            target = chosen[(first + len(lines)) % len(chosen)]
            figures[target.kind]["inputs"] += 1
            figures[target.kind]["lost"].append(f"input {first + len(lines)}: {ending}")
            target.path.write_bytes(_whole(target.path))
        first += len(lines) + bool(ending.code)
        yield figures


def _whole(path: Path) -> bytes:
    """The undamaged file, kept beside it when it was first damaged."""
    return path.with_name(f".{path.name}.whole").read_bytes()


def _batch(chosen: list[Target], scratch: Path, results: Path, numbers: range, seed: float) -> int:
    with results.open("a") as file:
        for number in numbers:
            target = chosen[number % len(chosen)]
            line = _attempt(target, scratch, number, Random(f"{seed} {number}"))
            file.write(json.dumps({"kind": target.kind, **line}) + "\n")
            file.flush()
    return 0


class _Hanging(BaseException):
    """The time is over."""


def _attempt(target: Target, scratch: Path, number: int, draw: Random) -> dict[str, Any]:
    """Damage a file, read it, judge, and restore everything."""
    kept = target.path.with_name(f".{target.path.name}.whole")
    if not kept.exists():
        shutil.copy(target.path, kept)
    whole = kept.read_bytes()
    damaged = damage(draw, target.path, whole)
    target.path.write_bytes(damaged)
    before = _tree(target.path.parent)
    output, errors = io.StringIO(), io.StringIO()

    def stop(*_: object) -> None:
        raise _Hanging

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    code, fault = 0, None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = tlora(*target.command(scratch))
    except BaseException as error:
        fault = "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    text = errors.getvalue()
    told = [line for line in text.splitlines() if line.startswith("error: ")]
    if fault is None and code not in (0, 1, 2):
        fault = f"exit code {code}"
    if fault is None and code and (len(told) != 1 or not text.rstrip("\n").endswith(told[0])):
        fault = f"not one sentence: {text[-300:]}"
    written = sorted(path.name for path in scratch.iterdir())
    if fault is None and (written not in ([], ["out"], ["out", "out.png"]) or (code and written)):
        fault = f"left {written}"
    if fault is None and code and _tree(target.path.parent) != before:
        fault = "changed its inputs"
    for path in scratch.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _restore(target, whole)
    if fault:
        fault = f"input {number}, {target.path.name}, {target.command(scratch)[0]}: {fault}"
    return {"code": code, "fault": fault}


def _tree(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*") if "damaged-" not in str(path))


def _restore(target: Target, whole: bytes) -> None:
    """Put the file back; a run that was resumed to its end, or set aside, becomes unfinished."""
    if target.kind == "checkpoints":
        run = target.path.parents[2]
        keep = run.with_name("unfinished.whole")
        if not keep.exists():
            target.path.parent.mkdir(exist_ok=True)
            target.path.write_bytes(whole)
            (run / "adapters.safetensors").unlink(missing_ok=True)
            shutil.copytree(run, keep)
        shutil.rmtree(run)
        shutil.copytree(keep, run)
    else:
        target.path.write_bytes(whole)


def damage(draw: Random, path: Path, whole: bytes) -> bytes:
    """A file's bytes, damaged in one of several ways."""
    tensors = path.suffix == ".safetensors"
    ways = ["cut", "byte", "insert", "double"] + ["values"] * 6 * (path.suffix != ".md")
    way = draw.choice(ways)
    at = draw.randrange(len(whole) + 1)
    if tensors and draw.random() < 0.8:  # most often in the header
        at = min(at, draw.randrange(8 + int.from_bytes(whole[:8], "little")))
    if way == "cut":
        return whole[:at]
    if way == "byte":
        return whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
    if way == "insert":
        return whole[:at] + draw.choice(TEXTS).encode(errors="surrogatepass") + whole[at:]
    if way == "double":
        return whole[:at] + whole[max(0, at - draw.randrange(200)) :]
    if path.suffix in (".yaml", ".md"):
        lines = whole.decode().splitlines()
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(YAML))
        return "\n".join(lines).encode()
    if path.suffix == ".jsonl":
        lines = whole.decode().splitlines()
        row = draw.randrange(len(lines))
        lines[row] = json.dumps(changed(draw, json.loads(lines[row])))
        return "\n".join(lines).encode()
    if tensors:
        length = int.from_bytes(whole[:8], "little")
        header = json.dumps(changed(draw, json.loads(whole[8 : 8 + length]))).encode()
        return len(header).to_bytes(8, "little") + header + whole[8 + length :]
    return json.dumps(changed(draw, json.loads(whole))).encode()


def changed(draw: Random, value: Any) -> Any:
    """A JSON value with one to three spots replaced, removed or renamed."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        spots = [spot for spot in _spots(value) if spot]
        if not spots:
            return value
        *path, last = draw.choice(spots)
        inner = value
        for key in path:
            inner = inner[key]
        way = draw.random()
        if way < 0.15:
            del inner[last]
        elif way < 0.3 and isinstance(inner, dict):
            inner[draw.choice(TEXTS)] = inner.pop(last)
        else:
            inner[last] = draw.choice(draw.choice((TEXTS, VALUES)))
    return value


def _spots(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += _spots(inner, (*path, key))
    return found
