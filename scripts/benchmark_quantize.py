"""What a 4-bit model keeps of an adapter, by how it is rounded and how gently it was trained.

The model is converted as mlx-lm does it (bfloat16 scales, the embeddings too), an adapter is
trained on it at each rate, and merged: by mlx_lm.fuse, by ours to nearest, and by ours with
compensation. Losses are those of the validation and test rows together, which nothing is trained or
rounded by. On a CPU, training and losses use the dequantized weights in float32: the same model,
much faster.

    python scripts/benchmark_quantize.py --model examples/model --data examples/data --group-size 32
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from measuring import machine, mlx_blas, table_head, table_row
from mlx.utils import tree_unflatten

import tlora_mlx
from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.merging.task import make_dense
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.training.setup import read_data
from tlora_mlx.training.validation import mean_loss


def main() -> None:
    """Train and merge at each rate, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4e-4, 2e-3])
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=2048)
    args = parser.parse_args()
    print(f"{machine()}; MLX {mx.__version__}, {mlx_blas()}\n")
    heading = ["group", "rate", "base", "adapter", "mlx_lm.fuse", "nearest", "compensated"]
    print(table_head([*heading, "training s", "rounding s"]), flush=True)
    for group_size in args.group_size:
        with tempfile.TemporaryDirectory() as place:
            work = Path(place)
            settings = {"q_bits": args.bits, "q_group_size": group_size, "dtype": "bfloat16"}
            mlx_lm.convert(args.model, str(work / "quantized"), quantize=True, **settings)
            write_dense(work / "quantized", work / "dense")
            for rate in args.rates:
                found = measure(work, rate, args)
                print(table_row([group_size, f"{rate:g}", *found]), flush=True)


def write_dense(quantized: Path, output: Path) -> None:
    """The conversion's weights in float32, dequantized, as a model to train on."""
    shutil.copytree(quantized, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((output / "config.json").read_text())
    settings = config.pop("quantization")
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config))
    stored = mx.load(str(quantized / "model.safetensors"))
    dense = {}
    for name, array in stored.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if f"{module}.scales" in stored:
            others = [stored[f"{module}.{key}"].astype(mx.float32) for key in ("scales", "biases")]
            size, bits = settings["group_size"], settings["bits"]
            array = mx.dequantize(array, *others, group_size=size, bits=bits)
        dense[name] = array.astype(mx.float32)
    mx.save_safetensors(str(output / "model.safetensors"), dense, {"format": "mlx"})


def measure(work: Path, rate: float, args: argparse.Namespace) -> list[str]:
    """One adapter's cells: losses, the shares that three ways of merging keep, and seconds."""
    run = work / f"run-{rate:g}"
    start = time.perf_counter()
    tlora_mlx.train(
        model=str(work / "dense"),
        data=args.data,
        adapter_path=str(run),
        iters=args.iters,
        batch_size=args.batch_size,
        calibration_samples=args.calibration_samples,
        max_seq_length=args.max_seq_length,
        learning_rate=rate,
        steps_per_eval=args.iters,
        val_batches=1,
        quiet=True,
    )
    training = time.perf_counter() - start
    quantized = str(work / "quantized")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"model": quantized}))
    data = DataConfig(model=quantized, data=args.data, max_seq_length=args.max_seq_length)
    splits, _ = read_data(data)
    samples = splits["valid"].samples + splits["test"].samples

    def loss(model: nn.Module) -> float:
        make_dense(model)
        return mean_loss(model, batches_in_order(samples, args.batch_size, args.max_seq_length))

    adapted = tlora_mlx.load_adapter(run).model
    after = loss(adapted)
    with adapters_off(adapted):
        before = loss(adapted)
    fused = mlx_lm.load(quantized, adapter_path=str(run))[0]
    layers = [(name, m.fuse()) for name, m in fused.named_modules() if hasattr(m, "fuse")]
    fused.update_modules(tree_unflatten(layers))

    def exported(rounding: str) -> float:
        output = work / f"{rounding}-{rate:g}"
        options = {"format": "merged", "quantize": True, "rounding": rounding, "quiet": True}
        tlora_mlx.export(run=str(run), output=str(output), **options)
        return loss(tlora_mlx.load_base_model(str(output)).model)

    nearest = exported("nearest")
    start = time.perf_counter()
    compensated = exported("compensated")
    seconds = time.perf_counter() - start
    merged = loss(fused), nearest, compensated
    shares = [f"{(before - found) / (before - after):.3f}" for found in merged]
    return [f"{before:.4f}", f"{after:.4f}", *shares, f"{training:.0f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
