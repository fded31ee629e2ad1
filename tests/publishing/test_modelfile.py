"""Ollama's Modelfile: its template renders what the tokenizer's own does."""

import re
from types import SimpleNamespace

import pytest
from helpers.models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from tlora_mlx.publishing.modelfile import ollama_template

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' }}"
    "{{ m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}} ' }}{% endif %}"
)
REWRITING = (  # drops all answers but the last
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
QUOTES = CHATML.replace("<|im_end|>", '"""')


def go(template, messages):
    """The little of Go's template language that our templates use."""
    tokens = re.split(r"(\{\{.*?\}\})", template.replace('{{ "{{" }}', "\0"))
    system = any(message["role"] == "system" for message in messages)

    def block(position, message, shown):
        text = ""
        while position < len(tokens):
            action = tokens[position].strip("{} ") if tokens[position].startswith("{{") else None
            if action is None:
                text += tokens[position] if shown else ""
            elif action == "if not .System":
                inner, position = block(position + 1, message, shown and not system)
                text += inner
            elif action == "range .Messages":
                start = position + 1
                for each in messages:
                    inner, position = block(start, each, shown)
                    text += inner
            elif role := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', action):
                if action.startswith("else"):
                    return text, position
                taken, found = False, True
                while found:
                    chosen = not taken and message["role"] == role[1]
                    inner, position = block(position + 1, message, shown and chosen)
                    text, taken = text + inner, taken or chosen
                    role = re.match(r'\{\{ else if eq \.Role "(\w+)"', tokens[position])
                    found = bool(role)
            elif action == ".Content":
                text += message["content"] if shown else ""
            else:
                assert action == "end"
                return text, position
            position += 1
        return text, position

    return block(0, None, True)[0].replace("\0", "{{")


CONVERSATIONS = [
    [("user", "Hello")],
    [("user", "One?"), ("assistant", "Two."), ("user", "Three?")],
    [("system", "Short."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")],
]


@pytest.mark.parametrize("chat_template", [CHATML, GEMMA, LLAMA3, BRACES])
def test_the_template_renders_the_same(chat_template):
    """Gemma's tokenizer adds the first token itself; SmolLM2's does not, where ChatML's is it."""
    tokenizer = tiny_tokenizer()
    first = "<bos>" if chat_template is GEMMA else "<|im_start|>"
    tokenizer.add_special_tokens({"bos_token": first})
    if chat_template is GEMMA:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = chat_template
    template = ollama_template(tokenizer)
    for turns in CONVERSATIONS[: 2 if chat_template is GEMMA else 3]:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go(template, messages) == text.removeprefix("<bos>")
    assert ('"system"' in template) == (chat_template is not GEMMA)


@pytest.mark.parametrize("chat_template", [None, REWRITING, QUOTES, "{{ nonsense.x.y }}"])
def test_no_template_rather_than_a_wrong_one(chat_template):
    tokenizer = SimpleNamespace(chat_template=None)
    if chat_template:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = chat_template
    assert ollama_template(tokenizer) is None
