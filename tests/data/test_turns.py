"""What counts, in the templates of today's models: each assistant's content and its end token."""

import json

import pytest
from helpers.models import tiny_tokenizer, write_jsonl
from helpers.templates import CHATML, QWEN3, QWEN35, TEMPLATES
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tlora_mlx.data import turns
from tlora_mlx.data.reading import load_data
from tlora_mlx.errors import UserError

USER, ASSISTANT, SYSTEM = (
    lambda text, role=role: {"role": role, "content": text}
    for role in ("user", "assistant", "system")
)
CALL = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def tokenizer_of(template, special=("<|im_start|>",), stops=("<|im_end|>",)):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *stops]})
    if "<think>" in template:  # by which mlx-lm knows that a model may think
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    return TokenizerWrapper(tokenizer, eos_token_ids=ids)


def named(name):
    return tokenizer_of(*TEMPLATES[name])


def split_of(tmp_path, rows, tokenizer, **options):
    rows = rows if isinstance(rows, list) else [rows]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return load_data(str(tmp_path), tokenizer, 2048, options.pop("mask_prompt", None), **options)[
        "train"
    ]


def learnt(tmp_path, row, tokenizer, **options):
    """The texts of the runs of tokens that count."""
    (sample,) = split_of(tmp_path, row, tokenizer, **options).samples
    texts, run = [], []
    for token, counts in [*zip(sample.tokens, sample.counts(), strict=True), (None, False)]:
        if counts:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_what_ends_it(tmp_path, name):
    row = {"prompt": "Is 3 above 2?", "completion": "Yes"}
    tokenizer = named(name)
    (text,) = learnt(tmp_path, row, tokenizer)
    assert text.strip() == f"Yes{TEMPLATES[name][2][0]}"
    (sample,) = split_of(tmp_path, row, tokenizer).samples
    rendered = tokenizer.apply_chat_template(
        [USER("Is 3 above 2?"), ASSISTANT("Yes")], tokenize=True
    )
    assert sample.tokens == rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_assistant_turns_count(tmp_path, name):
    messages = [USER("add 1 and 2"), ASSISTANT("3"), USER("add 1"), ASSISTANT("It is 4.")]
    texts = learnt(tmp_path, {"messages": messages}, named(name))
    end = TEMPLATES[name][2][0]
    first = "<|end|>" if name == "gpt_oss" else end
    assert [text.strip() for text in texts] == [f"3{first}", f"It is 4.{end}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_that_occurs_elsewhere_and_has_spaces_around_it(tmp_path, name):
    """The same words in the question, in another answer, and in the template."""
    messages = [USER("user 3"), ASSISTANT("3"), USER("assistant"), ASSISTANT(" assistant\n")]
    texts = learnt(tmp_path, {"messages": messages}, named(name))
    assert [text.split("<")[0].strip() for text in texts] == ["3", "assistant"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_that_ends_with_the_user(tmp_path, name):
    messages = [USER("Hi"), ASSISTANT("Ho"), USER("And?")]
    (text,) = learnt(tmp_path, {"messages": messages}, named(name))
    assert text.strip().startswith("Ho<")


def test_thinking_that_is_dropped_from_earlier_turns(tmp_path):
    """Qwen3's own: only what is left of them can be learnt; the last turn's thinking is."""
    messages = [
        USER("1+1?"),
        ASSISTANT("<think>\nOne and one.\n</think>\n\n2"),
        USER("2+2?"),
        ASSISTANT("<think>\nTwo and two.\n</think>\n\n4"),
    ]
    row = {"messages": messages}
    last = "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    assert learnt(tmp_path, row, tokenizer_of(QWEN3)) == ["2<|im_end|>", last]
    # Qwen3.5's generation prompt has opened the block.
    last = last.removeprefix("<think>\n")
    assert learnt(tmp_path, row, tokenizer_of(QWEN35)) == ["2<|im_end|>", last]
    # DeepSeek-R1's template drops all of it.
    assert learnt(tmp_path, row, named("deepseek_r1")) == [
        "\n\n2<｜end▁of▁sentence｜>",
        "\n\n4<｜end▁of▁sentence｜>",
    ]


def test_reasoning_in_a_field_of_its_own(tmp_path):
    answer = {**ASSISTANT("4"), "reasoning_content": "Two and two."}
    row = {"messages": [USER("2+2?"), answer]}
    text = "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    assert learnt(tmp_path, row, tokenizer_of(QWEN3)) == [text]
    assert learnt(tmp_path, row, tokenizer_of(QWEN35)) == [text.removeprefix("<think>\n")]


def test_reasoning_that_a_template_does_not_show_is_a_warning(tmp_path):
    earlier = {**ASSISTANT("2"), "reasoning_content": "One and one."}
    shown = {"messages": [USER("1+1?"), earlier, USER("2+2?"), ASSISTANT("4")]}
    hidden = {"messages": [USER("2+2?"), {**ASSISTANT("4"), "reasoning_content": "Two and two."}]}
    # Qwen3 drops the reasoning of earlier answers, as it was trained.
    assert not split_of(tmp_path, shown, tokenizer_of(QWEN3)).warnings
    assert not split_of(tmp_path, hidden, tokenizer_of(QWEN3)).warnings
    (warning,) = split_of(tmp_path, hidden, named("chatml")).warnings
    assert "line 1: the chat template shows nothing of 'reasoning_content'" in warning


@pytest.mark.parametrize("template", [QWEN3, QWEN35])
@pytest.mark.parametrize("arguments", ['{"a": 1, "b": 2}', {"a": 1, "b": 2}])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_in_openais_form(tmp_path, template, arguments, content):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        USER("1+2?"),
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        ASSISTANT("It is 3."),
    ]
    texts = learnt(tmp_path, {"messages": messages, "tools": [ADD]}, tokenizer_of(template))
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    assert texts == [called, "It is 3.<|im_end|>"]


def test_a_template_that_marks_the_turns_is_taken_at_its_word(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [USER("Hi"), ASSISTANT("Ho"), USER("And?"), ASSISTANT("No.")]
    tokenizer = tokenizer_of(template)
    assert learnt(tmp_path, {"messages": messages}, tokenizer) == ["Ho<|im_end|>", "No.<|im_end|>"]
    assert not split_of(tmp_path, {"messages": messages}, tokenizer).warnings


@pytest.mark.parametrize(
    ("inside", "after", "text"),
    [
        ("m['content'] + '<|im_end|>\n'", "", "Ho<|im_end|>\n"),  # LFM2.5, TRL's templates
        ("m['content']", "{{ '<|im_end|>\n' }}", "Ho<|im_end|>"),
    ],
)
def test_marked_turns_end_with_their_token_once(tmp_path, inside, after, text):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ " + inside + " }}{% endgeneration %}"
        + after + "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )  # fmt: skip
    tokenizer = tokenizer_of(template)
    split = split_of(tmp_path, {"prompt": "Hi", "completion": "Ho"}, tokenizer)
    assert learnt(tmp_path, {"prompt": "Hi", "completion": "Ho"}, tokenizer) == [text]
    assert tokenizer.decode(split.samples[0].tokens).count("<|im_end|>") == 2
    assert not split.warnings


