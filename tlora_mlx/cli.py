"""The ``tlora`` console script, one subcommand per module of that name, and how a command ends."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from tlora_mlx.errors import (
    Interrupted,
    RunError,
    Terminated,
    UserError,
    first_line,
    interruption_code,
)
from tlora_mlx.version import __version__

COMMANDS = {
    "check": "look at the data as the model will see it",
    "train": "fine-tune a model",
    "plan": "calibrate and show the rank plan only",
    "export": "write a run as an adapter for PEFT or mlx-lm, or merged; combine adapters",
    "inspect": "describe an adapter: a run, or one of PEFT or mlx-lm",
    "upload": "push an export to the Hugging Face Hub",
    "generate": "complete a prompt with the base model and with the adapter",
    "evaluate": "compare base model and adapter on a task",
    "report": "write a run as one HTML page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tlora COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tlora_mlx {__version__}")
        return 0
    if arguments and arguments[0] in COMMANDS:
        return import_module(f"tlora_mlx.{arguments[0]}").main(arguments[1:])
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    usage = "\n".join(["usage: tlora COMMAND …; see tlora COMMAND --help", *lines])
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    problem = f"unknown command '{arguments[0]}'" if arguments else "no command given"
    print(f"error: {problem}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def run_command(command: Callable[[], object]) -> int:
    """Run a command; print its failure as one sentence on stderr and return the exit code.

    Any other exception is a bug, and passes through, since a bug report needs its traceback. Under
    ``mlx.launch`` a failure in one process ends all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # for terminals without × or emoji
        sys.stdout.reconfigure(errors="replace")
    if not _launched():
        code, message = _outcome(command)
    else:
        from tlora_mlx.distributed.connecting import start

        watch = start()
        code, message = _outcome(command)
        if watch:
            return watch.leave(code, message)
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` inside the block."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _launched() -> bool:
    """Whether ``mlx.launch``, with any of its backends, or Open MPI started this process."""
    return "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def _outcome(command: Callable[[], object]) -> tuple[int, str]:
    """The exit code and, if the command failed, the reason."""
    try:
        with sigterm_as_ctrl_c():
            command()
        return 0, ""
    except (UserError, RunError, Interrupted) as error:
        return error.exit_code, str(error)
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0), ""
    except KeyboardInterrupt as stop:
        return interruption_code(stop), "interrupted"
    except BrokenPipeError:
        return 1, ""
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return 1, f"{error.strerror or first_line(error)}{where}"
