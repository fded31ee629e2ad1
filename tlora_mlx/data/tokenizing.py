"""Rows as samples of token ids; all faults of a split are told together, with their lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.chat_template import Tokenized, refusal
from tlora_mlx.data.conversation import (
    Conversation,
    MalformedRowError,
    conversation_of,
    has_empty_answer,
)
from tlora_mlx.data.faults import Faults, first_numbers
from tlora_mlx.data.formats import FORMATS, recognised_format, to_prompt
from tlora_mlx.data.offsets import NotLocatedError, intervals
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.data.turns import ChatTemplate
from tlora_mlx.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Each format's keys, in the order in which mlx-lm looks for them (mlx_lm/tuner/datasets.py,
# create_dataset).
_KEYS = (("prompt", "completion"), ("messages",), ("text",))

_EMPTY = (
    "an answer is empty, so the model learns to say nothing; delete the row unless you want that"
)

# A sample's token ids, and for each whether it is learnt; and what ends each turn of an assistant.
_Process = Callable[[dict[str, Any]], Tokenized]


class RowTokenizer:
    """Turns rows into samples of token ids; made once for all splits and sources.

    Args:
        tokenizer: the model's.
        max_seq_length: in tokens; longer samples are cut.
        mask_prompt: None: wherever the rows have a prompt.
        embeddings: how many token ids the model has; None where that is not known.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        max_seq_length: int,
        mask_prompt: bool | None,
        embeddings: int | None = None,
    ):
        self.tokenizer, self._max_seq_length = tokenizer, max_seq_length
        self._mask_prompt, self._embeddings = mask_prompt, embeddings
        # Looked up once: through the wrapper it takes as long as a row's few tokens.
        self._plain = tokenizer._tokenizer
        self._begin, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer) if tokenizer.has_chat_template else None

    def split(
        self, rows: Sequence[tuple[int, Any]], where: str, format: str | None = None
    ) -> Split:
        """All rows of a split as samples; the first row decides on the format, as in mlx-lm.

        Args:
            rows: with their numbers.
            where: what they are numbered in, such as "DIR/train.jsonl, line".
            format: of ``formats.FORMATS``, through which the rows go first; None: what the first
                row shows that it is.

        Raises:
            UserError: rows are not right; they are named, up to ``MOST_FAULTS`` of them.
        """
        faults = Faults(where)
        first = rows[0][1]
        format = format or recognised_format(first)
        if format:
            rows = _formatted(rows, format, self._template is not None, faults)
            first = rows[0][1]
        keys = _keys_of(first)
        if self._mask_prompt and keys == ("text",):
            raise UserError("--mask-prompt needs rows with a prompt; rows with 'text' have none")
        mask_prompt = keys != ("text",) if self._mask_prompt is None else self._mask_prompt
        process, split = self._process(keys), Split(where=where)
        ends: set[str] = set()
        warned: dict[str, list[int]] = {}
        for number, row in rows:
            if fault := _fault(row, keys):
                faults.add(number, fault)
                continue
            try:
                made = process(row)
            except NotLocatedError as error:
                faults.add(number, f" cannot be masked with certainty: {error}")
                continue
            except MalformedRowError as error:
                faults.add(number, str(error))
                continue
            except Exception as error:  # a chat template may raise anything
                fault = refusal(row.get("messages", ()), error)
                faults.add(number, f" is refused by the chat template: {fault}")
                continue
            if fault := self._unknown_token(made):
                faults.add(number, fault)
                continue
            ends |= set(made.ends)
            for sentence in dict.fromkeys(made.warnings):
                warned.setdefault(sentence, []).append(number)
            made = self._stopped(made)
            split.add(_sample(made, number, mask_prompt), self._max_seq_length)
        faults.raise_if_any()
        split.warnings.extend(_warnings(ends, self._template, self.tokenizer))
        split.warnings.extend(
            f"{where} {first_numbers(found)}: {sentence}" for sentence, found in warned.items()
        )
        return split

    def _process(self, keys: tuple[str, ...]) -> _Process:
        """What tokenizes a row with these keys."""
        if keys == ("text",):
            return self._text
        template = self._template
        if template is not None:
            return lambda row: _in_template(template, conversation_of(row))
        if keys == ("messages",):
            raise UserError(
                "rows with 'messages' need a tokenizer with a chat template, and the model has "
                "none; use rows with 'prompt' and 'completion' or a chat model"
            )
        return self._joined

    def _text(self, row: dict[str, Any]) -> Tokenized:
        """A text, all of it learnt, with the beginning token and the end token once each."""
        if not row["text"]:
            return Tokenized([], [], [])
        tokens = self._once(self._plain.encode(row["text"]))
        if self._end is not None and tokens[-1:] != [self._end]:
            tokens = [*tokens, self._end]
        return Tokenized(tokens, [True] * len(tokens), [])

    def _joined(self, row: dict[str, Any]) -> Tokenized:
        """Prompt, completion and end token, where there is no chat template (mlx-lm raises there).

        The two are tokenized apart, as they are when the model is asked: the prompt alone, and what
        follows grows token by token.
        """
        prompt = self._once(self._plain.encode(row["prompt"]))
        if prompt and prompt[-1] == self._end:
            prompt = prompt[:-1]
        completion = self._plain.encode(row["completion"], add_special_tokens=False)
        completion = completion + ([] if self._end is None else [self._end])
        counts = [False] * len(prompt) + [True] * len(completion)
        warnings = () if row["completion"].strip() else (_EMPTY,)
        return Tokenized(prompt + completion, counts, [], warnings)

    def _once(self, tokens: list[int]) -> list[int]:
        """Without a second beginning token, where the text began with one already."""
        begin = self._begin
        return tokens[1:] if begin is not None and tokens[:2] == [begin, begin] else tokens

    def _stopped(self, made: Tokenized) -> Tokenized:
        """With the end token after the last answer, where the template ends it with no token."""
        end = self._end
        if end is None or not made.ends or made.ends[-1] or not made.counts[-1]:
            return made
        return Tokenized([*made.tokens, end], [*made.counts, True], made.ends)

    def _unknown_token(self, made: Tokenized) -> str | None:
        """What is wrong with a row that has a token beyond the model's embeddings."""
        known = self._embeddings
        beyond = max(made.tokens, default=0)
        if known is None or beyond < known:
            return None
        text = self._plain.convert_ids_to_tokens(beyond)
        return (
            f": token {text!r} has id {beyond}, and the model has {known} embeddings; use the "
            "model's own tokenizer"
        )


