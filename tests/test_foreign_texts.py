"""Other people's texts on the terminal: shown, never obeyed."""

import mlx.core as mx
import pytest
from helpers.commands import assert_one_sentence
from mlx_lm.utils import save_config

from tlora_mlx.errors import visible

# A window's title, red, a cursor moved up, a forged line, rich's markup and emoji, right to left.
HOSTILE = "\x1b]0;title\x07\x1b[31m\x1b[2A\rverified\n[/red][bold]:smile:\u202e\x9b1m\u2028"
SHOWN = r"\x1b]0;title\x07\x1b[31m\x1b[2A\rverified\n[/red][bold]:smile:\u202e\x9b1m\u2028"


def test_what_is_shown():
    assert visible(HOSTILE) == SHOWN
    assert visible("\ud800 \udcff") == r"\ud800 \udcff"
    for text in ("plain", "Füße, 日本, 👩‍👩‍👧 ×", "a\u00a0b", "עברית"):
        assert visible(text) == text
    assert visible("a\tb\n\x1b", keep="\t\n") == "a\tb\n\\x1b"


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    name = f"model.layers.0.{HOSTILE}"
    tensors = {f"{name}.lora_a": mx.ones((4, 2)), f"{name}.lora_b": mx.ones((2, 4))}
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    config = {"model": HOSTILE, "lora_parameters": {"rank": 2, "scale": 1.0}}
    save_config(config, path / "adapter_config.json")
    return path


def obeyed(output):
    return [c for c in output if visible(c, keep="\n") != c]


def test_an_adapter(hostile, tlora_here):
    result = tlora_here("inspect", hostile)
    assert result.returncode == 0, result.stderr
    assert not obeyed(result.stdout)
    assert f"base model: {SHOWN}" in result.stdout
    assert result.stdout.count(SHOWN[:16]) == 2  # and in the heading, which is cut
    result = tlora_here("export", hostile, "--format", "run")
    assert_one_sentence(result, 2, f"model directory {SHOWN} does not exist")
    assert not obeyed(result.stderr)


def test_paths_yaml_and_flags(tmp_path, tlora_here):
    result = tlora_here("inspect", tmp_path / HOSTILE.replace("/", ""))
    assert_one_sentence(result, 2, SHOWN.replace("/", ""))
    yaml = tmp_path / "options.yaml"
    yaml.write_text('"ran\\e[31mk\\n": 4\n')
    result = tlora_here("plan", "-c", yaml)
    assert_one_sentence(result, 2, r"unknown option 'ran\x1b[31mk\n'")
    result = tlora_here("plan", f"--{HOSTILE}")
    assert_one_sentence(result, 2, SHOWN)
    assert not obeyed(result.stderr)
