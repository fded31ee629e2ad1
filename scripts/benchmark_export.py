"""Merging a run into its base: time and memory compared with PEFT, mlx_lm.fuse and cp.

A random bf16 Llama in two files, with adapters of rank 16 on every linear layer, is made here and
deleted at the end. Every side is a process of its own, all take turns in each round, and what they
read is in the page cache. Ours writes, syncs, and reads everything back; the others write.

    python scripts/benchmark_export.py --layers 10 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import in_own_process, llama, medians, peak_resident, table_head, table_row

HIDDEN, VOCABULARY, RANK = 2048, 32000, 16
SIDES = {
    "cp": "cp -r",
    "ours": "tlora export --format merged",
    "peft": "PEFT merge_and_unload + save_pretrained",
    "fuse": "mlx_lm.fuse",
}
STAGES = ("merging", "fsync", "reading back")
TITLES = ["way", "process s", "without imports s", "CPU s", "GB/s", "× ours", "extra MB"]
TITLES += ["÷ largest"]


def make(place: Path, layers: int) -> None:
    """The model, a run on it, and the run as adapters for the rivals."""
    import mlx.core as mx
    import numpy as np

    from tlora_mlx import ModulePlan, RankPlan, export_mlx_lm, export_peft
    from tlora_mlx.storage.files import write_json
    from tlora_mlx.storage.safetensors import write_tensors

    model, run = place / "model", place / "run"
    model.mkdir()
    run.mkdir()
    settings = llama(
        HIDDEN,
        layers,
        VOCABULARY,
        architectures=["LlamaForCausalLM"],
        num_key_value_heads=HIDDEN // 64,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
    )
    write_json(model / "config.json", settings)
    tokenizer().save_pretrained(model)
    linears = {f"self_attn.{kind}_proj": (HIDDEN, HIDDEN) for kind in "qkvo"}
    intermediate = settings["intermediate_size"]
    linears |= {f"mlp.{kind}_proj": (intermediate, HIDDEN) for kind in ("gate", "up")}
    linears["mlp.down_proj"] = (HIDDEN, intermediate)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}"] = (HIDDEN,)
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    random = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32) * 0.02)

    names, placed = list(shapes), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        tensors = {f"{name}.weight": normal(*shapes[name]).astype(mx.bfloat16) for name in part}
        write_tensors(model / file, tensors, {"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})

    adapted = {name: shape for name, shape in shapes.items() if "_proj" in name}
    plan = RankPlan(RANK, RANK, {n: ModulePlan(RANK, 1.0, 1.0, *s) for n, s in adapted.items()})
    tensors = {}
    for name, (out_features, in_features) in adapted.items():
        tensors[f"{name}.lora_a"] = normal(in_features, RANK)
        tensors[f"{name}.lora_b"] = normal(RANK, out_features)
    write_tensors(run / "adapters.safetensors", tensors, {})
    write_json(run / "rank_plan.json", plan.to_dict())
    config = {"fine_tune_type": "tlora", "model": str(model), "base_model": str(model)}
    write_json(run / "adapter_config.json", config | {"model_type": "llama"})
    export_peft(run, place / "peft", layout="compact")
    export_mlx_lm(run, place / "mlx-lm")


def tokenizer() -> object:
    """A tokenizer of one word: the rivals ask for one, and nobody uses it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def spent(start: float, processor: float) -> dict[str, float]:
    """Seconds since then, on the clock and of all processors."""
    return {"work": time.perf_counter() - start, "cpu": time.process_time() - processor}


def ours(place: Path, output: Path) -> dict[str, float]:
    """What our command does; imports are not counted. Seconds by stage."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as tlora_mlx.export.main does
    from tlora_mlx.merging.dense import export_merged
    from tlora_mlx.observer import Advance, Observer

    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[stage] += time.perf_counter() - start

    class Clock(Observer):
        @contextmanager
        def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
            with timed(name), super().stage(name, total, done) as advance:
                yield advance

    os.fsync = timed("fsync")(os.fsync)
    start, processor = time.perf_counter(), time.process_time()
    export_merged(place / "run", output, observer=Clock())
    return {**spent(start, processor), **seconds}


def peft(place: Path, output: Path) -> dict[str, float]:
    """PEFT's own way; imports are not counted."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start, processor = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, place / "peft").merge_and_unload()
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(output)
    return spent(start, processor)


