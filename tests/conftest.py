"""Tiny models and data made on the spot, and the commands as a user runs them."""

import os
import signal
import subprocess
from importlib import import_module

import pytest

# Nothing in the tests may wait for a network that is not there; read when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# On an M5, MLX multiplies float32 with 10 bits of mantissa; the tests ask for more.
os.environ["MLX_ENABLE_TF32"] = "0"

from helpers.commands import quick_train
from helpers.hub_server import TOKEN, HubServer
from helpers.models import ROWS, save_model, write_jsonl

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup has them ignore
# SIGHUP; and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


@pytest.fixture
def tlora_here(capsys):
    """``tlora`` in this process, which saves the 3 s of starting another."""

    def run(command, *arguments):
        capsys.readouterr()
        code = import_module(f"tlora_mlx.{command}").main(list(map(str, arguments)))
        output = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run


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
