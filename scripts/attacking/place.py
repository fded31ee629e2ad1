"""Where the attacks happen: the example's model, a little data, and commands in forks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

# Imported before the first fork, so that no attempt imports anything.
HEAVY = (
    "mlx_lm.utils", "mlx_lm.generate", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "tlora_mlx.training.session", "tlora_mlx.publishing.export", "tlora_mlx.reporting.report",
    "tlora_mlx.reporting.inspection", "tlora_mlx.training.data_check", "tlora_mlx.terminal",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
TIMES = ("val_time", "iterations_per_second", "tokens_per_second", "peak_memory")


class Ending(NamedTuple):
    """How a process ended: its exit code, negative if a signal ended it, and its error output."""

    code: int
    errors: str


class Place:
    """A model, data, a finished run and its exports, made by the commands themselves."""

    def __init__(self, root: Path, draw: random.Random, only: str = ""):
        self.root, self.draw, self.only = root, draw, only
        for name in HEAVY:
            import_module(name)
        self.model, self.data = root / "model", root / "data"
        shutil.copytree(ROOT / "examples/model", self.model)
        self.data.mkdir()
        for split, rows in (("train", 6), ("valid", 1)):
            lines = (ROOT / f"examples/data/{split}.jsonl").read_text().splitlines()[:rows]
            (self.data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        self.run = root / "run"
        self.succeed("train", *self.training(self.run))

    def training(self, run: Path) -> list[str]:
        """The arguments of a small training run."""
        options = "--iters 3 --rank 2 --calibration-samples 2 --batch-size 2 --save-every 1"
        options += " --steps-per-report 1 --steps-per-eval 2 --val-batches 1 --max-seq-length 32"
        options += " --learning-rate 0.01 --keep-checkpoints 2"
        paths = ["--model", self.model, "--data", self.data, "--adapter-path", run]
        return [*map(str, paths), *options.split()]

    def succeed(self, command: str, *arguments: object) -> None:
        """Run a command that must succeed."""
        ending = self.fork(lambda: tlora(command, *arguments))
        if ending.code:
            raise RuntimeError(f"{command} {arguments}: {ending}")

    def fork(self, work: Callable[[], int], after: float | None = None) -> Ending:
        """Do ``work`` in a forked process, and kill it ``after`` so many seconds if given."""
        log = self.root / "log"
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = 70
                try:
                    code = work()
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            os._exit(71)
        ended, status = os.waitpid(pid, 0 if after is None else os.WNOHANG)
        moment = time.monotonic() + (after or 0)
        while not ended and time.monotonic() < moment:
            time.sleep(0.001)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        return Ending(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))


def tlora(command: str, *arguments: object) -> int:
    """A command in this process."""
    return import_module(f"tlora_mlx.{command}").main([str(argument) for argument in arguments])


def content(path: Path) -> dict[str, object]:
    """What a file or directory holds, without the times in metrics and options."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file():
            found[name] = "directory"
        elif file.name == "metrics.jsonl":
            reports = map(json.loads, file.read_text().splitlines())
            found[name] = [{k: v for k, v in r.items() if k not in TIMES} for r in reports]
        elif file.name in ("adapter_config.json", "state.json") and "fine_tune" in file.read_text():
            options = json.loads(file.read_text())
            found[name] = {k: v for k, v in options.items() if k != "adapter_path"}
        elif file.name not in ("state.json", "loss.png"):  # it holds seconds; drawn at the end
            found[name] = file.read_bytes()
    return found
