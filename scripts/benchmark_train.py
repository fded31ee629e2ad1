"""Training compared with mlx-lm's own trainer: real tokens per second and peak memory, in turns.

Theirs is ``mlx_lm.tuner.trainer.train`` with mlx-lm's LoRA layers, A and B trained; ours is
``tlora_mlx.training.loop.Training``, A frozen. Same model, samples, modules, rank, batch size,
maximal length and optimizer, each side in a process of its own, ABAB. Each side makes its own
batches, as it does for its users: mlx-lm sorts by ``len(row)``, which for a row with named columns
is the number of columns. The first epoch is left out: it compiles.

    python scripts/benchmark_train.py --cases example 512-64-mixed --rounds 3
    python scripts/benchmark_train.py --cases example --model DIR --data DIR --samples 32
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from measuring import (
    in_own_process,
    llama,
    machine,
    medians,
    mlx_blas,
    peak_resident,
    table_head,
    table_row,
)

if TYPE_CHECKING:
    import mlx.nn as nn

    from tlora_mlx.data.samples import Sample

EXAMPLE = Path(__file__).parents[1] / "examples"
RANK, BATCH = 8, 4
SIDES = ("mlx-lm", "ours")
MEASURED = ("tokens_per_second", "tokens_per_processor_second", "peak_mb", "resident_mb")


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        hidden: width of a random Llama; 0: the model and data given, or the example that ships.
        length: the maximal length. Mixed samples have the example's own lengths, stretched so that
            its longest, 256, becomes this.
        mixed: samples of mixed length, not all of the maximal.
        masked: the prompt does not count in the loss; it is the example's share of each sample.
        samples: how many there are.
        layers: of the random Llama, as what follows.
        bits: of its quantized weights; 0: they are not quantized.
    """

    hidden: int
    length: int
    mixed: bool
    masked: bool
    samples: int
    layers: int = 4
    vocabulary: int = 4096
    dtype: str = "float32"
    bits: int = 0


CASES = {
    "example": Case(0, 512, True, False, 96),
    "example-masked": Case(0, 512, True, True, 96),
    "512-64-mixed": Case(512, 64, True, False, 48),
    "512-256-mixed": Case(512, 256, True, False, 24),
    "512-256-mixed-masked": Case(512, 256, True, True, 24),
    "512-256-vocabulary-masked": Case(512, 256, True, True, 16, vocabulary=32768),
    "512-512-mixed": Case(512, 512, True, False, 16),
    "1024-256-mixed": Case(1024, 256, True, False, 16, layers=2),
    "512-64-one": Case(512, 64, False, False, 32),
    "512-256-one": Case(512, 256, False, False, 12),
    "512-256-one-masked": Case(512, 256, False, True, 12),
    "1024-256-one": Case(1024, 256, False, False, 8, layers=2),
    "512-64-mixed-bfloat16": Case(512, 64, True, False, 16, layers=1, dtype="bfloat16"),
    "512-64-one-bfloat16": Case(512, 64, False, False, 8, layers=1, dtype="bfloat16"),
    "512-64-mixed-4bit": Case(512, 64, True, False, 16, layers=1, vocabulary=1024, bits=4),
    "512-64-one-4bit": Case(512, 64, False, False, 8, layers=1, vocabulary=1024, bits=4),
}


def load_model(case: Case, model: Path) -> nn.Module:
    """The model in a directory, or a random Llama."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import load_model as load

    if not case.hidden:
        return load(model)[0]
    mx.random.seed(0)
    model = Model(ModelArgs(**llama(case.hidden, case.layers, case.vocabulary)))
    model.set_dtype(getattr(mx, case.dtype))
    if case.bits:
        nn.quantize(model, 64, case.bits)
    mx.eval(model.parameters())
    return model


def load_samples(case: Case, model: Path, data: Path) -> list[Sample]:
    """Samples of the data, or random tokens with their lengths and share of prompt."""
    from tlora_mlx.data.reading import load_data
    from tlora_mlx.data.samples import Sample
    from tlora_mlx.models.base_model import load_base_model

    tokenizer = load_base_model(str(model)).tokenizer
    split = load_data(str(data), tokenizer, case.length, case.masked)["train"]
    random = np.random.default_rng(0)
    chosen = random.permutation(len(split))[: case.samples]
    samples = [split.samples[i] for i in chosen]
    if not case.hidden:
        return samples
    made = []
    for sample in samples:
        length, own = case.length, len(sample.tokens)
        if case.mixed:
            length = max(4, min(length, round(own * length / 256)))
        first = max(1, round(sample.first_target * length / own)) if case.masked else 1
        made.append(Sample(random.integers(0, case.vocabulary, length).tolist(), first))
    return made


class Times(NamedTuple):
    """Seconds by the clock, and of all this process's threads on the processor."""

    clock: float
    processor: float


def now() -> Times:
    """The time: a shared machine disturbs the clock more than the processor's time."""
    return Times(time.perf_counter(), time.process_time())


class Rows:
    """The samples as mlx-lm's data sets keep rows: each a dict, made into tokens when asked."""

    def __init__(self, samples: list[Sample], masked: bool):
        self._rows = [{"prompt": s, "completion": masked} for s in samples]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        return self._rows[i]

    def process(self, row: dict) -> tuple[list[int], int]:
        """Token ids and the prompt's length, 0 where it counts."""
        sample = row["prompt"]
        return sample.tokens, sample.first_target if row["completion"] else 0


