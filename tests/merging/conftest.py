"""A gentle run on a small quantized model, which several files merge."""

import mlx_lm
import pytest
from helpers.commands import quick_train
from helpers.models import ROWS, save_model, write_jsonl


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A gentle run on a 4-bit model with one dense layer, and the directory of its data."""
    place = tmp_path_factory.mktemp("merging")
    original = save_model(place / "original", hidden_size=64, intermediate_size=128)
    settings = {"quantize": True, "q_bits": 4, "q_group_size": 64}
    mlx_lm.convert(
        str(original),
        str(place / "4bit"),
        quant_predicate=lambda name, module: "1.self_attn.k_proj" not in name,
        **settings,
    )
    write_jsonl(place / "data/train.jsonl", ROWS[:12])
    write_jsonl(place / "data/valid.jsonl", ROWS[12:])
    options = {"iters": 16, "learning_rate": 3e-3, "rank": 2, "steps_per_eval": 100}
    options["grad_checkpoint"] = True
    return quick_train(place / "4bit", place / "data", place / "run", **options), place
