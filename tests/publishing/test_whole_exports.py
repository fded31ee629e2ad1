"""An export is whole, its card included, or not there; and nothing of this machine gets into it."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.commands import assert_one_sentence

FORMATS = ("peft", "mlx-lm", "merged")
# Kills the process before its k-th call of any function that changes the file system.
KILLED = """
import os, signal, sys
from tlora_mlx.storage import files
number = int(sys.argv[1])
def counted(function):
    def counting(*args, **kwargs):
        global number
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counting
for name in ("replace", "mkdir", "fsync", "ftruncate"):
    setattr(os, name, counted(getattr(os, name)))
from tlora_mlx.export import main
sys.exit(main(sys.argv[2:]))
"""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_that_cannot_be_written(run_path, tmp_path, tlora_here, monkeypatch, format):
    command = ["export", run_path, "--format", format, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr("tlora_mlx.publishing.export.write_card", full)
        result = tlora_here(*command)
    assert_one_sentence(result, 1, f"cannot write {tmp_path / 'out'}: No space left on device")
    assert names(tmp_path) == []
    assert tlora_here(*command).returncode == 0
    assert "README.md" in names(tmp_path / "out")


def test_killed_before_the_last_rename(run_path, tmp_path, tlora_here):
    """The last thing that happens is the rename; what was left is swept by the next export."""
    command = [str(run_path), "--output", str(tmp_path / "out")]
    left = {}
    for number in (1, 12):
        result = subprocess.run([sys.executable, "-c", KILLED, str(number), *command])
        assert result.returncode == -signal.SIGKILL
        left[number] = names(tmp_path)
        assert "out" not in left[number]
    assert [len(found) for found in left.values()] == [0, 1]
    assert tlora_here("export", *command).returncode == 0
    assert names(tmp_path) == ["out"]


def test_links_of_a_model_to_elsewhere(run_path, model_path, tmp_path, tlora_here):
    """The environment may hold the Hub's token."""
    model = tmp_path / "model"
    model.mkdir()
    for file in model_path.iterdir():
        os.link(file, model / file.name)
    command = ["export", run_path, "--base-model", model, "--format", "merged"]
    command += ["--output", tmp_path / "out"]
    for name in ("NOTICE", "tokenizer_config.json", "model.safetensors"):
        content = model / name
        if content.exists():
            os.rename(content, tmp_path / name)
        content.symlink_to(tmp_path / name if name != "NOTICE" else "/proc/self/environ")
        result = tlora_here(*command)
        assert_one_sentence(result, 2, f"{content} is a link to ")
        assert names(tmp_path / "model") == sorted({name, *names(model)})
        assert not (tmp_path / "out").exists()
        content.unlink()
        if name != "NOTICE":
            os.rename(tmp_path / name, content)
    assert tlora_here(*command).returncode == 0
