"""Initialisation compared with the plain algorithm: time per stage, memory, energy, growth.

The rival is what the authors' code does, rewritten in torch: a float32 covariance per module, all
held at once, weight gradients of every module by autograd sample by sample, and a full SVD of every
W·C. Same random Llama, same samples, same machine, each side in a process of its own. MLX uses the
BLAS that LD_PRELOAD names; torch's CPU build uses the MKL it brings, or with --same-blas MLX's.

    python scripts/benchmark_init.py --hidden 512 1024 2048 4096
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_own_process, llama, machine, mlx_blas, peak_resident, table_head, table_row

RANK = 8
VOCABULARY = 1000
SIDES = {"rival": "plain (torch)", "exact": "exact", "streaming": "streaming"}
ENERGY_MODULES = ("q_proj", "v_proj", "down_proj")


def settings_of(hidden: int, layers: int) -> dict[str, Any]:
    """The Llama's configuration at this width."""
    return llama(hidden, layers, VOCABULARY, tie_word_embeddings=True)


def random_samples(count: int, length: int) -> list[list[int]]:
    """Token ids with word frequencies like text's (Zipf), so that activations have a structure."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, VOCABULARY + 1)
    return random.choice(VOCABULARY, (count, length), p=weights / weights.sum()).tolist()


def random_weights(hidden: int, layers: int) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name, the same for both sides."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    random = np.random.default_rng(1)
    model = Model(ModelArgs.from_dict(settings_of(hidden, layers)))
    return {
        name: np.ones(value.shape, np.float32)
        if value.ndim == 1
        else (random.standard_normal(value.shape) / math.sqrt(value.shape[-1])).astype(np.float32)
        for name, value in tree_flatten(model.parameters())
    }


def resident() -> float:
    """MB resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_ours(hidden: int, layers: int, samples: list[list[int]], covariance: str) -> dict:
    """Our calibration and subspaces; seconds per stage, MB, and A by module."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.llama import Model, ModelArgs

    from tlora_mlx.data.batches import collate
    from tlora_mlx.data.samples import Sample
    from tlora_mlx.method.allocation import plan_ranks
    from tlora_mlx.method.calibration import calibrate
    from tlora_mlx.method.covariance import input_leaders
    from tlora_mlx.method.initialise import exact_subspaces, streamed_subspaces
    from tlora_mlx.method.layers import linear_shape, target_linears
    from tlora_mlx.method.output_layer import summed_loss

    model = Model(ModelArgs.from_dict(settings_of(hidden, layers)))
    weights = random_weights(hidden, layers)
    model.load_weights([(k, mx.array(v)) for k, v in weights.items()])
    mx.eval(model.parameters())
    del weights
    batches = [collate([Sample(s, 1)], len(s)) for s in samples]
    targets = target_linears(model)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    leaders = input_leaders(model, targets)

    mx.eval(model(batches[0].tokens))  # what is compiled or loaded once

    before = resident()
    start = time.perf_counter()
    wanted = set(leaders.values()) if covariance == "exact" else ()
    calibration = calibrate(model, targets, batches, wanted)
    calibrated = time.perf_counter()
    plan = plan_ranks(calibration.sensitivities, shapes, RANK, RANK)
    if covariance == "exact":
        subspaces = exact_subspaces(plan, targets, leaders, calibration.covariances).a
    else:
        subspaces = streamed_subspaces(model, plan, targets, leaders, batches, 0)
    end = time.perf_counter()
    extra = peak_resident() - before

    model.unfreeze()
    gradient = nn.value_and_grad(model, summed_loss)
    mx.eval(gradient(model, *batches[0]))
    plain = time.perf_counter()
    for batch in batches:
        mx.eval(gradient(model, *batch[:2]))
    plain = time.perf_counter() - plain
    return {
        "calibrate": calibrated - start,
        "subspaces": end - calibrated,
        "total": end - start,
        "plain": plain,
        "extra_mb": extra,
        "a": {name: np.array(a) for name, a in subspaces.items()},
    }


def run_rival(hidden: int, layers: int, samples: list[list[int]]) -> dict:
    """The plain algorithm in torch; the same figures, and captured energy's references."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = settings_of(hidden, layers)
    del settings["model_type"]
    torch.set_num_threads(os.cpu_count())
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    weights = random_weights(hidden, layers)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    model.tie_weights()
    del weights
    linears = {n: m for n, m in model.model.layers.named_modules() if hasattr(m, "in_features")}
    linears = {f"model.layers.{name}": module for name, module in linears.items()}
    tokens = [torch.tensor([s]) for s in samples]

    with torch.no_grad():
        model(tokens[0])

    before = resident()
    covariances = {n: torch.zeros(m.in_features, m.in_features) for n, m in linears.items()}
    sensitivities = dict.fromkeys(linears, 0.0)

    def hook(name: str):
        def record(module, inputs, output):
            x = inputs[0].detach()[0]
            x = x - x.mean(0, keepdim=True)
            covariances[name] += x.T @ x / len(samples)

        return record

    start = time.perf_counter()
    handles = [m.register_forward_hook(hook(n)) for n, m in linears.items()]
    for ids in tokens:
        model(ids, labels=ids).loss.backward()
        for name, module in linears.items():
            score = (module.weight.detach() * module.weight.grad).abs().mean().item()
            sensitivities[name] += score / len(samples)
        model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    calibrated = time.perf_counter()
    energies = {}
    for name, module in linears.items():
        product = module.weight.detach() @ covariances[name]
        _, values, _ = torch.linalg.svd(product)
        energies[name] = values.square().cumsum(0).tolist()
    end = time.perf_counter()
    extra = peak_resident() - before

    def step(ids: torch.Tensor) -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    step(tokens[0])
    plain = time.perf_counter()
    for ids in tokens:
        step(ids)
    plain = time.perf_counter() - plain
    return {
        "calibrate": calibrated - start,
        "subspaces": end - calibrated,
        "total": end - start,
        "plain": plain,
        "extra_mb": extra,
        "energies": energies,
        "products": {
            name: (module.weight.detach() @ covariances[name]).numpy()
            for name, module in linears.items()
            if name.rsplit(".", 1)[-1] in ENERGY_MODULES
        },
    }


