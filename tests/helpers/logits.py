"""The logits for the same tokens from MLX, transformers, PEFT and mlx-lm."""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tlora_mlx import load_adapter
from tlora_mlx.models.families import FAMILIES

# Which Llama4ForConditionalGeneration of transformers 5.24 asks for, and fails without.
MoeCausalLMOutputWithPast.image_outputs = None

TOKENS = [[5, 6, 7, 8, 9, 10, 250, 3], [11, 200, 4, 4, 30, 299, 1, 2]]


def mlx_logits(run):
    return np.array(load_adapter(run).model(mx.array(TOKENS)))


def base_model(path, text=False):
    """A checkpoint as transformers loads it, multimodal ones whole or (text) without the towers."""
    family = FAMILIES.get(json.loads((Path(path) / "config.json").read_text())["model_type"])
    whole = family and family.is_multimodal and not text
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    # eager: the sdpa of transformers 5.1 ignores gemma2's soft cap on attention scores.
    return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def peft_logits(model_path, adapter, text=False, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing or unexpected keys
        return logits_of(
            PeftModel.from_pretrained(base_model(model_path, text), adapter, **options)
        )


def merged_logits(model_path, adapter, rule):
    """Read an adapter by one global scaling rule, without any pattern, as vLLM or llama.cpp do."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    model = base_model(model_path)
    modules = dict(model.named_modules())
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            scale = config["lora_alpha"] / (config["r"] if rule == "global" else a.shape[0])
            modules[name].weight.data += scale * b @ a
    return logits_of(model)


def mlx_lm_logits(path):
    model, _ = mlx_lm.load(str(path))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def all_tensors(path):
    return {k: v for f in sorted(path.glob("model*.safetensors")) for k, v in load_file(f).items()}
