"""A prompt completed by the base model and with the adapter, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from mlx_lm.generate import stream_generate

from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.config.usage_options import GenerateCommand
from tlora_mlx.data.chat_template import question_tokens
from tlora_mlx.errors import UserError
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.storage.files import is_unicode


def completions(config: GenerateCommand, stdin: TextIO) -> Iterator[tuple[str, Iterator[str]]]:
    """A title and the streamed parts for each greedy completion: base model, then adapter.

    The chat template is used if there is one.

    Args:
        config: the options; if the prompt is ``-``, it is read from ``stdin``.
        stdin: a text stream.

    Raises:
        UserError: the adapter or its base model cannot be loaded, there is no prompt, or the
            chat template refuses it.
    """
    base = load_adapter(
        config.run, base_model=config.base_model, trust_remote_code=config.trust_remote_code
    )
    try:
        text = stdin.read() if config.prompt == "-" else config.prompt
    except UnicodeDecodeError:
        raise UserError("--prompt -: standard input is not UTF-8 text") from None
    if not text:
        raise UserError("--prompt -: standard input is empty")
    if not is_unicode(text):
        raise UserError("--prompt is not UTF-8 text")
    prompt = question_tokens(base.tokenizer, text)
    max_tokens = base.room(len(prompt), config.max_tokens)

    def parts() -> Iterator[str]:
        for part in stream_generate(base.model, base.tokenizer, prompt, max_tokens):
            yield part.text

    with adapters_off(base.model):
        yield f"base model {base.name}", parts()
    yield f"with the adapter {config.run}", parts()