def fuse(place: Path, output: Path) -> dict[str, float]:
    """mlx-lm's own command; imports are not counted."""
    from mlx_lm import fuse

    sys.argv = ["fuse", "--model", str(place / "model"), "--save-path", str(output)]
    sys.argv += ["--adapter-path", str(place / "mlx-lm")]
    start, processor = time.perf_counter(), time.process_time()
    fuse.main()
    return spent(start, processor)


def bare(place: Path, output: Path) -> dict[str, float]:
    """The interpreter with MLX and numpy alone, whose memory does not count as a side's own."""
    import mlx.core as mx
    import numpy as np

    mx.eval(mx.array(np.ones((64, 64), np.float32)) @ mx.ones((64, 64)))
    return {}


WAYS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "ours": ours,
    "peft": peft,
    "fuse": fuse,
    "bare": bare,
}


def measure(side: str, place: Path) -> dict[str, float]:
    """One process of one side; what it wrote is deleted."""
    output = place / f"out-{side}"
    start, processor = time.perf_counter(), children_processor_time()
    if side == "cp":
        subprocess.run(["cp", "-r", place / "model", output], check=True)
        found = {}
    else:
        found = in_own_process(__file__, "--side", side, "--place", place)
    wall, cpu = time.perf_counter() - start, children_processor_time() - processor
    written = output.exists() and sum(f.stat().st_size for f in output.glob("*.safetensors"))
    shutil.rmtree(output, ignore_errors=True)
    return {"wall": wall, "work": wall, "cpu": cpu, "gb": written / 1e9, **found}


def children_processor_time() -> float:
    """Seconds on the processor of all processes that were started here and have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    """Measure all sides in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "make":
        make(Path(args.place), args.layers)
        return
    if args.side:
        place = Path(args.place)
        found = WAYS[args.side](place, place / f"out-{args.side}")
        print(json.dumps({**found, "peak": peak_resident()}))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_export.") as folder:
        place = Path(folder)
        making = [sys.executable, __file__, "--side", "make", "--place", folder]
        making += ["--layers", str(args.layers)]
        subprocess.run(making, check=True, stdout=subprocess.DEVNULL)
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        baseline = measure("bare", place)["peak"]
        for i in range(args.rounds):
            order = list(SIDES)[i % len(SIDES) :] + list(SIDES)[: i % len(SIDES)]
            for side in order:
                rounds[side].append(measure(side, place))
    report(rounds, baseline)


def report(rounds: dict[str, list[dict[str, float]]], baseline: float) -> None:
    """Medians over the rounds, as Markdown."""
    middle = {side: medians(found) for side, found in rounds.items()}
    reference = middle["ours"]
    largest = VOCABULARY * HIDDEN * 2 / 1e6
    print(f"{reference['gb']:.2f} GB of bf16, largest tensor {largest:.0f} MB, rank {RANK}; ")
    print(f"bare interpreter with MLX and numpy: {baseline:.0f} MB\n")
    print(table_head(TITLES))
    for side, title in SIDES.items():
        figures = middle[side]
        cells = [title, *(f"{figures[key]:.2f}" for key in ("wall", "work", "cpu"))]
        cells += [f"{figures['gb'] / figures['work']:.2f}"]
        cells += [f"{figures['work'] / reference['work']:.1f}"]
        if "peak" in figures:
            extra = figures["peak"] - baseline
            cells += [f"{extra:.0f}", f"{extra / largest:.1f}"]
        else:
            cells += ["", ""]
        print(table_row(cells))
    parts = ", ".join(f"{stage} {reference[stage]:.2f} s" for stage in STAGES)
    share = middle["cp"]["work"] / reference["work"]
    print(f"\nours: {parts} (fsync beside both); {share:.0%} of cp's speed, ", end="")
    print(f"{middle['cp']['work'] / reference['merging']:.0%} by the merging alone")
    spread = {s: [round(r["work"], 2) for r in found] for s, found in rounds.items()}
    print(f"without imports, every round: {spread}")


if __name__ == "__main__":
    main()