def test_an_assistant_that_begins_does_not_make_the_prompt_count(tmp_path):
    """No prompt comes before the first message, be it with thoughts or with calls."""
    tokenizer = tokenizer_of(QWEN3)
    messages = [ASSISTANT("Close it with </think>."), USER("ok"), ASSISTANT("Yes")]
    texts = learnt(tmp_path, {"messages": messages}, tokenizer)
    assert "<|im_start|>" not in "".join(texts)
    assert texts[-1].endswith("Yes<|im_end|>")
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    result = {"role": "tool", "content": "3"}
    messages = [call, result, ASSISTANT("It is 3."), USER("ok"), ASSISTANT("Yes")]
    texts = learnt(tmp_path, {"messages": messages, "tools": [ADD]}, tokenizer)
    assert texts[0].startswith("<tool_call>")
    assert texts[0].endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize("space", ["\n", ""])
def test_an_empty_thinking_block_is_the_templates(tmp_path, space):
    """GLM-4.5 and Nemotron put one where thoughts of earlier turns were."""
    block = f"('<think></think>{space}' if m['role'] == 'assistant' else '')"
    template = CHATML.replace("m['content'] + '<|im_end|>", f"{block} + m['content'] + '<|im_end|>")
    assert template != CHATML
    messages = [USER("a"), {**ASSISTANT("b"), "reasoning_content": "r"}, USER("c"), ASSISTANT("d")]
    texts = learnt(tmp_path, {"messages": messages}, tokenizer_of(template))
    assert texts == ["b<|im_end|>", "d<|im_end|>"]