def measure(side: str, hidden: int, args: argparse.Namespace, scratch: Path) -> dict:
    """Run one side in a process of its own and read what it measured."""
    options = ["--side", side, "--hidden", hidden, "--layers", args.layers]
    options += ["--samples", args.samples, "--length", args.length, "--scratch", scratch]
    environment = dict(os.environ)
    if side == "rival" and not args.same_blas:
        environment.pop("LD_PRELOAD", None)
    return in_own_process(__file__, *options, environment=environment)


def run_side(args: argparse.Namespace) -> None:
    """The process of one side: measure, print the figures as JSON, write the arrays as npz."""
    (hidden,) = args.hidden
    samples = random_samples(args.samples, args.length)
    if args.side == "rival":
        result = run_rival(hidden, args.layers, samples)
        np.savez(args.scratch / f"products-{hidden}.npz", **result.pop("products"))
    else:
        result = run_ours(hidden, args.layers, samples, args.side)
        np.savez(args.scratch / f"{args.side}-{hidden}.npz", **result.pop("a"))
    print(json.dumps(result))


def captured(side: str, hidden: int, rival: dict, scratch: Path) -> float:
    """The least captured energy over the compared modules, as a share of the full SVD's."""
    products = np.load(scratch / f"products-{hidden}.npz")
    ours = np.load(scratch / f"{side}-{hidden}.npz")
    shares = [
        np.square(products[name] @ ours[name].T, dtype=np.double).sum()
        / rival["energies"][name][len(ours[name]) - 1]
        for name in products
        if name in ours
    ]
    return min(shares)


def draw(figures: list[dict], path: Path) -> None:
    """Total time, time in the SVD stage and extra memory against the width."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 3.6), layout="constrained")
    panels = [("total", "total (s)"), ("subspaces", "subspaces (s)"), ("extra_mb", "extra (MB)")]
    for axes, (key, title) in zip(picture.subplots(1, 3), panels, strict=True):
        for side, label in SIDES.items():
            points = [(f["hidden"], f[key]) for f in figures if f["side"] == side]
            axes.loglog(*zip(*points, strict=True), marker="o", label=label)
        widths = sorted({f["hidden"] for f in figures})
        axes.set_xticks(widths, widths, minor=False)
        axes.minorticks_off()
        axes.set_xlabel("hidden size")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=110)


def main() -> None:
    """Measure every width and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--same-blas", action="store_true", help="torch uses MLX's BLAS too")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--picture", type=Path, help="also draw total time and memory here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    theirs = mlx_blas() if args.same_blas else "MKL"
    print(
        f"{machine()}; {mlx_blas()} in MLX, {theirs} in torch; {args.layers} layer(s), "
        f"{args.samples} samples of {args.length} tokens, rank {RANK}\n"
    )
    titles = ["hidden", "way", "calibrate s", "subspaces s", "total s", "÷ fwd+bwd", "extra MB"]
    titles += ["energy ≥", "total ×", "SVD ×", "memory %"]
    print(table_head(titles))
    totals: dict[str, list[float]] = {}
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for hidden in args.hidden:
            rival = measure("rival", hidden, args, scratch)
            for side in SIDES:
                result = rival if side == "rival" else measure(side, hidden, args, scratch)
                totals.setdefault(side, []).append(result["total"])
                energy = 1.0 if side == "rival" else captured(side, hidden, rival, scratch)
                cells = [hidden, SIDES[side]]
                cells += [f"{result[key]:.2f}" for key in ("calibrate", "subspaces", "total")]
                cells += [f"{result['total'] / result['plain']:.2f}"]
                cells += [f"{result['extra_mb']:.0f}", f"{energy:.6f}"]
                cells += [f"{rival['total'] / result['total']:.1f}"]
                cells += [f"{rival['subspaces'] / result['subspaces']:.1f}"]
                cells += [f"{100 * result['extra_mb'] / rival['extra_mb']:.0f}"]
                print(table_row(cells), flush=True)
                figures.append(
                    {"hidden": hidden, "side": side, "energy": energy}
                    | {k: v for k, v in result.items() if isinstance(v, float)}
                )
    if len(args.hidden) > 1:
        logs = np.log(args.hidden)
        exponents = {side: np.polyfit(logs, np.log(t), 1)[0] for side, t in totals.items()}
        powers = ", ".join(f"{power:.2f} ({side})" for side, power in exponents.items())
        print(f"\ntotal grows with the width's power {powers}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.picture:
        draw(figures, args.picture)


if __name__ == "__main__":
    main()
