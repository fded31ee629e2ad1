"""Tiny models and data made on the spot, and the commands as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from families import COMMON, FAILS, FAMILIES, MULTIMODAL
from hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = ROOT / "examples"
ROWS = [
    {"prompt": f"Add {i} and {j}.\n", "completion": f"def add():\n    return {i} + {j}\n"}
    for i in range(6)
    for j in range(3)
]

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup has them ignore
# SIGHUP; and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Nothing in the tests may wait for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"


def tiny_tokenizer(vocab_size=300):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["completion"] for row in ROWS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_model(path, family="llama", dtype="float32", chat_template=None, **settings):
    """A random checkpoint of a family, as the Hub has it, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    tiny = (FAMILIES | FAILS)[family]
    config = AutoConfig.for_model(family, **{**COMMON, **tiny.settings, **settings})
    model_class = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    model = model_class.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        # Biases and norms of their own, not all 0 and 1; the Llama of most tests stays plain.
        if parameter.ndim == 1 and family != "llama":
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    as_on_the_hub(Path(path), family)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return Path(path)


def as_on_the_hub(path, family):
    """What the Hub's checkpoints have and transformers 5 leaves out, and the other way round."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | (FAMILIES | FAILS)[family].hub))
    if family == "gpt2":
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "model.safetensors")
        weights = {name.removeprefix("transformer."): weights[name] for name in weights}
        save_file(weights, path / "model.safetensors", {"format": "pt"})


def path_for_mlx(path, family):
    """Where mlx-lm finds the model: ``path``, but for gpt_oss a conversion beside it.

    The Hub's gpt_oss has experts in MXFP4, which transformers writes no more; mlx-lm reads those or
    its own names.
    """
    if family != "gpt_oss":
        return path
    from safetensors.torch import load_file, save_file

    beside = path.with_name(f"{path.name}-mlx")
    shutil.copytree(path, beside)
    weights = {}
    for name, weight in load_file(path / "model.safetensors").items():
        head, _, last = name.rpartition(".")
        if not head.endswith("mlp.experts"):
            weights[name] = weight
            continue
        if not last.endswith("_bias"):
            weight = weight.transpose(1, 2)  # (experts, in, out) there
        kind = "bias" if last.endswith("_bias") else "weight"
        parts = {"gate_proj": weight[:, ::2], "up_proj": weight[:, 1::2]}
        if last.startswith("down_proj"):
            parts = {"down_proj": weight}
        weights |= {f"{head}.{part}.{kind}": w.contiguous() for part, w in parts.items()}
    save_file(weights, beside / "model.safetensors", {"format": "pt"})
    return beside


def finds_every_wrong_write(export, tmp_path, monkeypatch, more_than, match, first=0):
    """Have ``export`` write into a directory with each of many blocks corrupted in turn.

    It must refuse each and leave nothing of it; it writes more blocks than ``more_than``.
    """
    from tlora_mlx import RunError, UserError
    from tlora_mlx.exporting.checkpoint import OpenFile

    write, calls = OpenFile.write, []
    monkeypatch.setattr(
        OpenFile, "write", lambda file, at, data: (calls.append(at), write(file, at, data))
    )
    export(tmp_path / "counted")
    assert len(calls) > more_than
    before = sorted(tmp_path.iterdir())
    for number in range(first, len(calls), len(calls) // 7):
        count = iter(range(len(calls)))

        def corrupted(file, at, data, count=count, number=number):
            if next(count) == number:
                data = data.reshape(-1).view(np.uint8).copy()
                data[-1] ^= 0x41  # sign and exponent of a float, a header's last byte
            write(file, at, data)

        monkeypatch.setattr(OpenFile, "write", corrupted)
        with pytest.raises((RunError, UserError), match=match) as error:
            export(tmp_path / "out")
        assert type(error.value) in (RunError, UserError)
        assert sorted(tmp_path.iterdir()) == before


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_jsonl(path / "train.jsonl", ROWS[:13])
    write_jsonl(path / "valid.jsonl", ROWS[13:])
    write_jsonl(path / "test.jsonl", ROWS[13:])
    return path


def tlora(*arguments, **popen):
    """Run ``python -m tlora_mlx.COMMAND …`` as a process of its own."""
    command, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, "-m", f"tlora_mlx.{command}", *rest],
        capture_output=True,
        text=True,
        timeout=240,
        **popen,
    )


@pytest.fixture
def tlora_here(capsys):
    """``tlora`` in this process, for cases that need no process of their own: no 3 s start."""

    def run(command, *arguments):
        capsys.readouterr()
        code = import_module(f"tlora_mlx.{command}").main(list(map(str, arguments)))
        output = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run


def quick_train(model, data, run, **options):
    """Train in this process with small settings; returns the run directory."""
    from tlora_mlx.config import TrainConfig
    from tlora_mlx.train import train

    settings = {"iters": 6, "rank": 4, "learning_rate": 1e-2, "batch_size": 4, **options}
    return train(TrainConfig(model=str(model), data=str(data), adapter_path=str(run), **settings))


@pytest.fixture(scope="session")
def run_path(model_path, data_path, tmp_path_factory):
    """A trained run on the tiny Llama."""
    return quick_train(model_path, data_path, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def hub_running():
    server = HubServer().start()
    yield server
    server.stop()


@pytest.fixture
def server(hub_running):
    hub_running.reset()
    return hub_running


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server as this process's Hub, with a token, an empty cache and no waiting."""
    from huggingface_hub import close_session, constants, hf_api

    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    close_session()
    yield server
    close_session()


def hub_environment(server, home, **others):
    """The environment of a process whose Hub the server is."""
    ours = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **others}
    return {**os.environ, **ours, "HF_HUB_OFFLINE": "0"}


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}