def test_calls_that_the_template_does_not_show_are_refused(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    row = {"messages": [USER("1+2?"), call, USER("And?"), ASSISTANT("3")]}
    marked = CHATML.replace(
        "m['content']", "'' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ ''"
    )
    for template in (CHATML, marked):
        with pytest.raises(
            UserError, match="with certainty: the template does not show tool_calls"
        ):
            split_of(tmp_path, row, tokenizer_of(template))
    first_only = CHATML.replace(
        "m['content']",
        "(m['tool_calls'][0]['function']['arguments'] | tojson if m['tool_calls'] else "
        "m['content'])",
    )
    assert learnt(tmp_path, row, tokenizer_of(first_only))[0] == '{"a": 1, "b": 2}<|im_end|>'
    call["tool_calls"] *= 2
    with pytest.raises(UserError, match="the template does not show all tool_calls"):
        split_of(tmp_path, row, tokenizer_of(first_only))


def test_steps_whose_thinking_is_dropped_once_another_question_follows(tmp_path):
    """An agent's conversation: no step begins with the prompt that it answered."""
    call = {"type": "function", "function": CALL}
    step = {"role": "assistant", "reasoning_content": "Let me add.", "tool_calls": [call]}
    result = {"role": "tool", "content": "3"}
    messages = [USER("1+2?"), step, result, step, result, ASSISTANT("3"), USER("b"), ASSISTANT("c")]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    texts = learnt(tmp_path, {"messages": messages}, tokenizer_of(QWEN3))
    assert texts[:2] == [called, called]
    assert [text.split("</think>")[-1].strip() for text in texts[2:]] == [
        "3<|im_end|>",
        "c<|im_end|>",
    ]


def test_tools_shown_before_the_last_question(tmp_path):
    """Mistral: no earlier turn's prompt begins the conversation."""
    template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{% if tools and loop.index0 >= messages | length - 2 %}"
        "{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}{{ '[INST]' + m['content'] }}[/INST]"
        "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS]' }}{% for call in m['tool_calls'] %}"
        "{{ call.function | tojson }}{% endfor %}{{ '</s>' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    messages = [USER("1+2?"), call, {"role": "tool", "content": "3"}, ASSISTANT("It is 3."),
                USER("b"), ASSISTANT("c")]  # fmt: skip
    tokenizer = tokenizer_of(template, ["[INST]", "[/INST]", "[TOOL_CALLS]"], ["</s>"])
    texts = learnt(tmp_path, {"messages": messages, "tools": [ADD]}, tokenizer)
    assert texts[0].startswith('[TOOL_CALLS]{"name": "add"')
    assert [text.strip() for text in texts[1:]] == ["It is 3.</s>", "c</s>"]


