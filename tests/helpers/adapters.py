"""Adapters with random matrices: runs of ours, and those that PEFT and mlx-lm make."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from helpers.logits import TOKENS, base_model, logits_of
from tlora_mlx import ModulePlan, RankPlan, load_base_model, target_linears
from tlora_mlx.method.layers import linear_shape
from tlora_mlx.storage.files import write_json
from tlora_mlx.storage.safetensors import write_tensors


def make_run(path, model_path, rank_of, num_layers=-1, experts=False, **config):
    """A run directory with the given ranks (by module number and shape) and a random A and B."""
    base = load_base_model(str(model_path))
    mx.random.seed(2)
    modules, tensors = {}, {}
    targets = target_linears(base.model, num_layers, experts=experts)
    for i, (name, linear) in enumerate(targets.items()):
        out_features, in_features = shape = linear_shape(linear)
        rank = rank_of(i, shape)
        modules[name] = ModulePlan(rank, 0.5 + i / 8, 1.0, out_features, in_features)
        if rank:
            tensors[f"{name}.lora_a"] = 0.2 * mx.random.normal((in_features, rank))
            tensors[f"{name}.lora_b"] = 0.2 * mx.random.normal((rank, out_features))
    path.mkdir()
    write_json(path / "rank_plan.json", RankPlan(4, 4, modules).to_dict())
    config = {
        "fine_tune_type": "tlora",
        "model": str(model_path),
        "base_model": str(model_path),
        "model_type": base.config["model_type"],
        **config,
    }
    write_json(path / "adapter_config.json", config)
    write_tensors(path / "adapters.safetensors", tensors, {})
    return path


def without_effect(run):
    """The same run with B = 0: its merged model is the base model."""
    tensors = {k: t * 0 if k.endswith("lora_b") else t for k, t in run.tensors.items()}
    return replace(run, tensors=tensors)


def zero_one_cap(i, shape):
    """Ranks that include 0, 1 and the cap."""
    return [0, 1, min(shape), 3, 5, 0, 2][i % 7]


KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_adapter(model_path, path, seed=1, **options):
    """An adapter that PEFT made, with random A and B; returns its own logits too."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "target_modules": KINDS, "r": 4, "lora_alpha": 6}
    model = get_peft_model(base_model(model_path), LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    return logits_of(model.eval())


def edit(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    write_json(path / "adapter_config.json", {**config, **changes})


def mlx_lm_adapter(model_path, path, **changes):
    """An adapter as mlx-lm's own trainer would write it, and the logits of mlx-lm."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load, save_config

    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    model, _ = load(str(model_path))
    linear_to_lora_layers(model, 1, parameters)
    mx.random.seed(3)
    path.mkdir(parents=True)
    tensors = {
        f"{name}.{key}": 0.1 * mx.random.normal(module[key].shape)
        for name, module in model.named_modules()
        for key in ("lora_a", "lora_b")
        if key in module
    }
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    save_config({**config, "model": str(model_path), **changes}, path / "adapter_config.json")
    model, _ = load(str(model_path), adapter_path=str(path))
    return np.array(model(mx.array(TOKENS)))
