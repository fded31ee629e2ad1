"""``python -m tlora_mlx.generate``: what the base model says, and what the adapter makes of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.config import GenerateCommand, parse
from tlora_mlx.errors import UserError, run_command

DESCRIPTION = "Complete a prompt with a run's base model and with its adapter, greedily."


def generate(config: GenerateCommand) -> None:
    """Print both completions as they grow; the chat template is used where there is one.

    Raises:
        UserError: the run or its base model cannot be loaded, or there is no prompt.
    """
    from mlx_lm.generate import stream_generate

    from tlora_mlx.method.layers import adapters_off
    from tlora_mlx.run_directory import load_run

    base = load_run(config.run, config.trust_remote_code)
    try:
        text = sys.stdin.read() if config.prompt == "-" else config.prompt
    except UnicodeDecodeError:
        raise UserError("--prompt -: standard input is not UTF-8 text") from None
    if not text:
        raise UserError("--prompt -: standard input is empty")
    prompt = text
    if base.tokenizer.has_chat_template:
        prompt = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )

    def stream(title: str) -> None:
        print(f"--- {title}")
        for part in stream_generate(base.model, base.tokenizer, prompt, config.max_tokens):
            print(part.text, end="", flush=True)
        print()

    with adapters_off(base.model):
        stream(f"base model {base.name}")
    stream(f"with the adapter {config.run}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(
        lambda: generate(parse(GenerateCommand, "tlora generate", DESCRIPTION, argv))
    )


if __name__ == "__main__":
    sys.exit(main())
