"""What a 4-bit model keeps of an adapter, by how it is rounded and how gently it was trained.

The model is converted as mlx-lm does it (bfloat16 scales, the embeddings too), an adapter is
trained on it at each rate, and merged: by mlx_lm.fuse, by ours to nearest, and by ours with
compensation. Losses are those of the validation and test rows together, which nothing is trained or
rounded by. --target-bpw adds bits by the task, for each size; --convert adds what mlx_lm.convert
makes of the dense merged model with so many bits; --elsewhere adds the losses on another task's
validation and test rows. Training and losses use the dequantized weights in float32: the same
model, much faster on a CPU. Seconds are the processor's, on a GPU the clock's. --work DIR keeps
what is finished, so that the same command goes on after a stop.

    python scripts/benchmark_quantize.py --model examples/model --data examples/data --group-size 32
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from measuring import machine, mlx_blas, table_head, table_row
from mlx.utils import tree_unflatten

import tlora_mlx
from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.merging.task import make_dense
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
    parser.add_argument("--target-bpw", type=float, nargs="+", default=[])
    parser.add_argument("--convert", type=int, nargs="+", default=[])
    parser.add_argument("--elsewhere", help="another task's data: the losses on it too")
    parser.add_argument("--work", help="keep models, runs and figures here, and go on from them")
    args = parser.parse_args()
    print(f"{machine()}; MLX {mx.__version__}, {mlx_blas()}\n")
    heading = ["group", "rate", "base", "adapter", "mlx_lm.fuse", "nearest", "compensated"]
    heading += [f"{bits} bit converted" for bits in args.convert]
    heading += [f"auto {target:g}" for target in args.target_bpw]
    print(table_head([*heading, "training s", "rounding s"]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for group_size in args.group_size:
            work = Path(args.work or temporary) / str(group_size)
            if not (work / "dense/model.safetensors").exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                settings = {"q_bits": args.bits, "q_group_size": group_size, "dtype": "bfloat16"}
                mlx_lm.convert(args.model, str(work / "quantized"), quantize=True, **settings)
                write_dense(work / "quantized", work / "dense")
            for rate in args.rates:
                measurement = Measurement(work, group_size, rate, args)
                print(table_row([group_size, f"{rate:g}", *measurement.row()]), flush=True)
                if args.elsewhere:
                    losses = measurement.losses_elsewhere()
                    print(table_row([group_size, "elsewhere", *losses]), flush=True)


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


def clock() -> float:
    """Seconds of the processor, which other work does not disturb; on a GPU those that passed."""
    return time.perf_counter() if mx.default_device() == mx.gpu else time.process_time()


def load(path: Path) -> nn.Module:
    """The model in a directory."""
    return tlora_mlx.load_base_model(str(path)).model


class Measurement:
    """One adapter, and its losses; figures that are in its file already are not measured again."""

    def __init__(self, work: Path, group_size: int, rate: float, args: argparse.Namespace):
        self._work, self._group_size, self._rate, self._args = work, group_size, rate, args
        self._quantized, self._run = str(work / "quantized"), work / f"run-{rate:g}"
        self._file = work / f"figures-{rate:g}.json"
        self._figures = json.loads(self._file.read_text()) if self._file.exists() else {}

        exported = {name: {"rounding": name} for name in ("nearest", "compensated")}
        autos = {f"auto-{size:g}": {"bits": "auto", "target_bpw": size} for size in args.target_bpw}
        self._ways: dict[str, Callable[[], nn.Module]] = {
            "base": partial(load, work / "quantized"),
            "adapter": lambda: tlora_mlx.load_adapter(self._run).model,
            "fused": self._fused,
            **{name: partial(self._exported, name, **how) for name, how in exported.items()},
            **{f"convert-{bits}": partial(self._converted, bits) for bits in args.convert},
            **{name: partial(self._exported, name, **how) for name, how in autos.items()},
        }

    def row(self) -> list[str]:
        """Losses, the shares that each way of merging keeps, and seconds."""
        training = self._figure("training", self._train)
        before, after, *merged = self._losses(self._args.data)
        shares = [f"{(before - found) / (before - after):.3f}" for found in merged]
        seconds = training, self._figures["compensated seconds"]
        return [f"{before:.4f}", f"{after:.4f}", *shares, *(f"{s:.0f}" for s in seconds)]

    def losses_elsewhere(self) -> list[str]:
        """The losses of the same models on the other task's rows."""
        return [f"{loss:.4f}" for loss in self._losses(self._args.elsewhere, " elsewhere")]

    def _losses(self, data: str, where: str = "") -> list[float]:
        size, length = self._args.batch_size, self._args.max_seq_length
        splits, _ = read_data(DataConfig(model=self._quantized, data=data, max_seq_length=length))
        samples = splits["valid"].samples + splits["test"].samples

        def loss(make: Callable[[], nn.Module]) -> float:
            model = make()
            make_dense(model)
            return mean_loss(model, batches_in_order(samples, size, length))

        return [self._figure(way + where, partial(loss, make)) for way, make in self._ways.items()]

    def _figure(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._figures:
            self._figures[name] = measure()
            self._file.write_text(json.dumps(self._figures, indent=1))
        return self._figures[name]

    def _train(self) -> float:
        """Seconds."""
        shutil.rmtree(self._run, ignore_errors=True)
        start = clock()
        tlora_mlx.train(
            model=str(self._work / "dense"),
            data=self._args.data,
            adapter_path=str(self._run),
            iters=self._args.iters,
            batch_size=self._args.batch_size,
            calibration_samples=self._args.calibration_samples,
            max_seq_length=self._args.max_seq_length,
            learning_rate=self._rate,
            steps_per_eval=self._args.iters,
            val_batches=1,
            quiet=True,
        )
        seconds = clock() - start
        config = json.loads((self._run / "adapter_config.json").read_text())
        config["model"] = self._quantized
        (self._run / "adapter_config.json").write_text(json.dumps(config))
        return seconds

    def _fused(self) -> nn.Module:
        fused = mlx_lm.load(self._quantized, adapter_path=str(self._run))[0]
        layers = [(name, m.fuse()) for name, m in fused.named_modules() if hasattr(m, "fuse")]
        fused.update_modules(tree_unflatten(layers))
        return fused

    def _exported(self, name: str, **options: Any) -> nn.Module:
        output = self._work / f"{name}-{self._rate:g}"
        if f"{name} seconds" not in self._figures:
            shutil.rmtree(output, ignore_errors=True)
            options |= {"format": "merged", "quantize": True, "quiet": True}
            start = clock()
            tlora_mlx.export(run=str(self._run), output=str(output), **options)
            self._figures[f"{name} seconds"] = clock() - start
        return load(output)

    def _converted(self, bits: int) -> nn.Module:
        names = "dequantized", f"convert-{bits}"
        dense, output = (self._work / f"{name}-{self._rate:g}" for name in names)
        if not (output / "model.safetensors").exists():
            for path in (dense, output):
                shutil.rmtree(path, ignore_errors=True)
            options = {"format": "merged", "dequantize": True, "quiet": True}
            tlora_mlx.export(run=str(self._run), output=str(dense), **options)
            settings = {"q_bits": bits, "q_group_size": self._group_size}
            settings |= {"quantize": True, "dtype": "bfloat16"}
            mlx_lm.convert(str(dense), str(output), **settings)
        return load(output)


if __name__ == "__main__":
    main()