def train_theirs(model: nn.Module, samples: list[Sample], case: Case, iters: int) -> list[Times]:
    """mlx-lm's trainer; the time at the end of each epoch."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    times = []

    class Callback:
        def on_train_loss_report(self, report: dict) -> None:
            times.append(now())

    model.freeze()
    lora = {"rank": RANK, "dropout": 0.0, "scale": 20.0}
    linear_to_lora_layers(model, len(model.layers), lora)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArgs(
            batch_size=BATCH,
            iters=iters,
            steps_per_report=len(samples) // BATCH,
            steps_per_save=iters + 1,
            max_seq_length=case.length,
            adapter_file=str(Path(scratch) / "adapters.safetensors"),
        )
        data = CacheDataset(Rows(samples, case.masked))
        train(model, optim.AdamW(1e-5), data, args=args, training_callback=Callback())
    return times


def train_ours(model: nn.Module, samples: list[Sample], case: Case, iters: int) -> list[Times]:
    """Our loop; the time at the end of each epoch."""
    import mlx.core as mx

    from tlora_mlx.config.training_options import TrainConfig
    from tlora_mlx.data.samples import Split
    from tlora_mlx.method.allocation import ModulePlan, RankPlan
    from tlora_mlx.method.layers import attach, linear_shape, target_linears
    from tlora_mlx.observer import Observer
    from tlora_mlx.training.loop import Training
    from tlora_mlx.training.step import make_optimizer

    times = []

    class Clock(Observer):
        def reported(self, metrics: Mapping[str, Any]) -> None:
            times.append(now())

    shapes = {name: linear_shape(module) for name, module in target_linears(model).items()}
    modules = {
        name: ModulePlan(RANK, 1.0, 0.0, out, width) for name, (out, width) in shapes.items()
    }
    starts = {
        f"{name}.lora_a": mx.random.normal((width, RANK)) / width**0.5
        for name, (_, width) in shapes.items()
    }
    attach(model, RankPlan(RANK, RANK, modules), starts)
    config = TrainConfig(
        model="", data="", rank=RANK, batch_size=BATCH, iters=iters, max_seq_length=case.length,
        steps_per_report=len(samples) // BATCH, save_every=iters + 1,
    )  # fmt: skip
    optimizer = make_optimizer(config, model)
    Training(model, optimizer, Split(samples), Split(), config, observer=Clock()).fit()
    return times


def computed_positions(side: str, samples: list[Sample], case: Case, epochs: int) -> int:
    """How many positions go through the blocks in the epochs that are timed."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    from tlora_mlx.data.batches import collate, epoch_order

    if side == "mlx-lm":
        data = CacheDataset(Rows(samples, case.masked))
        batches = iterate_batches(data, BATCH, case.length)
        return epochs * sum(tokens[:, 1:].size for tokens, _ in batches)
    lengths = [len(s.tokens) for s in samples]
    return sum(
        collate([samples[i] for i in numbers], case.length).tokens[:, 1:].size
        for epoch in range(1, epochs + 1)
        for numbers in epoch_order(lengths, BATCH, 0, epoch)
    )


def run_side(side: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Train on one side, in this process, and say what it took."""
    import mlx.core as mx

    epochs = args.epochs
    samples = load_samples(case, args.model, args.data)
    model = load_model(case, args.model)
    mx.reset_peak_memory()
    train = train_theirs if side == "mlx-lm" else train_ours
    with silence():
        times = train(model, samples, case, (epochs + 1) * len(samples) // BATCH)
    real = epochs * sum(len(s.tokens) - 1 for s in samples)
    return {
        "tokens_per_second": real / (times[-1].clock - times[0].clock),
        "tokens_per_processor_second": real / (times[-1].processor - times[0].processor),
        "peak_mb": mx.get_peak_memory() / 1e6,
        "resident_mb": peak_resident(),
        "real_share": real / computed_positions(side, samples, case, epochs),
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed inside of the block."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def measure(side: str, name: str, args: argparse.Namespace) -> dict[str, float]:
    """``run_side`` in a process of its own."""
    given = [f"--{key}={getattr(args, key)}" for key in ("epochs", "model", "data", "samples")]
    return in_own_process(__file__, "--side", side, "--cases", name, *given)


def main() -> None:
    """Measure every case in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs for each case")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that are timed, after one")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model", help="of the examples")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "data", help="of the examples")
    parser.add_argument("--samples", type=int, default=96, help="of the examples")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        case = CASES[args.cases[0]]
        if not case.hidden:
            case = replace(case, samples=args.samples)
        print(json.dumps(run_side(args.side, case, args)))
        return
    print(
        f"{machine()}; {mlx_blas()}; rank {RANK}, batches of {BATCH}; medians of {args.rounds} "
        "pairs\n"
    )
    titles = ["case", "real tokens/s: mlx-lm", "ours", "×"]
    titles += ["per processor second: mlx-lm", "ours", "×", "peak MB: mlx-lm", "ours", "×"]
    titles += ["resident MB: mlx-lm", "ours", "×", "real share: mlx-lm", "ours"]
    print(table_head(titles), flush=True)
    figures = {}
    for name in args.cases:
        rounds = [{s: measure(s, name, args) for s in SIDES} for _ in range(args.rounds)]
        figures[name] = rounds
        middle = {side: medians([found[side] for found in rounds]) for side in SIDES}
        cells = [name]
        for key in MEASURED:
            cells += [f"{middle[side][key]:.0f}" for side in SIDES]
            ratios = [found["ours"][key] / found["mlx-lm"][key] for found in rounds]
            cells.append(f"**{statistics.median(ratios):.2f}**")
        cells += [f"{rounds[0][side]['real_share']:.2f}" for side in SIDES]
        print(table_row(cells), flush=True)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
