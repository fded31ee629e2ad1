"""A chat with an adapted model, several turns long, in which the base model can be asked too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.config.usage_options import ChatCommand
from tlora_mlx.data.chat_template import prompt_tokens
from tlora_mlx.errors import UserError
from tlora_mlx.invocation import suggested
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.storage.files import is_unicode


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
            for part in self._parts(messages):
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
            yield from self._parts(self._messages[:-1])

    def _parts(self, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        tokenizer = self._base.tokenizer
        options = {"sampler": make_sampler(self._config.temp)}
        for part in stream_generate(
            self._base.model,
            tokenizer,
            prompt_tokens(tokenizer, messages),
            self._config.max_tokens,
            **options,
        ):
            yield part.text
