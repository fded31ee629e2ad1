"""A chat with an adapted model, several turns long, in which the base model can be asked too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.config.usage_options import ChatCommand
from tlora_mlx.data.chat_template import prompt_tokens
from tlora_mlx.errors import UserError
from tlora_mlx.invocation import suggested
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.storage.files import is_unicode


class _Reader:
    """A model that remembers what it has read of a conversation, and reads only what is new."""

    def __init__(self, base: BaseModel):
        self._base = base
        self._kept: tuple[list[Any], list[int]] | None = None

    def answer(self, prompt: list[int], max_tokens: int, temp: float) -> Iterator[str]:
        """The answer to a prompt of token ids, in parts."""
        max_tokens = self._base.room(len(prompt), max_tokens)
        cache, read = self._begun(prompt)
        unread, read = prompt[len(read) :], list(prompt)
        options = {"sampler": make_sampler(temp), "prompt_cache": cache}
        for part in stream_generate(
            self._base.model, self._base.tokenizer, unread, max_tokens, **options
        ):
            # mlx-lm has fed a token to the model when it hands it out (generate_step).
            read.append(part.token)
            self._kept = cache, read
            yield part.text
            self._kept = None  # if this is interrupted, nobody knows what the cache has
        self._kept = cache, read

    def _begun(self, prompt: list[int]) -> tuple[list[Any], list[int]]:
        """The cache of the longest beginning of a prompt that was read; one token stays unread."""
        if self._kept is not None:
            (cache, read), self._kept = self._kept, None
            pairs = zip(read, prompt[:-1], strict=False)
            common = [mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
            surplus = len(read) - len(common)
            if not surplus or can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, surplus)
                return cache, common
        return make_prompt_cache(self._base.model), []


class ChatSession:
    """A conversation with a run.

    Args:
        config: the options.

    Raises:
        UserError: the adapter or its base model cannot be loaded, or has no chat template; or the
            system message is no text.
    """

    def __init__(self, config: ChatCommand):
        if config.system and not is_unicode(config.system):
            raise UserError("--system is not UTF-8 text")
        self._config = config
        self._base = load_adapter(
            config.run, base_model=config.base_model, trust_remote_code=config.trust_remote_code
        )
        if not self._base.tokenizer.has_chat_template:
            instead = suggested("generate", config.run, "--prompt", "TEXT")
            raise UserError(f"model {self._base.name} has no chat template; use {instead}")
        self._adapted, self._plain = _Reader(self._base), _Reader(self._base)
        self._messages: list[dict[str, str]] = []
        self.restart()

    def restart(self) -> None:
        """Forget all turns."""
        system = self._config.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The adapted model's answer to the next message, in parts; both are remembered.

        Of an answer that is not read to its end, what was read is remembered.

        Raises:
            UserError: the chat template refuses the message, which is forgotten.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        parts = []
        try:
            for part in self._parts(self._adapted, messages):
                parts.append(part)
                yield part
        finally:
            if parts:
                answer = {"role": "assistant", "content": "".join(parts)}
                self._messages = [*messages, answer]

    def base_answer(self) -> Iterator[str]:
        """The base model's answer to the last message, in parts; it is not remembered.

        Raises:
            UserError: there is no message yet.
        """
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise UserError("ask something first; /base then shows the base model's answer")
        with adapters_off(self._base.model):
            yield from self._parts(self._plain, self._messages[:-1])

    def _parts(self, reader: _Reader, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        prompt = prompt_tokens(self._base.tokenizer, messages)
        return reader.answer(prompt, self._config.max_tokens, self._config.temp)
