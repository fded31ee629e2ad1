"""The commands in README and guide work: block by block, in order, on stand-ins.

What the guide shows of their output is what they print, but for figures and what is left out (…).

The models are served under the names that the documents use, by the loopback Hub; the data that
ships is cut short. ``tlora`` and Python run in this process, other commands in a shell.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from helpers.hub_server import hub_environment
from helpers.models import files_of, save_model, write_jsonl
from helpers.paths import EXAMPLE, ROOT

from tlora_mlx import cli
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import TrainConfig

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What needs a bare machine, or several.
ELSEWHERE = ("git clone", "scripts/", "pip install", "mlx.launch", "mlx.distributed_config")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files of the models that the documents name."""
    place = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    original = save_model(place / "original", "qwen3", chat_template=TEMPLATE, **sizes)
    four = place / "4bit"
    mlx_lm.convert(str(original), str(four), quantize=True, q_bits=4, q_group_size=32)
    (four / "README.md").write_text("---\nbase_model: Qwen/Qwen3-4B\nlicense: apache-2.0\n---\n")
    return {"Qwen/Qwen3-4B": original, "mlx-community/Qwen3-4B-4bit": four}


@pytest.fixture
def desk(models, hub, tmp_path, monkeypatch):
    """The directory that the commands run in: the repository's root, as for a user."""
    for name, path in models.items():
        hub.create(name, files=files_of(path))
    for split, rows in {"train": 12, "valid": 4, "test": 4}.items():
        lines = (EXAMPLE / f"data/{split}.jsonl").read_text().splitlines()
        short = [line for line in lines if len(line) < 400][:rows]
        write_jsonl(tmp_path / f"examples/data/{split}.jsonl", map(json.loads, short))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(text):
    """Language and contents of each block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def form(text):
    """An output without what another model changes: figures, and the widths of tables."""
    return " ".join(
        re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", text)
        .translate(dict.fromkeys(map(ord, "─█")))
        .split()
    )


def commands(text):
    """A bash block's commands, each on one line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_commands(text, hub, home, add=lambda words: [], expected=lambda words: 0):
    for line in commands(text):
        if line.startswith(ELSEWHERE):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "tlora":
            assert cli.main(words[1:] + add(words)) == expected(words), line
        else:
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            environment = {**hub_environment(hub, home), "PATH": path}
            subprocess.run(line, shell=True, check=True, env=environment, timeout=120)


def test_the_guide(desk, hub, monkeypatch, capfd):
    """The first training is interrupted, so that there is something to resume."""
    from tlora_mlx.training import loop

    evaluate, calls = loop.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:  # before the training: test, validation
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)

    def is_first(words):
        return "my-run" in words and words[1] == "train" and "--resume" not in words

    monkeypatch.setattr(sys, "argv", ["tlora"])
    short = ["--steps-per-eval", "3", "--steps-per-report", "2"]
    printed, shown = "", 0
    for language, text in blocks((ROOT / "docs/GUIDE.md").read_text()):
        if language == "python":
            exec(text, {})
        elif language == "bash":
            run_commands(
                text, hub, desk / "home",
                add=lambda words: short if is_first(words) else [],
                expected=lambda words: 130 if is_first(words) else 0,
            )  # fmt: skip
            printed += form(capfd.readouterr().out)
        else:
            for part in filter(None, map(form, re.split("…|\n", text))):
                assert part in printed, part
                shown += 1
    assert shown > 20
    assert json.loads(Path("plan-16.json").read_text())["rank"] == 16
    assert Path("my-run/checkpoints/0000006").is_dir()
    pushed = hub.repositories["ann/my-adapter"]
    assert pushed.private
    assert "adapter_model.safetensors" in pushed.files
    assert json.loads(Path("mixed/adapter_config.json").read_text())["r"] == 32


def test_the_readme_and_the_options(desk, hub, capfd):
    """The data set for the evaluation is replaced by a file of the same name."""
    shutil.copytree("examples/data", "my-data")
    rows = [{"question": f"{i} + 1?", "answer": f"{i} + 1\n#### {i + 1}"} for i in range(3)]
    write_jsonl(desk / "openai/gsm8k:main", rows)
    short = {"train": ["--iters", "3"], "evaluate": ["--max-tokens", "8"]}
    for document in ("README.md", "docs/OPTIONS.md"):
        if document == "docs/OPTIONS.md":
            shutil.copytree("my-adapter", "from-cuda")
        for language, text in blocks((ROOT / document).read_text()):
            if language == "bash":
                run_commands(text, hub, desk / "home", lambda words: short.get(words[1], []))
            elif language == "python":
                exec(text, {})
    assert json.loads(Path("both/adapter_config.json").read_text())["r"] == 32


def test_the_command_for_several_macs():
    """tests/test_distributed.py runs several processes; here it is what the launcher is given."""
    command = shlex.split(commands(blocks((ROOT / "docs/SEVERAL_MACS.md").read_text())[0][1])[0])
    _, module, *options = command[command.index("--") + 2 :]
    assert (command[0], module) == ("mlx.launch", "tlora_mlx.train")
    config = parse(TrainConfig, "tlora train", "", options)
    assert (config.adapter_path, config.batch_size) == ("/Users/me/my-run", 8)
    for language, text in blocks((ROOT / "docs/SEVERAL_MACS.md").read_text()):
        if language == "json":
            hosts = json.loads(text)
            assert len(hosts["hosts"] if isinstance(hosts, dict) else hosts) == 2
