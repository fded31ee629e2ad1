"""Recurrences forwards and backwards: in chunks, as mlx-lm computes them, with MLX's own function.

The gated delta rule (Qwen3-Next, Kimi Linear), RWKV-7, Mamba-2, Bailing's linear attention and
RecurrentGemma's recurrence, for one layer's heads, and a whole block of Mamba: random inputs,
float32, one sample. Each way and length runs in a process of its own; the exponent is the slope of
log time against log length.

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
from mlx_lm.models import bailing_moe_linear, gated_delta, mamba, recurrent_gemma, rwkv7, ssm

from tlora_mlx.models.differentiable import differentiable_operations
from tlora_mlx.models.gated_delta import gated_delta_update, wkv7
from tlora_mlx.models.state_space import recurrent_gla, ssm_update

HEADS, WIDTH = 4, 128
STATE_HEADS, STATE_WIDTH, STATES = 8, 64, 128
MAMBA = mamba.ModelArgs("mamba", 32, 1024, 2048, 16, 1, 4, False, True, 64)


def with_mlx(
    q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *gates: mx.array
) -> list[mx.array]:
    """MLX's own function, which has no gates for each dimension."""
    a_log, dt_bias = gates
    gamma = mx.exp(-mx.exp(a_log) * nn.softplus(a + dt_bias))
    state = mx.zeros((1, HEADS, WIDTH, WIDTH))
    return mx.fast.gated_delta_update(q, k, v, gamma, mx.sigmoid(b), state)


def delta_inputs(tokens: int, gates: tuple[int, ...]) -> list[mx.array]:
    """q, k, v, a, b, A_log and dt_bias."""
    q, k, v = mx.random.normal((3, 1, tokens, HEADS, WIDTH))
    q, k = gated_delta.normalize_qk(q, k, inv_scale=WIDTH**-0.5, eps=1e-6)
    a, b = mx.random.normal((1, tokens, *gates)), mx.random.normal((1, tokens, HEADS))
    return [q, k, v, a, b, mx.random.normal((HEADS, 1)[: len(gates)]), mx.random.normal(gates)]


def state_inputs(tokens: int) -> list[mx.array]:
    """Mamba-2's x, A_log, B, C, D, dt and dt_bias."""
    x = mx.random.normal((1, tokens, STATE_HEADS, STATE_WIDTH))
    b, c = mx.random.normal((2, 1, tokens, 1, STATES))
    a_log, d, dt_bias = mx.random.normal((3, STATE_HEADS))
    return [x, a_log, b, c, d, mx.random.normal((1, tokens, STATE_HEADS)), dt_bias]


def attention_inputs(tokens: int) -> list[mx.array]:
    """Bailing's q, k, v and g."""
    q, k, v = mx.random.normal((3, 1, HEADS, tokens, WIDTH))
    return [q, k, v, -(0.5 ** mx.arange(1.0, HEADS + 1))]


def rwkv7_inputs(tokens: int) -> list[mx.array]:
    """RWKV-7's r, w, k, v, a and b."""
    r, w, k, v, a, b = mx.random.normal((6, 1, tokens, HEADS, WIDTH))
    a = a / mx.linalg.norm(a, axis=-1, keepdims=True)
    return [r, mx.exp(-0.606531 * mx.sigmoid(w)), k, v, -a, a * mx.sigmoid(b)]


def loop_of_rwkv7(*arrays: mx.array) -> list[mx.array]:
    """mlx-lm's loop over tokens."""
    ys, state = [], mx.zeros((1, HEADS, WIDTH, WIDTH))
    for t in range(arrays[0].shape[1]):
        y, state = rwkv7._wkv7_step_ops(*(x[:, t] for x in arrays), state)
        ys.append(y)
    return [mx.stack(ys, axis=1)]


def griffin_layer(x: mx.array) -> list[mx.array]:
    """RecurrentGemma's recurrence; its weights are the same each time."""
    mx.random.seed(1)
    layer = recurrent_gemma.RGLRU(x.shape[-1], HEADS)
    layer.apply(lambda p: mx.random.normal(p.shape) * 0.1)
    return [layer(x)[0]]