def test_a_template_that_wants_the_arguments_as_text(tmp_path):
    """DeepSeek V3's."""
    template = CHATML.replace(
        "m['content'] + '<|im_end|>",
        "m['content'] + (m['tool_calls'][0]['function']['arguments'] + '!' if m['tool_calls'] else "
        "'') + '<|im_end|>",
    )
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    messages = [USER("1+2?"), call, USER("b"), ASSISTANT("c")]
    texts = learnt(tmp_path, {"messages": messages}, tokenizer_of(template))
    assert texts == ['{"a": 1, "b": 2}!<|im_end|>', "c<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "special", "stop", "ends"),
    [
        # Command R7B: the stop token comes after another special token.
        ("{{ m['content'] }}<|END_RESPONSE|><|END|>", "<|END_RESPONSE|>", "<|END|>", None),
        # GLM: the next message's beginning stops generation.
        ("{{ m['content'] + ' Bye' }}", "<|user|>", "<|user|>", " Bye<|user|>"),
    ],
)
def test_the_token_that_stops_generation_counts(tmp_path, template, special, stop, ends):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['role'] == 'assistant' %}" + template + "{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_of(template, [special, "<|assistant|>"], [stop])
    messages = [USER("a"), ASSISTANT("b"), USER("c"), ASSISTANT("d")]
    texts = learnt(tmp_path, {"messages": messages}, tokenizer)
    assert texts[0] == "b" + (ends or f"{special}{stop}")


def test_the_next_messages_beginning_is_no_end(tmp_path):
    """Where only the last turn has an end token, nothing says where the others end."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{{ '</s>' }}"
    )
    tokenizer = tokenizer_of(template, ["<|user|>", "<|assistant|>"], ["</s>"])
    row = {"messages": [USER("q"), ASSISTANT("one"), USER("r"), ASSISTANT("three")]}
    with pytest.raises(UserError, match="no end token follows it"):
        split_of(tmp_path, row, tokenizer)


def test_spaces_that_the_tokenizer_gives_no_characters_count(tmp_path):
    """GPT-NeoX's and OLMo's tokenizers trim the ranges: tokens of spaces alone have none."""
    from tokenizers.processors import ByteLevel

    row = {"prompt": "a", "completion": "def f():\n\n    return 1\n\n\nx = 2"}
    tokenizer = named("chatml")
    expected = learnt(tmp_path, row, tokenizer)
    tokenizer._tokenizer._tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert learnt(tmp_path, row, tokenizer) == expected == [row["completion"] + "<|im_end|>"]


def test_what_cannot_be_located_is_refused_by_line(tmp_path):
    """A template that writes in capitals: nothing says what the answer's tokens are."""
    shouting = CHATML.replace("m['content']", "m['content'] | upper")
    rows = [{"prompt": "a", "completion": "B"}, {"prompt": "a", "completion": "no"}]
    with pytest.raises(UserError, match=r"line 2 cannot be masked with certainty: the template"):
        split_of(tmp_path, rows, tokenizer_of(shouting))
    backwards = tokenizer_of(CHATML.replace("in messages", "in messages | reverse"))
    messages = [USER("Hi"), ASSISTANT("Ho"), USER("And?"), ASSISTANT("No.")]
    with pytest.raises(UserError, match="two assistant turns overlap"):
        split_of(tmp_path, {"messages": messages}, backwards)


def test_without_a_mask_all_counts(tmp_path):
    row = {"messages": [USER("Hi"), ASSISTANT("Ho")]}
    (sample,) = split_of(tmp_path, row, named("chatml"), mask_prompt=False).samples
    assert sample.counts().tolist() == [False, *[True] * (len(sample.tokens) - 1)]


def test_parts_of_text_are_joined_and_others_refused(tmp_path):
    parts = [{"type": "text", "text": "add 1 "}, {"type": "text", "text": "and 2"}]
    row = {"messages": [{"role": "user", "content": parts}, ASSISTANT("3")]}
    (sample,) = split_of(tmp_path, row, named("chatml")).samples
    assert "user\nadd 1 and 2<" in named("chatml").decode(sample.tokens)
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(UserError, match=r"line 1, message 1 has a part of type 'image_url'"):
        split_of(tmp_path, row, named("chatml"))
    row = {"messages": [{"role": "user", "content": "a"}, ASSISTANT("3")], "images": []}
    assert len(split_of(tmp_path, row, named("chatml"))) == 1
    with pytest.raises(UserError, match=r"line 1 has 'images'; only text can be trained on"):
        split_of(tmp_path, row | {"images": ["a.png"]}, named("chatml"))


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "value": "add"}, r"line 1, message 1 has 'role', 'value', but no 'cont"),
        ({"role": "user", "content": None}, "message 1: 'content' is null; only a message with"),
        ({"role": "user", "content": 3}, "'content' is neither a text nor a list of parts"),
        ({"role": "user", "content": [3]}, "message 1 has a part of 3; only text"),
        ({"role": 1, "content": "a"}, "message 1: 'role' is not a text but 1"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "no function with a name"),
        ({"role": "assistant", "tool_calls": "x"}, "'tool_calls' is not a list of objects"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "the arguments of tool call 'f' are no JSON object",
        ),
        ({"content": "a"}, "'messages' is not a list of objects with 'role'"),
        ({"role": "gpt", "content": "a"}, "the role 'gpt', which chat templates call 'assistant'"),
        ({"role": "User", "content": "a"}, "the role 'User', which chat templates call 'user'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud83d"}'}]},
            "the arguments of tool call 'f' are no JSON object",
        ),
    ],
)
def test_messages_that_are_none(tmp_path, message, fault):
    with pytest.raises(UserError, match=fault) as error:
        split_of(tmp_path, {"messages": [message, ASSISTANT("3")]}, named("chatml"))
    assert "\n" not in str(error.value)


def test_a_system_message_that_is_refused(tmp_path):
    row = {"messages": [SYSTEM("Be brief."), USER("Hi"), ASSISTANT("Ho")]}
    with pytest.raises(UserError, match="System role not supported; put the system message's text"):
        split_of(tmp_path, row, named("gemma3"))
    assert learnt(tmp_path, row, named("chatml")) == ["Ho<|im_end|>"]


