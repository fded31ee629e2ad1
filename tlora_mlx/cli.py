"""The ``tlora`` console script, one subcommand per module of that name, and how a command ends."""

from __future__ import annotations

import difflib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from tlora_mlx.config.mlx_lm_options import command_line
from tlora_mlx.errors import (
    Interrupted,
    RunError,
    Terminated,
    UserError,
    first_line,
    interruption_code,
    last_line,
    visible,
)
from tlora_mlx.version import __version__

COMMANDS = {
    "check": "look at the data as the model will see it",
    "train": "fine-tune a model",
    "plan": "calibrate and show the rank plan only",
    "export": "write a run for PEFT, mlx-lm or llama.cpp, or merged",
    "inspect": "describe an adapter: a run, or one of PEFT or mlx-lm",
    "upload": "push an export to the Hugging Face Hub",
    "generate": "complete a prompt with the base model and with the adapter",
    "chat": "chat with a run, next to its base model",
    "serve": "serve a run with mlx-lm's server",
    "evaluate": "compare base model and adapter on a task",
    "report": "write a run as one HTML page",
    "completion": "print a script that completes commands with Tab",
}


# mlx-lm's commands, and what a user of theirs looks for here.
COUNTERPARTS = {
    "lora": "train",
    "fuse": "export RUN --format merged",
    "perplexity": "evaluate RUN --task perplexity",
    "push": "upload",
    "finetune": "train",
    "fine-tune": "train",
    "eval": "evaluate",
    "test": "evaluate",
    "show": "inspect",
    "info": "inspect",
}


def script() -> int:
    """The ``tlora`` script: as ``main``, in a process of its own, which needs no torch.

    transformers imports torch wherever it is installed (``modeling_rope_utils``), which takes half
    the time of all imports; tokenizers work without.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tlora COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tlora_mlx {__version__}")
        return 0
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [arguments[1], "--help"]
    if arguments in ([], ["-h"], ["--help"], ["--help-all"], ["help"]):
        print(_usage())
        return 0
    if arguments[0].startswith("-") and (theirs := command_line(arguments)):
        if theirs[0] != "train":
            announce(f"mlx-lm's options, translated: tlora {shlex.join(theirs)}")
        arguments = theirs
    if arguments[0] in COMMANDS:
        return import_module(f"tlora_mlx.{arguments[0]}").main(arguments[1:])
    print(f"error: {visible(_unknown(arguments[0]))}", file=sys.stderr)
    return 2


def _usage() -> str:
    """All commands, in the order of a first day."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tlora COMMAND …",
            "",
            *lines,
            "",
            "tlora COMMAND --help shows a command's options; tlora --version the version.",
            "First: tlora check --model MODEL --data DATA, then tlora train with the same.",
        ]
    )


def _unknown(word: str) -> str:
    """What to do instead of a command that there is not."""
    if word.startswith("-"):
        return f"'{word}' comes before a command; try tlora train {word} …, or tlora help"
    if instead := COUNTERPARTS.get(word):
        return f"unknown command '{word}'; tlora {instead} does that"
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    meant = f"did you mean {near[0]}? The commands are" if near else "choose one of"
    return f"unknown command '{word}'; {meant} {', '.join(COMMANDS)}"


def announce(text: str) -> None:
    """Print a line at once, before anything heavy is imported; under a launcher, once."""
    number = os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    if number == "0":
        print(visible(text), flush=True)


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
        print(last_line(code, message), file=sys.stderr)
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
        return error.exit_code, visible(str(error))
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0), ""
    except KeyboardInterrupt as stop:
        return interruption_code(stop), "interrupted"
    except BrokenPipeError:
        return 1, ""
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return 1, visible(f"{error.strerror or first_line(error)}{where}")


if __name__ == "__main__":
    sys.exit(main())
