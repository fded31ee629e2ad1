"""Kills before every operation on files and at random moments, and full disks."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attacking.place import Place, content, tlora

# Python's audit events, each of which comes before the operation.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Operation:
    """A command that writes something.

    Attributes:
        name: for the figures.
        command: its arguments, for an output; the second time for going on after a kill.
        output: what it writes.
        before: prepares the output; None: there is none before.
        all_or_nothing: the output is whole or not there; else it is repaired by going on.
    """

    name: str
    command: Callable[[Path, bool], Sequence[object]]
    output: Path
    before: Callable[[Path], object] | None = None
    all_or_nothing: bool = True
    reference: dict[str, object] = field(default_factory=dict)


def operations(place: Place) -> list[Operation]:
    """Training, resuming, planning, and all exports."""
    root = place.root

    def training(run: Path, again: bool) -> list[object]:
        return ["train", *place.training(run), *(["--resume"] if again else [])]

    def unfinished(run: Path) -> None:
        shutil.copytree(place.run, run)
        (run / "adapters.safetensors").unlink()
        shutil.rmtree(run / "checkpoints" / "0000003")

    def plan(path: Path, _: bool) -> list[object]:
        options = ["--rank", 2, "--calibration-samples", 2, "--batch-size", 2]
        options += ["--max-seq-length", 32, "--output", path]
        return ["plan", "--model", place.model, "--data", place.data, *options]

    def exporting(*options: str) -> Callable[[Path, bool], list[object]]:
        return lambda output, _: ["export", place.run, "--output", output, *options]

    found = [
        Operation("train", training, root / "t" / "out", all_or_nothing=False),
        Operation(
            "resume",
            lambda run, _: ["train", "--adapter-path", run, "--resume"],
            root / "t" / "out",
            unfinished,
            all_or_nothing=False,
        ),
        Operation("plan", plan, root / "t" / "out"),
        Operation("report", lambda p, _: ["report", place.run, "--output", p], root / "t" / "out"),
    ]
    for name, options in (
        ("peft", ()),
        ("compact", ("--layout", "compact")),
        ("mlx-lm", ("--format", "mlx-lm")),
        ("merged", ("--format", "merged")),
        ("run", ("--format", "run")),
    ):
        found.append(Operation(f"export {name}", exporting(*options), root / "t" / "out"))
    return [operation for operation in found if place.only in operation.name]


def _prepare(operation: Operation) -> None:
    shutil.rmtree(operation.output.parent, ignore_errors=True)
    operation.output.parent.mkdir()
    if operation.before:
        operation.before(operation.output)


def _trapped(operation: Operation, kill_before: int | None) -> int:
    """The command, in the child; ends with the number of operations, or is killed before one."""
    place, count = str(operation.output.parent), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        # rmtree gives names relative to a directory's descriptor, and ftruncate a descriptor.
        inside = event in ("os.remove", "os.rmdir", "os.truncate")
        if inside or os.fspath(path).startswith(place):
            count += 1
            if count == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = tlora(*operation.command(operation.output, False))
    if code:
        return code
    Path(place + ".count").write_text(str(count))
    return 0


def _state(operation: Operation) -> dict[str, object] | None:
    return content(operation.output) if os.path.lexists(operation.output) else None


def _judge(place: Place, operation: Operation, how: str) -> list[str]:
    """What is wrong after an attempt was ended, and after going on."""
    faults = []
    if operation.all_or_nothing and _state(operation) not in (None, operation.reference):
        faults.append(f"{operation.name}, {how}: half-written")
    if operation.all_or_nothing and operation.output.is_dir():
        shutil.rmtree(operation.output)
    again = place.fork(lambda: tlora(*operation.command(operation.output, True)))
    if again.code or "Traceback" in again.errors:
        return [*faults, f"{operation.name}, {how}: then {again.code}: {again.errors[-300:]}"]
    if _state(operation) != operation.reference:
        faults.append(f"{operation.name}, {how}: another result after going on")
    left = [str(p.name) for p in operation.output.parent.rglob("*.part")]
    if left:
        faults.append(f"{operation.name}, {how}: left {left}")
    return faults


def attack_kills(place: Place, number: int, deadline: float) -> Iterator[dict[str, dict]]:
    """Kill each operation before every k-th change, then at random moments, ``number`` in all.

    At random moments, quick operations are killed more often: each gets about the same time.
    """
    figures: dict[str, dict] = {}
    chosen = operations(place)
    seconds: dict[str, float] = {}
    for operation in chosen:
        _prepare(operation)
        start = time.monotonic()
        ending = place.fork(lambda operation=operation: _trapped(operation, None))
        seconds[operation.name] = time.monotonic() - start
        if ending.code:
            raise RuntimeError(f"{operation.name}: {ending}")
        operation.reference = _state(operation)
        changes = int(Path(f"{operation.output.parent}.count").read_text())
        figures[operation.name] = {"operations": changes, "kills": 0, "random": 0, "lost": []}
    for operation in chosen:
        found = figures[operation.name]
        for k in range(1, found["operations"] + 1):
            if number <= 0 or time.monotonic() > deadline:
                break
            _prepare(operation)
            ending = place.fork(lambda operation=operation, k=k: _trapped(operation, k))
            if ending.code == -signal.SIGKILL:
                found["kills"] += 1
                number -= 1
            found["lost"] += _judge(place, operation, f"killed before change {k}")
            yield figures
    while number > 0 and time.monotonic() < deadline:
        [operation] = place.draw.choices(chosen, [1 / seconds[o.name] for o in chosen])
        _prepare(operation)
        after = place.draw.uniform(0, 1.2 * seconds[operation.name])
        command = operation.command(operation.output, False)
        ending = place.fork(lambda command=command: tlora(*command), after)
        if ending.code == -signal.SIGKILL:
            figures[operation.name]["random"] += 1
            number -= 1
        elif operation.all_or_nothing and operation.output.is_dir():
            continue
        figures[operation.name]["lost"] += _judge(place, operation, f"killed after {after:.3f} s")
        yield figures


def attack_disk(place: Place, number: int, deadline: float) -> Iterator[dict[str, dict]]:
    """Run each operation ``number`` times with files that cannot grow beyond some size."""
    figures: dict[str, dict] = {}
    for operation in operations(place):
        _prepare(operation)
        place.succeed(*operation.command(operation.output, False))
        operation.reference = _state(operation)
        files = operation.output.rglob("*") if operation.output.is_dir() else [operation.output]
        largest = max(file.stat().st_size for file in files if file.is_file())
        found = figures[operation.name] = {"attempts": 0, "failed": 0, "lost": []}
        for i in range(number):
            if time.monotonic() > deadline:
                break
            size = int(largest ** ((i + 1) / (number + 1)))
            _prepare(operation)

            def limited(operation: Operation = operation, size: int = size) -> int:
                said = io.StringIO()  # its own output goes to a file, too
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                try:
                    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                        return tlora(*operation.command(operation.output, False))
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                    print(said.getvalue(), file=sys.stderr, flush=True)

            ending = place.fork(limited)
            found["attempts"] += 1
            found["failed"] += ending.code == 1
            if ending.code not in (0, 1) or "Traceback" in ending.errors:
                found["lost"].append(f"{operation.name}, {size} bytes: {ending}")
            found["lost"] += _judge(place, operation, f"no file above {size} bytes")
            yield figures
