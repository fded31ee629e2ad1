"""Tiny models and data, made on the spot."""

import json
import re
import shutil
from pathlib import Path

from helpers.families import COMMON, FAILS, FAMILIES
from tlora_mlx.models import families as names

ROWS = [
    {"prompt": f"Add {i} and {j}.\n", "completion": f"def add():\n    return {i} + {j}\n"}
    for i in range(6)
    for j in range(3)
]


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
    """A random checkpoint of a family, as on the Hub, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    tiny = (FAMILIES | FAILS)[family]
    config = AutoConfig.for_model(family, **{**COMMON, **tiny.settings, **settings})
    known = names.FAMILIES.get(family)
    whole = known and known.is_multimodal
    model_class = AutoModelForImageTextToText if whole else AutoModelForCausalLM
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
    """Convert between the Hub's checkpoints and those of transformers 5."""
    from safetensors.torch import load_file, save_file

    tiny = (FAMILIES | FAILS)[family]
    config = json.loads((path / "config.json").read_text())
    for key, value in tiny.hub.items():
        inside = key == "text_config"
        config[key] = config[key] | value if inside else value
    (path / "config.json").write_text(json.dumps(config))
    if not (tiny.renames or tiny.experts_on_hub):
        return
    weights = load_file(path / "model.safetensors")
    for pattern, name in tiny.renames.items():
        weights = {re.sub(pattern, name, key): weights[key] for key in weights}
    if tiny.experts_on_hub == "stacked":
        weights = stacked_experts(weights)
    elif tiny.experts_on_hub:
        for key in (key for key in weights if ".experts." in key):
            weights[key] = weights[key].transpose(1, 2).contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def stacked_experts(weights):
    """Each block's experts as two tensors, (experts, 2·F, in) for gate and up."""
    import torch

    stacks, others = {}, {}
    for key, weight in weights.items():
        if found := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", key):
            stacks.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = weight
        else:
            others[key] = weight
    for name, parts in stacks.items():
        gate, up, down = (
            torch.stack([parts[part][e] for e in sorted(parts[part])])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        others |= {f"{name}.gate_up_proj": torch.cat([gate, up], 1), f"{name}.down_proj": down}
    return others


def path_for_mlx(path, family):
    """Where mlx-lm finds the model: ``path``, or a conversion beside it.

    The Hub's gpt_oss has experts in MXFP4, which transformers writes no more; mlx-lm reads those or
    its own names. Other conversions leave tensors out.
    """
    drops = (FAMILIES | FAILS)[family].mlx_drops
    if family != "gpt_oss" and not drops:
        return path
    from safetensors.torch import load_file, save_file

    beside = path.with_name(f"{path.name}-mlx")
    shutil.copytree(path, beside)
    if drops:
        weights = load_file(path / "model.safetensors")
        weights = {name: weights[name] for name in weights if not re.match(drops, name)}
        save_file(weights, beside / "model.safetensors", {"format": "pt"})
        return beside
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


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}
