"""Chatting with a run, and serving it."""

import io
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
from helpers.adapters import make_run, zero_one_cap
from helpers.commands import assert_one_sentence
from helpers.models import save_model
from mlx_lm import generate, stream_generate

import tlora_mlx
from tlora_mlx import load_adapter, read_run
from tlora_mlx.config.usage_options import ChatCommand
from tlora_mlx.errors import visible
from tlora_mlx.evaluation import conversing
from tlora_mlx.method.layers import adapters_off

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMANDS = (
    "/base asks the base model the same, /new starts over, Ctrl-C stops an answer, Ctrl-D ends."
)
HINT = f"Chat with the run; {COMMANDS}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    model_path = save_model(root / "model", chat_template=TEMPLATE)
    mixed = make_run(root / "mixed", model_path, zero_one_cap)
    return tlora_mlx.export_run(read_run(mixed), root / "run").directory


def test_a_chat(run, tlora_here, monkeypatch):
    """Both questions, the second with the first one's answer before it; and the base model's.

    The random model answers with control characters too: the next question has them as they are,
    the terminal as escapes.
    """
    loaded = load_adapter(run)

    def text(*turns):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return generate(loaded.model, loaded.tokenizer, prompt, max_tokens=6)

    first = text("Add 1.")
    second = text("Add 1.", first, "Add 2.")
    with adapters_off(loaded.model):
        base = text("Add 1.", first, "Add 2.")
    alone = text("Add 2.")
    assert len({second, base, alone}) == 3
    lines = "/base\nAdd 1.\n\nAdd 2.\n/base\n/help\n/new\nAdd 2.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    done = tlora_here("chat", run, "--max-tokens", 6)
    assert (done.returncode, done.stderr) == (0, "")
    asked = "ask something first; /base then shows the base model's answer"
    told = f"there is no command /help; {COMMANDS}"
    answers = [visible(answer, "\n\t") for answer in (first, second, base)]
    lines = [asked, *answers, told, visible(alone, "\n\t")]
    assert done.stdout == HINT + "\n".join(lines) + "\n"


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_a_turn_reads_what_is_new(family, tmp_path, monkeypatch):
    """The first turn is not read again, but where a state that cannot go back has read more."""
    model = save_model(tmp_path / "model", family, chat_template=TEMPLATE)
    run = make_run(tmp_path / "run", model, zero_one_cap)
    read, whole = [], []

    def recorded(model, tokenizer, prompt, *args, **options):
        read.append(len(prompt))
        for part in stream_generate(model, tokenizer, prompt, *args, **options):
            yield part
            if len(read) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(conversing, "stream_generate", recorded)
    session = conversing.ChatSession(ChatCommand(run=str(run), max_tokens=6))
    loaded, messages = load_adapter(run), []
    for turn in range(6):
        messages.append({"role": "user", "content": f"Add {turn}."})
        prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        expected = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=6)
        parts, found = session.answer(messages[-1]["content"]), []
        with suppress(KeyboardInterrupt):
            found.extend(parts)
        assert turn == 3 or "".join(found) == expected
        messages.append({"role": "assistant", "content": "".join(found)})
        whole.append(len(prompt))
    assert [read[0], read[4]] == [whole[0], whole[4]]  # the fourth turn was interrupted
    if family == "llama":
        rest = [turn for turn in range(6) if turn not in (0, 4)]
        assert all(read[i] <= whole[i] - whole[i - 1] for i in rest)
    assert "".join(session.base_answer())


def test_a_terminal(run, tlora_here, monkeypatch):
    """Ctrl-C stops an answer, and what was read of it is remembered; a paste is one message."""
    terminal, user = pty.openpty()
    stopped = []

    def shown(part, keep):
        stopped.append(part)
        if len(stopped) == 3:
            os.write(terminal, b"Add\n2.\n\x04\x04")  # pasted; then Ctrl-D
            raise KeyboardInterrupt
        return visible(part, keep)

    monkeypatch.setattr("tlora_mlx.chat.visible", shown)
    with os.fdopen(user) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        os.write(terminal, b"Add 1.\n")
        done = tlora_here("chat", run, "--max-tokens", 6)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = load_adapter(run)
    turns = ("user", "Add 1."), ("assistant", "".join(stopped[:3])), ("user", "Add\n2.")
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=6)
    assert "".join(stopped[3:]) == expected


@pytest.mark.parametrize("lines", ["caf\udce9\n", "Add 1.\n"])
def test_what_cannot_be_asked(run, tmp_path, tlora_here, monkeypatch, lines):
    """Bytes in a C locale, and what a template refuses: a sentence, and the chat goes on."""
    model = tmp_path / "model"
    shutil.copytree(read_run(run).model, model)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System?') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusing + TEMPLATE)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = ("--base-model", model, "--max-tokens", 2, "--system", "Be brief.")
    done = tlora_here("chat", run, *options)
    if lines == "Add 1.\n":
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.removeprefix(HINT).startswith(
            "the model's chat template refuses this conversation: System?; put the system message"
        )
    else:
        assert_one_sentence(done, 2, "standard input is not UTF-8 text")
    (model / "chat_template.jinja").write_text("{{ raise_exception('No.') }}")
    done = tlora_here("generate", run, "--base-model", model, "--prompt", "Add 1.")
    assert_one_sentence(done, 2, "the model's chat template refuses this conversation: No.")


def test_a_model_without_a_template(run_path, tlora_here):
    done = tlora_here("chat", run_path)
    assert_one_sentence(
        done, 2, f"has no chat template; use python -m tlora_mlx generate {run_path}"
    )


def test_serving(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tlora_mlx.serve", str(run), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    question = [{"role": "user", "content": "Add 1."}]
    asked = {"model": "default_model", "messages": question, "max_tokens": 6, "temperature": 0}
    body = json.dumps(asked).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    answer, end = None, time.monotonic() + 180
    try:
        while not answer and time.monotonic() < end:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except OSError:  # not up yet
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(60)
    loaded = load_adapter(run)
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    expected = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=6)
    assert answer["choices"][0]["message"]["content"] == expected
    assert 'model "default_model"' in (tmp_path / "log").read_text()


def test_an_address_that_is_taken(run, tlora_here):
    """mlx-lm's server would print a traceback, and go on without listening."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = tlora_here("serve", run, "--port", port)
        assert_one_sentence(done, 2, f"cannot listen on --host 127.0.0.1 --port {port}: Address al")
    done = tlora_here("serve", run, "--host", "a..b")
    assert_one_sentence(done, 2, "cannot listen on --host a..b --port 8080: ")


def test_what_cannot_be_served(model_path, tmp_path, tlora_here):
    earlier = make_run(tmp_path / "earlier", model_path, lambda i, shape: 1)
    done = tlora_here("serve", earlier)
    assert_one_sentence(done, 2, "written by an earlier build; write it anew with: python -m")
    done = tlora_here("serve", model_path)
    assert done.returncode == 2
