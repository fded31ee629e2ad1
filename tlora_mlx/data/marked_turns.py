"""What counts where a chat template says it itself, by ``{% generation %}``."""

from __future__ import annotations

from tlora_mlx.data.chat_template import Renderer
from tlora_mlx.data.conversation import Conversation
from tlora_mlx.data.offsets import intervals


def by_marks(
    template: Renderer, conversation: Conversation
) -> tuple[list[int], list[bool], list[str]]:
    """Token ids, which of them count, and what ends each turn.

    Where the template marks the content alone, the token that ends the turn counts too: without it
    the model would not learn to stop.
    """
    tokens, counts, names = _marked(template, conversation)
    texts = [template.tokenizer.decode([token]) for token in tokens]
    closing, ends = template.stops, []
    for start, stop in intervals(counts):
        last = stop - 1
        while last > start and not texts[last].strip():
            last -= 1
        if template.special.match(names[last]):
            ends.append(names[last])
            continue
        behind = names[stop] if stop < len(names) and template.special.match(names[stop]) else ""
        if behind and behind not in closing:
            closing = closing | _behind_the_last(template, conversation)
        if behind in closing:
            counts[stop] = True
        ends.append(behind if behind in closing else "")
    return tokens, counts, ends


def _marked(
    template: Renderer, conversation: Conversation
) -> tuple[list[int], list[bool], list[str]]:
    """Token ids, which of them are within the marks, and their texts in the vocabulary."""
    plain = template.tokenizer._tokenizer
    made = plain.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens, counts = list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]
    return tokens, counts, plain.convert_ids_to_tokens(tokens)


def _behind_the_last(template: Renderer, conversation: Conversation) -> set[str]:
    """The token behind an answer that nothing follows, so that it begins no other message."""
    roles = [message["role"] for message in conversation.messages]
    until = len(roles) - roles[::-1].index("assistant")
    alone = conversation._replace(messages=conversation.messages[:until])
    _, counts, names = _marked(template, alone)
    _, stop = intervals(counts)[-1]
    return set(names[stop : stop + 1])
