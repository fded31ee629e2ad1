"""What the Hub did not provide, and why, in words that say what to do."""

import json
import re
import shutil

import pytest
from helpers.commands import assert_one_sentence

from tlora_mlx import UserError
from tlora_mlx.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "it has no repository of that name (404); if it is private, log in with hf auth"),
        (403, "it refused access (403); log in with hf auth login"),
        (503, "it failed (503); try later"),
    ],
)
def test_why_a_model_was_not_provided(hub, status, said):
    hub.fail("GET", "/api/models/", [status] * 9)
    with pytest.raises(UserError, match=re.escape(f"did not provide it: {said}")) as error:
        load_tokenizer("ann/none")
    assert "\n" not in str(error.value)


def test_an_adapter_whose_base_model_is_elsewhere(run_path, model_path, tmp_path, tlora_here):
    """The advice works: ``--base-model`` is an option of the command that gives it."""
    adapter = tmp_path / "adapter"
    made = tlora_here("export", run_path, "--output", adapter, "--base-model", "maker/base")
    assert made.returncode == 0, made.stderr
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/content/drive/MyDrive/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ask = ("generate", adapter, "--prompt", "def", "--max-tokens", 2)
    assert_one_sentence(tlora_here(*ask), 2, "see --base-model")
    answered = tlora_here(*ask, "--base-model", model_path)
    assert (answered.returncode, answered.stderr) == (0, "")
    moved = shutil.copytree(run_path, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["model"] = "/no/longer/here"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    ask = ("generate", moved, "--prompt", "def", "--max-tokens", 2)
    assert_one_sentence(tlora_here(*ask), 2, "/no/longer/here")
    assert tlora_here(*ask, "--base-model", model_path).returncode == 0
