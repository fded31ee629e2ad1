"""The gated delta rule forwards and backwards: in chunks, mlx-lm's loop, MLX's own function.

One layer's heads, random inputs, float32, one sample. Each way and length runs in a process of its
own; the exponent is the slope of log time against log length.

    python scripts/benchmark_gated_delta.py --tokens 128 256 512 1024 2048 4096
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from measuring import in_own_process, machine, mlx_blas, table_head, table_row
from mlx_lm.models import gated_delta as mlx_lm

from tlora_mlx.models.gated_delta import gated_delta_update

HEADS, WIDTH = 4, 128


def with_mlx(
    q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *gates: mx.array
) -> mx.array:
    """MLX's own function, which has no gates for each dimension."""
    a_log, dt_bias = gates
    gamma = mx.exp(-mx.exp(a_log) * nn.softplus(a + dt_bias))
    state = mx.zeros((1, HEADS, WIDTH, WIDTH))
    return mx.fast.gated_delta_update(q, k, v, gamma, mx.sigmoid(b), state)[0]


WAYS: dict[str, Callable[..., mx.array]] = {
    "mlx-lm's loop": lambda *x: mlx_lm.gated_delta_update(*x, use_kernel=False)[0],
    "mx.fast": with_mlx,
    "chunks": lambda *x: gated_delta_update(*x)[0],
}


def measure(way: str, tokens: int, vector: bool) -> dict[str, float]:
    """Seconds, processor seconds and peak MB of a forward and backward pass: the best of three."""
    mx.random.seed(0)
    gates = (HEADS, WIDTH) if vector else (HEADS,)
    q, k, v = mx.random.normal((3, 1, tokens, HEADS, WIDTH))
    q, k = mlx_lm.normalize_qk(q, k, inv_scale=WIDTH**-0.5, eps=1e-6)
    a, b = mx.random.normal((1, tokens, *gates)), mx.random.normal((1, tokens, HEADS))
    a_log, dt_bias = mx.random.normal((HEADS, 1) if vector else (HEADS,)), mx.random.normal(gates)
    arrays = [q, k, v, a, b, a_log, dt_bias]
    weights = mx.random.normal(v.shape)
    mx.eval(arrays, weights)

    def loss(*arrays: mx.array) -> mx.array:
        return (weights * WAYS[way](*arrays)).sum()

    gradient = mx.value_and_grad(loss, argnums=range(5))
    runs = []
    for _ in range(3):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        start = time.perf_counter(), time.process_time()
        mx.eval(gradient(*arrays))
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        runs.append((*seconds, (mx.get_peak_memory() - before) / 1e6))
    return dict(zip(("seconds", "processor", "memory"), np.min(runs, axis=0), strict=True))


def main() -> None:
    """Print the table and the exponents."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, tokens, vector = args.one
        print(json.dumps(measure(way, int(tokens), vector == "True")))
        return
    print(f"{machine()}; {mlx_blas()}; {HEADS} heads of {WIDTH}\n")
    print(table_head(["gates", "way", "tokens", "s", "processor s", "peak MB"]))
    exponents = []
    for vector in (False, True):
        gates = "of each dimension" if vector else "of each head"
        for way in WAYS:
            if vector and WAYS[way] is with_mlx:
                continue
            times = []
            for tokens in args.tokens:
                found = in_own_process(__file__, "--one", way, tokens, vector)
                times.append(found["processor"])
                cells = (f"{found['seconds']:.2f}", f"{found['processor']:.2f}")
                print(table_row([gates, way, tokens, *cells, f"{found['memory']:.0f}"]))
            slope = np.polyfit(np.log(args.tokens), np.log(times), 1)[0]
            exponents.append(f"{way}, gates {gates}: {slope:.2f}")
    print(f"\nExponent of processor time: {'; '.join(exponents)}.")


if __name__ == "__main__":
    main()