def test_all_faults_are_told_together_up_to_twenty(tmp_path):
    good = {"messages": [USER("Hi"), ASSISTANT("Ho")]}
    bad = {"messages": [{"role": "user"}, ASSISTANT("Ho")]}
    with pytest.raises(UserError) as error:
        split_of(tmp_path, [good, bad, good, {"messages": 3}, bad], named("chatml"))
    text = str(error.value)
    assert [f"line {n}" in text for n in range(1, 6)] == [False, True, False, True, True]
    assert "\n" not in text
    with pytest.raises(UserError) as error:
        split_of(tmp_path, [good, *[bad] * 50], named("chatml"))
    lines = ", ".join(map(str, range(3, 22)))
    assert f"line 2, message 1 has 'role', but no 'content' (also line {lines})" in str(error.value)
    assert str(error.value).endswith("there may be more")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{\n{"text": "b"}\n[\n')
    with pytest.raises(UserError, match=r"line 2 is not valid JSON.*; line 4 is not valid JSON"):
        load_data(str(tmp_path), named("chatml"), 2048, None)


def test_a_second_beginning_token_is_dropped(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer = TokenizerWrapper(tokenizer)
    for text in ("<bos>Once upon", "Once upon"):
        (sample,) = split_of(tmp_path, {"text": text}, tokenizer).samples
        assert tokenizer.decode(sample.tokens) == "<bos>Once upon<eos>"
        row = {"prompt": text, "completion": " a time"}
        (sample,) = split_of(tmp_path, row, tokenizer).samples
        assert tokenizer.decode(sample.tokens) == "<bos>Once upon a time<eos>"


def test_an_end_token_that_the_tokenizer_adds_is_there_once(tmp_path):
    """At the end, and not between prompt and completion."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    rows = [{"text": "Once upon a time"}], [{"prompt": "Once upon", "completion": " a time"}]
    for row in rows:
        (sample,) = split_of(tmp_path, row, TokenizerWrapper(tokenizer)).samples
        assert tokenizer.decode(sample.tokens) == "Once upon a time<eos>"


def test_a_template_without_an_end_gets_one_and_a_warning(tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    tokenizer = tokenizer_of(template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = [USER("Hi"), ASSISTANT("Ho"), USER("And?"), ASSISTANT("No.")]
    split = split_of(tmp_path, {"messages": messages}, tokenizer)
    assert tokenizer.decode(split.samples[0].tokens).endswith("No.\n<eos>")
    assert split.samples[0].counts()[-1]
    assert len(split.warnings) == 1
    assert "no token that stops generation; <eos> is added at the end" in split.warnings[0]
    # What a user says after the last answer is no part of it.
    texts = learnt(tmp_path, {"messages": messages[:3]}, tokenizer)
    assert texts == ["Ho\n"]


def test_an_end_that_does_not_stop_generation_is_warned_of(tmp_path):
    tokenizer = tokenizer_of(CHATML, ["<|im_start|>", "<|im_end|>"], [])
    (warning,) = split_of(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer).warnings
    assert "ends answers with <|im_end|>, which is none of the model's end tokens" in warning
    assert not split_of(tmp_path, {"prompt": "a", "completion": "b"}, named("chatml")).warnings


def test_ids_beyond_the_models_embeddings_are_refused(tmp_path):
    tokenizer = named("chatml")
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(UserError, match=r"line 1: token '<\|im_.*' has id \d+, and the model has"):
        split_of(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer, embeddings=token)
    row = {"prompt": "a", "completion": "b"}
    assert len(split_of(tmp_path, row, tokenizer, embeddings=token + 1)) == 1


def test_alpaca_and_sharegpt_without_a_word(tmp_path):
    tokenizer = named("chatml")
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert learnt(tmp_path, alpaca, tokenizer) == ["3<|im_end|>"]
    said = [("human", "Hi"), ("gpt", "Ho"), ("human", "And?"), ("gpt", "No.")]
    share = {"conversations": [{"from": who, "value": text} for who, text in said], "system": "S"}
    (sample,) = split_of(tmp_path, share, tokenizer).samples
    assert tokenizer.decode(sample.tokens).startswith("<|im_start|>system\nS<|im_end|>")
    assert learnt(tmp_path, share, tokenizer) == ["Ho<|im_end|>", "No.<|im_end|>"]


def test_columns_of_any_name(tmp_path):
    tokenizer = named("chatml")
    columns = {"question": "prompt", "reply": "completion"}
    row = {"question": "1+2?", "reply": "3", "prompt": "not this"}
    assert learnt(tmp_path, row, tokenizer, columns=columns) == ["3<|im_end|>"]
    with pytest.raises(UserError, match=r"line 1 has 'question', but no 'reply'"):
        split_of(tmp_path, {"question": "a"}, tokenizer, columns=columns)
    talk = {"talk": [USER("Hi"), ASSISTANT("Ho")]}
    assert learnt(tmp_path, talk, tokenizer, columns={"talk": "messages"}) == ["Ho<|im_end|>"]


@pytest.mark.parametrize(
    ("suffix", "fault"), [("csv", "is not UTF-8 text"), ("parquet", "cannot be read")]
)
def test_tables(tmp_path, suffix, fault):
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "1+2?", "completion": "three"}] * 3)
    getattr(table, f"to_{suffix}")(str(tmp_path / f"train.{suffix}"))
    data = load_data(str(tmp_path), named("chatml"), 2048, None)["train"]
    assert len(data) == 3
    assert data.where == f"{tmp_path}/train.{suffix}, row"
    (tmp_path / f"train.{suffix}").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=rf"train\.{suffix} {fault}"):
        load_data(str(tmp_path), named("chatml"), 2048, None)


def test_csv_cells_are_texts(tmp_path):
    """Numbers, zeros before them and NA are what they are written as."""
    answers = ["42", "007", "1.50", "NA", "null", "True", 'a, "b"\nc']
    quoted = ['"{}"'.format(answer.replace('"', '""')) for answer in answers]
    lines = ["prompt,completion", *(f"q,{answer}" for answer in quoted)]
    (tmp_path / "train.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    split = load_data(str(tmp_path), named("chatml"), 2048, None)["train"]
    texts = [named("chatml").decode(sample.tokens) for sample in split.samples]
    assert [text.split("assistant\n")[1].split("<")[0] for text in texts] == answers


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "prompt,completion\nq,a,note\nq,a\nq\n",
            r"row 1 has 3 cells, and .* has 2.*; row 3 has 1",
        ),
        ("prompt,prompt\nq,a\n", "more than one column 'prompt'"),
        ('prompt,completion\nq,"a"b\n', "cannot be read"),
        ("prompt,completion\n", "has no rows"),
    ],
)
def test_csv_that_is_no_table(tmp_path, text, fault):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=fault):
        load_data(str(tmp_path), named("chatml"), 2048, None)


def test_nulls_that_arrow_put_into_arguments_are_not_learnt(tmp_path):
    import datasets

    rows = [
        {
            "messages": [
                USER("q"),
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function",
                 "function": {"name": "f", "arguments": arguments}}]},
            ]
        }
        for arguments in ({"city": "Rome"}, {"a": 1})
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    tokenizer = tokenizer_of(QWEN3)
    split = load_data(str(tmp_path), tokenizer, 2048, None)["train"]
    texts = [tokenizer.decode(sample.tokens) for sample in split.samples]
    assert '"arguments": {"city": "Rome"}' in texts[0]
    assert '"arguments": {"a": 1}' in texts[1]


def test_half_a_character_is_refused_by_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl, line 2 has half of a character"):
        load_data(str(tmp_path), named("chatml"), 2048, None)


def test_sharegpt_with_a_speaker_that_is_no_name(tmp_path):
    row = {"conversations": [{"from": ["human"], "value": "x"}]}
    with pytest.raises(UserError, match=r"line 1 is no row .*: turn 1 is from \['human'\], not"):
        split_of(tmp_path, row, named("chatml"))


def test_a_tokenizer_that_does_not_know_its_characters(tmp_path, monkeypatch):
    """What is not "fast" is asked for the text of more and more tokens; to the same mask."""
    from transformers import PreTrainedTokenizerFast

    row = {"messages": [USER("Häuser?"), ASSISTANT("Ja, 家 🏠!")]}
    expected = learnt(tmp_path, row, named("qwen3"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert learnt(tmp_path, row, named("qwen3")) == expected == ["Ja, 家 🏠!<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_turns_are_found_by_one_more_rendering(tmp_path, monkeypatch, name):
    """As each is found by itself; so the time of a long conversation grows with its length."""
    texts = ["3", " spaces around\n", "", "same", "same", "Q3tlora"]
    messages = [m for text in texts for m in (USER("question"), ASSISTANT(text))]
    tokenizer, renderings = named(name), []
    render = turns.ChatTemplate.render
    monkeypatch.setattr(
        turns.ChatTemplate, "render", lambda *a, **k: renderings.append(1) or render(*a, **k)
    )
    found = learnt(tmp_path, {"messages": messages}, tokenizer)
    assert len(renderings) == 2 or name == "gpt_oss"  # <|end|> alone does not stop generation
    looking_like_a_stand_in = [USER("Q3tlora"), *messages[1:]]
    assert learnt(tmp_path, {"messages": looking_like_a_stand_in}, tokenizer) == found
    monkeypatch.setattr(turns, "places_of", lambda *_: [])
    assert learnt(tmp_path, {"messages": messages}, tokenizer) == found


CALLING = CHATML.replace(
    "m['content'] + '<|im_end|>",
    "(('to=' + m['tool_calls'][0]['function']['name'] + m['tool_calls'][0]['function']['arguments']"
    " | tojson) if m['tool_calls'] else m['content']) + '<|im_end|>",
)


def test_what_the_template_does_not_show_is_a_warning(tmp_path):
    """Llama 3 drops the content beside calls, Qwen3 unknown roles, SmolLM2 the tools."""
    step = {**ASSISTANT("I add."), "tool_calls": [{"type": "function", "function": CALL}]}
    messages = [USER("1+2?"), step, {"role": "tool", "content": "3"}, ASSISTANT("It is 3.")]
    row = {"messages": messages, "tools": [ADD]}
    tokenizer = tokenizer_of(CALLING)
    assert learnt(tmp_path, row, tokenizer)[0] == 'to=add{"a": 1, "b": 2}<|im_end|>'
    (content,) = split_of(tmp_path, row, tokenizer).warnings
    assert "line 1: the chat template does not show the content of a message before its" in content
    assert not split_of(tmp_path, row, tokenizer_of(QWEN3)).warnings
    multiply = {"type": "function", "function": {"name": "multiply"}}
    row = {"messages": [USER("a"), ASSISTANT("b")], "tools": [multiply]}
    (tools,) = split_of(tmp_path, row, named("smollm2")).warnings
    assert "shows nothing of 'tools', so the model does not see them" in tools
    known = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'developer'")
    row = {"messages": [{"role": "developer", "content": "Be brief."}, USER("a"), ASSISTANT("b")]}
    (role,) = split_of(tmp_path, row, tokenizer_of(known)).warnings
    assert "does not show all messages of role 'developer'" in role
    assert not split_of(tmp_path, row, named("chatml")).warnings


def test_calls_whose_result_names_them_and_that_no_content_may_stand_beside(tmp_path):
    """GPT-OSS: the result's header has the call's name; thoughts and content are refused."""
    template = (
        "{% set ns = namespace(call=0) %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' and m['tool_calls'] %}"
        "{% if m['content'] and m['thinking'] %}{{ raise_exception('both') }}{% endif %}"
        "{{ '<|start|>assistant' }}{% set ns.call = m['tool_calls'][0]['function'] %}"
        "{{ ' to=' + ns.call['name'] + '<|message|>' + ns.call['arguments'] | tojson }}"
        "{{ '<|call|>' }}"
        "{% elif m['role'] == 'tool' %}{{ '<|start|>' + ns.call['name'] + '<|message|>' }}"
        "{{ m['content'] + '<|end|>' }}{% else %}"
        "{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    tokenizer = tokenizer_of(
        "{% set ns = namespace(call=0) %}" + template, *TEMPLATES["gpt_oss"][1:]
    )
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    result = {"role": "tool", "content": "3"}
    for step in (call, {**call, "thinking": "Let me add."}):
        row = {"messages": [USER("1+2?"), step, result, ASSISTANT("3")]}
        called = ' to=add<|message|>{"a": 1, "b": 2}<|call|>'
        assert learnt(tmp_path, row, tokenizer) == [called, "3<|return|>"]
        assert not split_of(tmp_path, row, tokenizer).warnings


def test_content_that_the_template_puts_behind_the_result(tmp_path):
    """Gemma 4: generation has stopped at the calls, so that the content there is not learnt."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}"
        "{{ '<|result>' + m['content'] + '<result|>' + messages[loop.index0 - 1]['content'] }}"
        "{{ '<turn|>' }}{% elif m['tool_calls'] %}{{ '<|turn>model\n<|call>' }}"
        "{{ m['tool_calls'][0]['function']['arguments'] | tojson }}"
        "{% else %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of(template, ["<|turn>", "<|call>"], ["<|result>", "<turn|>"])
    step = {**ASSISTANT("I add."), "tool_calls": [{"type": "function", "function": CALL}]}
    row = {"messages": [USER("1+2?"), step, {"role": "tool", "content": "3"}, ASSISTANT("So 3.")]}
    texts = learnt(tmp_path, row, tokenizer)
    assert texts == ['<|call>{"a": 1, "b": 2}<|result>', "So 3.<turn|>"]
    (warning,) = split_of(tmp_path, row, tokenizer).warnings
    assert "so the calls alone are learnt" in warning


def test_the_token_behind_marks_is_no_other_messages_beginning(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}END"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    messages = [USER("a"), ASSISTANT("b"), USER("c"), ASSISTANT("d"), USER("e")]
    special = ["<|user|>", "<|assistant|>", "<|close|>"]
    for end, ends in (("", ""), ("<|close|>", "<|close|>")):
        tokenizer = tokenizer_of(template.replace("END", end), special)
        assert learnt(tmp_path, {"messages": messages}, tokenizer) == [f"b{ends}", f"d{ends}"]


@pytest.mark.parametrize("marks", [False, True])
def test_turns_of_weight_0_are_context(tmp_path, marks):
    """OpenAI's form."""
    template = CHATML.replace(
        "m['content']",
        "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ ''",
    )
    tokenizer = tokenizer_of(template if marks else CHATML)
    messages = [USER("a"), {**ASSISTANT("b"), "weight": 0}, USER("c"), ASSISTANT("d")]
    assert learnt(tmp_path, {"messages": messages}, tokenizer) == ["d<|im_end|>"]
    messages[1]["weight"] = 0.5
    with pytest.raises(UserError, match=r"line 1, message 2: 'weight' is not 0 or 1 but 0\.5"):
        split_of(tmp_path, {"messages": messages}, tokenizer)


def test_openais_former_function_calls(tmp_path):
    called = {"role": "assistant", "content": None, "function_call": CALL}
    result = {"role": "function", "name": "add", "content": "3"}
    messages = [USER("1+2?"), called, result, ASSISTANT("It is 3.")]
    texts = learnt(tmp_path, {"messages": messages}, tokenizer_of(QWEN3))
    assert '{"name": "add", "arguments": {"a": 1, "b": 2}}' in texts[0]
    assert "<|im_start|>tool\n3" in tokenizer_of(QWEN3).decode(
        split_of(tmp_path, {"messages": messages}, tokenizer_of(QWEN3)).samples[0].tokens
    )


@pytest.mark.parametrize(
    ("row", "rendered"),
    [
        ({"system": "S", "history": [["q", "a"]]}, "S|q|a⟧|Add.\n\n1 2|3⟧"),
        ({"text": "all of it", "history": []}, "Add.\n\n1 2|3⟧"),  # as tatsu-lab/alpaca has it
    ],
)
def test_alpaca_with_more_columns(tmp_path, row, rendered):
    template = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"
    template = template.replace("'|'", "('⟧|' if m['role'] == 'assistant' else '|')")
    row |= {"instruction": "Add.", "input": "1 2", "output": "3"}
    tokenizer = tokenizer_of(template)
    (sample,) = split_of(tmp_path, row, tokenizer, mask_prompt=False).samples
    assert tokenizer.decode(sample.tokens).startswith(rendered)
    plain = {"instruction": "Add.", "output": "3"}
    assert len(split_of(tmp_path, [plain, row], tokenizer)) == 2


def test_sharegpt_with_tools(tmp_path):
    """LLaMA-Factory's: calls and results are turns of their own; the tools are JSON."""
    said = [("human", "1+2?"), ("function_call", json.dumps(CALL)), ("observation", "3")]
    row = {"conversations": [{"from": who, "value": text} for who, text in [*said, ("gpt", "3!")]]}
    row["tools"] = json.dumps([ADD])
    texts = learnt(tmp_path, row, tokenizer_of(QWEN3))
    assert '{"name": "add", "arguments": {"a": 1, "b": 2}}' in texts[0]
    assert texts[1].endswith("3!<|im_end|>")
    row["conversations"][1]["value"] = "add(1, 2)"
    with pytest.raises(UserError, match="turn 2 is a function_call, but no JSON"):
        split_of(tmp_path, row, tokenizer_of(QWEN3))