def griffin_in_blocks(x: mx.array) -> list[mx.array]:
    """The same as we differentiate it."""
    with differentiable_operations():
        return griffin_layer(x)


def mamba_block(x: mx.array) -> list[mx.array]:
    """A block of Mamba; its weights are the same each time."""
    mx.random.seed(1)
    return [mamba.MambaBlock(MAMBA)(x, None)]


def mamba_in_segments(x: mx.array) -> list[mx.array]:
    """The same block as we differentiate it."""
    with differentiable_operations():
        return mamba_block(x)


def loop(*arrays: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's loop over tokens."""
    return gated_delta.gated_delta_update(*arrays, use_kernel=False)


Way = Callable[..., "list[mx.array] | tuple[mx.array, mx.array]"]
RULES: dict[str, tuple[Callable[[int], list[mx.array]], dict[str, Way]]] = {
    "delta, a gate for each head": (
        lambda tokens: delta_inputs(tokens, (HEADS,)),
        {"mlx-lm": loop, "mx.fast": with_mlx, "chunks": gated_delta_update},
    ),
    "delta, a gate for each dimension": (
        lambda tokens: delta_inputs(tokens, (HEADS, WIDTH)),
        {"mlx-lm": loop, "chunks": gated_delta_update},
    ),
    "RWKV-7": (
        rwkv7_inputs,
        {"mlx-lm": loop_of_rwkv7, "chunks": lambda *arrays: wkv7(None, *arrays, None)},
    ),
    "Bailing": (
        attention_inputs,
        {
            "mlx-lm": lambda *arrays: bailing_moe_linear.recurrent_gla(*arrays, 1.0),
            "chunks": lambda *arrays: recurrent_gla(*arrays, 1.0),
        },
    ),
    "RecurrentGemma": (
        lambda tokens: [mx.random.normal((1, tokens, 1024))],
        {"mlx-lm": griffin_layer, "chunks": griffin_in_blocks},
    ),
    "Mamba, a block": (
        lambda tokens: [mx.random.normal((1, tokens, MAMBA.hidden_size))],
        {"mlx-lm": mamba_block, "chunks": mamba_in_segments},
    ),
    "Mamba-2": (state_inputs, {"mlx-lm": ssm.ssm_update, "chunks": ssm_update}),
}


def measure(rule: str, way: str, tokens: int) -> dict[str, float]:
    """Seconds, processor seconds and peak MB of a forward and backward pass: the best of three."""
    mx.random.seed(0)
    make, ways = RULES[rule]
    arrays = make(tokens)
    mx.eval(arrays)

    def loss(*arrays: mx.array) -> mx.array:
        return mx.square(ways[way](*arrays)[0]).sum()

    gradient = mx.value_and_grad(loss, argnums=range(len(arrays)))
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
    parser.add_argument("--rivals-up-to", type=int, default=2048, help="their memory: 2 MB a token")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rule, way, tokens = args.one
        print(json.dumps(measure(rule, way, int(tokens))))
        return
    print(f"{machine()}; {mlx_blas()}\n")
    print(table_head(["rule", "way", "tokens", "s", "processor s", "peak MB"]))
    exponents = []
    for rule, (_, ways) in RULES.items():
        for way in ways:
            lengths = [n for n in args.tokens if way == "chunks" or n <= args.rivals_up_to]
            times = []
            for tokens in lengths:
                found = in_own_process(__file__, "--one", rule, way, tokens)
                times.append(found["processor"])
                cells = (f"{found['seconds']:.2f}", f"{found['processor']:.2f}")
                print(table_row([rule, way, tokens, *cells, f"{found['memory']:.0f}"]), flush=True)
            slope = np.polyfit(np.log(lengths), np.log(times), 1)[0]
            exponents.append(f"{rule}, {way} {slope:.2f}")
    print(f"\nExponent of processor time: {'; '.join(exponents)}.")


if __name__ == "__main__":
    main()
