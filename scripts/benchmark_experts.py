"""Calibration of a mixture of experts against their number: all at once, or one after the other.

A random Qwen3-MoE of two layers, 8 experts for each token, samples of 256 tokens, float32. Before,
each expert had its rows, picked on the host, and its own product: that is "one by one". Each
case runs in a process of its own.

    python scripts/benchmark_experts.py --experts 8 32 128
"""

from __future__ import annotations

import argparse
import json
import time

import mlx.core as mx
import mlx.nn as nn
from measuring import in_own_process, machine, mlx_blas, table_head, table_row
from mlx_lm.models.qwen3_moe import Model, ModelArgs

from tlora_mlx.method import calibration
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.experts import Expert, routed_rows, rows_by_expert
from tlora_mlx.method.layers import target_linears
from tlora_mlx.method.sensitivity import mean_products

TOKENS, SAMPLES = 256, 3
SETTINGS = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1000,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
}


def one_by_one(switch: nn.Module, delta: mx.array, x: mx.array, indices: mx.array) -> mx.array:
    """Each expert's sensitivity by itself."""
    x, delta = routed_rows(x, indices), routed_rows(delta, indices)
    return mx.concatenate(
        [
            mx.zeros((1,))
            if rows is None
            else mean_products(Expert(switch, e), [(delta[rows], x[rows])])
            for e, rows in enumerate(rows_by_expert(indices, switch.num_experts))
        ]
    )


def measure(way: str, experts: int) -> dict[str, float]:
    """Seconds and processor seconds a sample, and peak MB beyond the model."""
    if way == "one by one":
        calibration.mean_products_of_experts = one_by_one
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict({**SETTINGS, "num_experts": experts}))
    mx.eval(model.parameters())
    targets = target_linears(model, experts=True)
    found = []
    for n in range(SAMPLES + 1):  # the first one is for warming up
        tokens = mx.random.randint(0, SETTINGS["vocab_size"], (1, TOKENS))
        batch = Batch(tokens, mx.ones(tokens.shape, mx.bool_), mx.array([TOKENS]))
        mx.eval(batch)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter(), time.process_time()
        calibration.calibrate(model, targets, [batch])
        clock, processor = time.perf_counter() - start[0], time.process_time() - start[1]
        if n:
            found.append((clock, processor, (mx.get_peak_memory() - before) / 1e6))
    names = ("seconds", "processor", "memory")
    return {name: min(run[i] for run in found) for i, name in enumerate(names)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    print(f"{machine()}; {mlx_blas()}\n")
    print(table_head(["experts", "way", "s a sample", "processor s", "peak MB"]))
    for experts in args.experts:
        for way in ("one by one", "at once"):
            found = in_own_process(__file__, "--one", way, experts)
            cells = f"{found['seconds']:.2f}", f"{found['processor']:.2f}", f"{found['memory']:.0f}"
            print(table_row([experts, way, *cells]))


if __name__ == "__main__":
    main()