def check_first_row(rows: Sequence[tuple[int, Any]], where: str, format: str | None = None) -> None:
    """Check a split's first row, which decides on the format, without a tokenizer.

    Raises:
        UserError: it has none of the keys that are trained on, or is no row of the format.
    """
    faults, first = Faults(where), rows[:1]
    if format := format or recognised_format(first[0][1]):
        first = _formatted(first, format, True, faults)
    if fault := _fault(first[0][1], _keys_of(first[0][1])):
        faults.add(first[0][0], fault)
    faults.raise_if_any()


def _formatted(
    rows: Sequence[tuple[int, Any]], format: str, chat: bool, faults: Faults
) -> list[tuple[int, Any]]:
    """Raw rows of a named format in the form that is tokenized."""
    made = []
    for number, row in rows:
        try:
            made.append((number, to_prompt(format, row, chat)))
        except ValueError as error:
            faults.add(number, f" is no row for --format {format}: {error}")
    faults.raise_if_any()
    if any("messages" in row for _, row in made):  # of Alpaca's rows, some have a history
        made = [
            (n, row if "messages" in row else {"messages": conversation_of(row).messages})
            for n, row in made
        ]
    return made


def _keys_of(row: Any) -> tuple[str, ...]:
    """The keys of the format that a row has; empty where it has none."""
    if not isinstance(row, dict):
        return ()
    return next((keys for keys in _KEYS if all(k in row for k in keys)), ())


def _fault(row: Any, keys: tuple[str, ...]) -> str | None:
    """What keeps a row from having the first row's keys, well filled; follows its number."""
    if not isinstance(row, dict):
        return " is not a JSON object"
    found = ", ".join(repr(str(k)) for k in row) or "nothing"
    if not keys:
        return (
            f" has {found}; it needs 'text', or 'prompt' and 'completion', or 'messages', or a "
            f"--format ({', '.join(FORMATS)}), or --prompt-column and --completion-column"
        )
    for key in keys:
        kind, name = (list, "a list") if key == "messages" else (str, "a text")
        if key not in row:
            return f" has no '{key}' (it has {found}), but the first row has it"
        if not isinstance(row[key], kind):
            return f": '{key}' is not {name} but {json.dumps(row[key], default=str)[:40]}"
    return None


def _in_template(template: ChatTemplate, conversation: Conversation) -> Tokenized:
    made = template.tokenize(conversation)
    if has_empty_answer(conversation):
        made = replace(made, warnings=(*made.warnings, _EMPTY))
    return made


def _sample(made: Tokenized, row: int, mask_prompt: bool) -> Sample:
    """What is learnt as a sample has it: from the first token that counts, but for gaps."""
    if not mask_prompt:
        return Sample(made.tokens, 1, row)
    learnt = intervals([False, *made.counts[1:]])  # the first token is never predicted
    if not learnt:
        return Sample(made.tokens, len(made.tokens), row)
    ends = [stop for _, stop in learnt]
    starts = [start for start, _ in learnt[1:]] + [len(made.tokens)]
    gaps = tuple(gap for gap in zip(ends, starts, strict=True) if gap[0] < gap[1])
    return Sample(made.tokens, learnt[0][0], row, gaps)


def _warnings(
    ends: set[str], template: ChatTemplate | None, tokenizer: TokenizerWrapper
) -> list[str]:
    """Warnings about how the template ends the assistant's turns."""
    if template is None or not ends:
        return []
    found = []
    if "" in ends:
        found.append(
            "the chat template ends an answer with no token that stops generation; "
            f"{tokenizer.eos_token or 'nothing, since there is no end token,'} is added at the "
            "end of rows that end with an answer, so that the model learns to stop"
        )
    strange = sorted(end for end in ends - template.stops if end)
    if strange and not ends & template.stops:
        found.append(
            f"the chat template ends answers with {' and '.join(strange)}, which is none of the "
            f"model's end tokens ({', '.join(sorted(template.stops)) or 'it has none'}), so "
            "generation will not stop there; add it to eos_token_id in generation_config.json"
        )
    return found
