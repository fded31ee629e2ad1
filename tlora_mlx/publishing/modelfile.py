"""Ollama's Modelfile beside a GGUF model: its chat template, stop tokens and sampling.

Sources: ollama/ollama ``docs/modelfile.mdx`` and ``docs/template.mdx``. A template in Go's language
is derived from the tokenizer's by rendering conversations and taking them apart; it is written only
if putting the parts together gives the tokenizer's own renderings again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlora_mlx.merging.gguf_model import MODEL
from tlora_mlx.models.model_directory import MODEL_FILES, find_model
from tlora_mlx.models.tokenizer import load_tokenizer
from tlora_mlx.storage.files import read_json, write_text
from tlora_mlx.storage.foreign import file_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
GENERATION = "generation_config.json"

# From generation_config.json to Ollama's parameters.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_SYSTEM, _USER, _ANSWER, _AGAIN = "⟦system⟧", "⟦user⟧", "⟦answer⟧", "⟦again⟧"


def write_modelfile(directory: Path, base_model: str) -> None:
    """Write ``Modelfile`` beside ``model.gguf``.

    Args:
        directory: the export.
        base_model: the model that it was made from, a directory or Hub repository.

    Raises:
        RunError: it could not be written.
    """
    _, path = find_model(base_model, MODEL_FILES)
    tokenizer = load_tokenizer(base_model).tokenizer
    inner = tokenizer._tokenizer
    lines = [f"FROM ./{MODEL}"]
    if template := ollama_template(inner):
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# The chat template could not be translated; Ollama uses that of the GGUF.")
    ends = sorted(tokenizer.eos_token_ids)
    lines += [f'PARAMETER stop "{text}"' for text in inner.convert_ids_to_tokens(ends)]
    settings: dict[str, Any] = {}
    if (path / GENERATION).exists():
        settings = read_json(file_in(path, GENERATION), "the model's generation settings")
    lines += [
        f"PARAMETER {theirs} {settings[ours]}"
        for ours, theirs in _PARAMETERS.items()
        if isinstance(settings.get(ours), (int, float))
    ]
    write_text(directory / MODELFILE, "\n".join(lines) + "\n")


class _Parts(NamedTuple):
    """What a chat template puts around messages; None where there can be no system message."""

    default: str
    before_system: str | None
    after_system: str | None
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    generation: str

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """A conversation, up to the answer to be generated."""
        around = {
            "system": (self.before_system or "", self.after_system or ""),
            "user": (self.before_user, self.after_user),
            "assistant": (self.before_answer, self.after_answer),
        }
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text + self.generation


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template in Ollama's form; None if it has none, or one too different.

    Tools and thinking are left out.
    """
    if not tokenizer.chat_template:
        return None
    try:
        parts = _taken_apart(tokenizer)
        if not _agrees(tokenizer, parts):
            return None
    except Exception:  # whatever a template raises, or a message that it changes
        return None
    default, system_before, system_after, *rest = (_literal(part) for part in parts)
    user_before, user_after, answer_before, answer_after, generation = rest
    roles = [
        ("user", f"{user_before}{{{{ .Content }}}}{user_after}"),
        ("assistant", f"{answer_before}{{{{ .Content }}}}{answer_after}"),
    ]
    if parts.before_system is not None:
        roles.insert(0, ("system", f"{system_before}{{{{ .Content }}}}{system_after}"))
    branches = "{{ else if ".join(f'eq .Role "{role}" }}}}{text}' for role, text in roles)
    first = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if parts.default else ""
    text = (
        f"{first}{{{{ range .Messages }}}}{{{{ if {branches}{{{{ end }}}}{{{{ end }}}}{generation}"
    )
    return None if '"""' in text else text


def _literal(part: str | None) -> str:
    return (part or "").replace("{{", '{{ "{{" }}')


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool = True
) -> str:
    """A conversation as text, without a first token that the tokenizer adds to every text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    # Ollama adds it too, as the GGUF says.
    adds = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds else text


def _messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    found = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return found if system is None else [{"role": "system", "content": system}, *found]


def _taken_apart(tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """What the template puts around each message.

    Raises:
        ValueError: a message's text is not in the rendering.
    """
    whole = _render(tokenizer, _messages(_USER, _ANSWER, _AGAIN))
    start, between, again, end = _around(whole, _USER, _ANSWER, _AGAIN)
    asked = _render(tokenizer, _messages(_USER), generation=False)
    generation = _render(tokenizer, _messages(_USER)).removeprefix(asked)
    answered = _render(tokenizer, _messages(_USER, _ANSWER), generation=False)
    after_answer = _around(answered, _USER, _ANSWER)[-1]
    after_user, before_user = end.removesuffix(generation), again.removeprefix(after_answer)
    before_system = after_system = None
    try:
        with_system = _render(tokenizer, _messages(_USER, system=_SYSTEM))
        before, after, _ = _around(with_system, _SYSTEM, _USER)
        if after.endswith(before_user):
            before_system, after_system = before, after.removesuffix(before_user)
    except Exception:  # a template that refuses the role
        pass
    return _Parts(
        start.removesuffix(before_user),
        before_system,
        after_system,
        before_user,
        after_user,
        between.removeprefix(after_user),
        after_answer,
        generation,
    )


def _around(text: str, *contents: str) -> list[str]:
    """What is before, between and after these contents, each of which the text has once.

    Raises:
        ValueError: it does not.
    """
    found = re.split("|".join(map(re.escape, contents)), text)
    if len(found) != len(contents) + 1:
        raise ValueError("a message is missing, or is there twice")
    return found


def _agrees(tokenizer: PreTrainedTokenizerBase, parts: _Parts) -> bool:
    """Whether the parts put together are what the tokenizer renders."""
    texts = ["Hello", "Hi there.", "How are you?", "Fine.", "Good!"]
    systems = [None, "Be brief."] if parts.before_system is not None else [None]
    return all(
        parts.rendered(messages) == _render(tokenizer, messages)
        for system in systems
        for messages in (_messages(*texts[:n], system=system) for n in (1, 3, 5))
    )
