"""The model under evaluation: its answers, and how likely it finds a given answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import batch_generate

from tlora_mlx.data.batches import collate
from tlora_mlx.data.chat_template import prompt_tokens
from tlora_mlx.data.formats import FRAME_STOPS, framed, to_prompt
from tlora_mlx.data.samples import Sample
from tlora_mlx.errors import RunError, UserError, first_line
from tlora_mlx.evaluation.rows import QUESTIONS, Row
from tlora_mlx.method.output_layer import is_separable, losses_by_sample
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.observer import SILENT, Advance, Observer


@dataclass(frozen=True)
class Subject:
    """A model, and how to ask it.

    Attributes:
        title: its name in progress messages.
        format: the named format that it was trained with; if there is no chat template, its
            frame is put around each question.
        observer: notified of each batch.
    """

    base: BaseModel
    title: str
    format: str | None
    batch_size: int
    max_tokens: int
    observer: Observer = SILENT

    @property
    def is_framed(self) -> bool:
        """Whether a question is put into the format's frame."""
        return self.format is not None and not self.base.tokenizer.has_chat_template

    def formatted(self, row: Row) -> Row:
        """The row with ``prompt`` and ``completion``, made from raw columns if there is a format.

        Raises:
            UserError: it is not a row of the format.
        """
        if self.format is None or "prompt" in row.columns:
            return row
        try:
            chat = self.base.tokenizer.has_chat_template
            return row._replace(columns=to_prompt(self.format, row.columns, chat))
        except ValueError as error:
            raise UserError(f"{row.where} does not fit --format {self.format}: {error}") from None

    def question(self, row: Row) -> str:
        """The row's ``prompt`` unchanged, or its question in the format's frame."""
        if "prompt" in row.columns:
            return row.text("prompt")
        asked = row.text(*QUESTIONS)
        return framed(asked) if self.is_framed else asked

    def encode(self, turns: Sequence[str]) -> list[int]:
        """The token ids that come before the answer to the last turn.

        Args:
            turns: prompt, answer, next instruction, …; an odd number of them.

        Raises:
            UserError: the chat template refuses them.
        """
        tokenizer = self.base.tokenizer
        if tokenizer.has_chat_template:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
            # Models that can think first are told not to, to treat all models alike.
            return prompt_tokens(tokenizer, messages, enable_thinking=False)
        text = turns[0]
        for answer, instruction in zip(turns[1::2], turns[2::2], strict=True):
            if self.is_framed:
                text += f"{answer}\n\n### Instruction:\n{instruction}\n\n### Response:"
            else:
                text += f"{answer}\n\n{instruction}"
        tokens = tokenizer.encode(text)
        return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens

    def generate(self, conversations: Sequence[Sequence[str]]) -> list[str]:
        """Greedy answers, of at most ``max_tokens`` tokens, to conversations as for ``encode``.

        Raises:
            RunError: mlx-lm cannot generate in batches with this model.
        """
        return self.complete([self.encode(turns) for turns in conversations])

    def complete(self, prompts: Sequence[list[int]]) -> list[str]:
        """``generate`` for prompts in token ids; prompts of similar length share a batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        with self.observer.stage(f"{self.title} answers", len(prompts)) as advance:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                try:
                    texts = batch_generate(
                        self.base.model,
                        self.base.tokenizer,
                        [prompts[i] for i in chosen],
                        max_tokens=[
                            self.base.room(len(prompts[i]), self.max_tokens) for i in chosen
                        ],
                        completion_batch_size=self.batch_size,
                        prefill_batch_size=self.batch_size,
                    ).texts
                except ValueError as error:
                    raise RunError(
                        f"mlx-lm cannot answer in batches with this model: {first_line(error)}"
                    ) from error
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = cut(text, FRAME_STOPS) if self.is_framed else text
                advance(len(chosen))
        return answers

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Σ log p of each answer's tokens after its prompt, in nats; 0 if there are none.

        Prompt and answer are tokenized separately, as in training; the end token does not count.
        """
        encode = self.base.tokenizer.encode
        samples = []
        for prompt, answer in pairs:
            tokens = self.encode([prompt])
            whole = tokens + encode(answer, add_special_tokens=False)
            self.base.room(len(whole))
            samples.append(Sample(whole, max(len(tokens), 1)))
        with self.observer.stage(f"{self.title} weighs", len(samples)) as advance:
            losses = sample_losses(self.base.model, samples, self.batch_size, advance)
        return [-loss for loss, _ in losses]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these stops, without surrounding whitespace."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def sample_losses(
    model: Any, samples: Sequence[Sample], batch_size: int, advance: Advance
) -> list[tuple[float, int]]:
    """Each sample's summed loss, in nats, and the number of tokens that it covers."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(samples)
    model.eval()
    separable = bool(samples) and is_separable(model, mx.array([samples[order[-1]].tokens]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([samples[i] for i in chosen], 0)
        losses = losses_by_sample(model, batch, separable)
        for i, loss in zip(chosen, losses, strict=True):
            results[i] = (loss, int(samples[i].counts()[1:].sum()))
        advance(len(chosen))
    return results
