"""Bits by the task: the best for a size, read by stock mlx-lm, with the size and losses stated."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_run
from helpers.commands import assert_one_sentence
from helpers.logits import all_tensors
from helpers.models import save_model
from mlx_lm.utils import compute_bits_per_weight

from tlora_mlx import export_requantized, read_run
from tlora_mlx.merging import bits, task
from tlora_mlx.merging.bits import BITS, Size, affine_weights, allocate
from tlora_mlx.merging.compensation import COARSER_DAMPING
from tlora_mlx.merging.grid import Grid
from tlora_mlx.merging.regridding import made_finer, narrowed
from tlora_mlx.merging.task import read_task
from tlora_mlx.method.curvature import Curvature
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.storage.files import write_json
from tlora_mlx.storage.safetensors import write_tensors


def weight(entries, bits):
    return SimpleNamespace(shape=(1, entries), settings={"bits": bits})


@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_that_size_costs_less(seed):
    """Against the best for a price per bit, module by module; some costs do not even fall."""
    random = np.random.default_rng(seed)
    costs, weights = {}, {}
    for name in "abcde":
        falling = np.cumsum(random.exponential(size=len(BITS)))[::-1] ** 3
        costs[name] = dict(zip(BITS, falling * random.uniform(0.7, 1.3, len(BITS)), strict=True))
        weights[name] = weight(int(random.integers(1, 9)), 4)

    def entries(bits):
        return sum(weights[n].shape[1] * (b - 4) for n, b in bits.items())

    def cost(bits):
        return sum(costs[n][b] for n, b in bits.items())

    sizes = set()
    for price in np.exp(random.uniform(-5, 5, 30)):
        best = {
            n: min(BITS, key=lambda b, n=n: costs[n][b] + price * weights[n].shape[1] * b)
            for n in costs
        }
        found = allocate(costs, weights, entries(best))
        assert entries(found) == entries(best)
        assert cost(found) == pytest.approx(cost(best), rel=1e-12)
        sizes.add(entries(best))
        more = allocate(costs, weights, entries(best) + 5)  # which may be too little for a step
        assert entries(more) <= entries(best) + 5
        assert cost(more) <= cost(best)
    assert len(sizes) > 4


def test_a_step_that_does_not_fit_keeps_no_smaller_one_out():
    weights = {"large": weight(8, 2), "small": weight(2, 2)}
    costs = {"large": {2: 32.0, 4: 0.0}, "small": {2: 3.0, 4: 0.0}}
    assert allocate(costs, weights, 5) == {"large": 2, "small": 4}


def test_a_range_is_narrowed_from_both_ends():
    """Two outliers that hardly matter are cut; a group of equal weights stays what it is."""
    settings = {"mode": "affine", "bits": 3, "group_size": 32}
    levels = np.linspace(-1.2, 1.2, 8)  # 0.4 of the outliers' range
    row = np.concatenate([[-3.0, 3.0], np.resize(levels, 30), np.full(32, 0.7)])
    target = row[None].astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[:2] = 1e-6
    found = narrowed(target, Grid(settings, mx.float32), importance)
    assert found.dense()[0] == pytest.approx(row.clip(-1.2, 1.2), abs=1e-6)
    assert np.isin(found.levels, range(8)).all()


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 3), (8, 5), (3, 4), (4, 8), (5, 6)])
def test_another_grid(before, after):
    """Levels are kept with more bits; with fewer, less is lost than by ``mx.quantize``."""
    random = np.random.default_rng(0)
    settings = {"mode": "affine", "bits": before, "group_size": 32}
    other = settings | {"bits": after}
    dense = mx.array(random.standard_t(4, size=(24, 128))).astype(mx.bfloat16)
    grid, onto = Grid(settings, mx.bfloat16), Grid(other, mx.bfloat16)
    start = grid.take_apart(mx.quantize(dense, **settings))
    target = start.dense()
    importance = np.exp(random.normal(size=128)).astype(np.float32)
    if after > before:
        found = made_finer(target, start, grid, onto)
    else:
        found = narrowed(target, onto, importance)
    # As it is stored, and read again by MLX.
    dtypes = mx.uint32, mx.bfloat16, mx.bfloat16
    stored = zip(onto.put_together(found, None), dtypes, strict=True)
    read = onto.take_apart([mx.array(data).view(dtype) for data, dtype in stored])
    assert np.array_equal(read.dense(), found.dense())
    error = (importance * (found.dense() - target) ** 2).sum()
    if after > before:
        assert error == 0
        return
    nearest = onto.take_apart(mx.quantize(mx.array(target).astype(mx.bfloat16), **other))
    assert error < 0.95 * (importance * (nearest.dense() - target) ** 2).sum()
    equally = narrowed(target, onto, np.ones(128, np.float32)).dense()
    assert error < 0.99 * (importance * (equally - target) ** 2).sum()
    assert ((equally - target) ** 2).sum() < 0.99 * ((found.dense() - target) ** 2).sum()


def test_both_costs_are_what_the_summed_loss_rises_by(trained):
    """By the curvature as its definition in doubles, and by a loss that is known; then undone."""
    base = ModelWeights(read_run(trained[0]).model)
    weight = affine_weights(base)["model.layers.0.mlp.up_proj"]
    random = np.random.default_rng(0)
    roots = [random.normal(size=(size, size)) for size in (weight.shape[1], weight.shape[0])]
    inputs, outputs = (root @ root.T for root in roots)
    factors = Curvature(*(mx.array(m, mx.float32) for m in (inputs, outputs)), mx.zeros((1, 1)))
    costs = bits._by_curvature(None, base, weight, factors, BITS)
    assert set(costs) == {2, 3, 4}  # more make no difference without an adapter
    target = weight.dense(base.file_of, 0, weight.rows)
    means = [np.diag(matrix).mean() for matrix in (inputs, outputs)]
    inputs += COARSER_DAMPING * means[0] * np.eye(len(inputs))
    damped = outputs + COARSER_DAMPING * means[1] * np.eye(len(outputs))
    for number in (2, 3, 4):
        onto = weight.at(number).grid()
        found = narrowed(target, onto, np.diag(inputs).astype(np.float32))
        error = found.dense().astype(np.float64) - target if number < 4 else 0 * target
        expected = np.trace(damped @ error @ inputs @ error.T) / (2 * np.trace(outputs))
        assert costs[number] == pytest.approx(expected, rel=1e-3)
    placed = []
    known = SimpleNamespace(
        tokens=7, adapted=1.0, calibration_loss=lambda: 0.5 + len(placed), memory=0,
        place=lambda weight, parts: placed.append(parts),
    )  # fmt: skip
    assert bits._by_loss(base, weight, known, BITS) == {4: 0.0, 2: 7 * 0.5, 3: 7 * 1.5}
    assert all(map(mx.array_equal, placed[-1], weight.read(base.file_of)))


def export(tlora_here, run, output, *more):
    command = ("export", run, "--format", "merged", "--quantize", "--output", output)
    return tlora_here(*command, "--bits", "auto", *more)


def test_the_command(trained, tmp_path, tlora_here):
    run, place = trained
    before = compute_bits_per_weight(mlx_lm.load(str(place / "4bit"))[0])
    target = before - 1.2
    done = export(tlora_here, run, tmp_path / "out", "--target-bpw", f"{target}")
    assert done.returncode == 0, done.stderr
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    found = compute_bits_per_weight(model)
    assert target - 0.3 < found <= target
    numbers = Counter(m.bits for _, m in model.named_modules() if hasattr(m, "bits"))
    assert len(numbers) > 1
    survival = json.loads((tmp_path / "out/survival.json").read_text())
    stated = survival["bits"]
    assert stated["modules"] == {str(bits): numbers[bits] for bits in sorted(numbers)}
    assert stated["per_weight"] == pytest.approx(found, rel=1e-6)
    assert stated["before"] == pytest.approx(before, rel=1e-6)
    first, *others = (f"{n} at {bits}" for bits, n in stated["modules"].items())
    said = f"{', '.join([first.replace(' at', ' modules at') + ' bits', *others])}; {found:.2f} "
    said += f"bits per weight, {before:.2f} before"
    assert said in " ".join(done.stdout.split())
    assert said in (tmp_path / "out/README.md").read_text()
    report = tlora_here("report", run, "--merged", tmp_path / "out", "--output", tmp_path / "r")
    assert report.returncode == 0, report.stderr
    assert f"{found:.2f} bits per weight" in (tmp_path / "r").read_text()


def test_two_bits_only_where_three_do_not_fit(trained, tmp_path, tlora_here):
    run, _ = trained
    base = ModelWeights(read_run(run).model)
    stored = affine_weights(base)
    three = Size(base, {name: weight.at(3) for name, weight in stored.items()}).per_weight

    def modules(target):
        output = tmp_path / f"{target:.3f}"
        assert export(tlora_here, run, output, "--target-bpw", target).returncode == 0
        return json.loads((output / "survival.json").read_text())["bits"]["modules"]

    assert modules(three) == {"3": len(stored)}
    assert min(modules(three + 0.3)) == "3"
    assert set(modules(three - 0.01)) == {"2", "3"}


def test_in_groups_and_as_on_a_gpu(trained, tmp_path, monkeypatch):
    """In three groups, and of two files, as all at once; by quantized products nearly the same."""
    run, place = trained
    target = compute_bits_per_weight(mlx_lm.load(str(place / "4bit"))[0]) - 1.2

    def exported(run, name, memory=None):
        taken = read_task(read_run(run))
        taken.memory = memory or taken.memory
        options = {"auto_bits": True, "target_bpw": target}
        return export_requantized(run, tmp_path / name, task=taken, **options)

    whole, parts = exported(run, "whole"), exported(in_two_files(run, tmp_path), "parts", 400_000)
    assert whole.bits == parts.bits
    expected, found = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "parts")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in found.values()), "of": "ours"}
    assert set(index["weight_map"].values()) == {f"model-{i}.safetensors" for i in (1, 2)}
    monkeypatch.setattr(task, "make_dense", lambda model: None)
    quantized = exported(run, "quantized")
    assert quantized.bits.per_weight == pytest.approx(whole.bits.per_weight, abs=0.2)
    assert quantized.losses.merged == pytest.approx(whole.losses.merged, rel=0.02)


def in_two_files(run, place):
    """The run on a copy of its model in two files, with an index."""
    model = Path(read_run(run).model)
    copy, other = place / "model", place / "run"
    shutil.copytree(model, copy)
    shutil.copytree(run, other)
    tensors = mx.load(str(model / "model.safetensors"))
    (copy / "model.safetensors").unlink()
    placed = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        part = {name: tensor for name, tensor in tensors.items() if placed[name] == file}
        write_tensors(copy / file, part, {"format": "mlx"})
    index = {"metadata": {"total_size": 1, "of": "ours"}, "weight_map": placed}
    write_json(copy / "model.safetensors.index.json", index)
    config = json.loads((other / "adapter_config.json").read_text())
    write_json(other / "adapter_config.json", config | {"model": str(copy)})
    return other


def test_what_is_refused(trained, tmp_path, tlora_here):
    run, place = trained

    def refused(run, message, *options):
        assert_one_sentence(export(tlora_here, run, tmp_path / "out", *options), 2, message)
        assert not (tmp_path / "out").exists()

    refused(run, "--target-bpw 1 is too small for", "--target-bpw", "1")
    refused(run, "--target-bpw must be above 0", "--target-bpw", "-3")
    refused(run, "which --rounding nearest ignores", "--rounding", "nearest")
    refused(run, "--dequantize and --quantize cannot", "--dequantize")
    original = save_model(tmp_path / "original", hidden_size=64, intermediate_size=128)
    settings = {"quantize": True, "q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"}
    mlx_lm.convert(str(original), str(tmp_path / "mxfp4"), **settings)
    other = make_run(tmp_path / "run", tmp_path / "mxfp4", lambda i, shape: 2)
    refused(other, "is mxfp4; leave it out")
    plain = make_run(tmp_path / "plain", place / "4bit", lambda i, shape: 2)
    refused(plain, "--bits auto needs the task's data")
    for options, message in (
        (["--quantize", "--target-bpw", "4"], "--target-bpw needs --quantize --bits auto"),
        (["--bits", "auto"], "--bits is for --quantize"),
        (["--quantize", "--bits", "3"], "--bits must be auto, not"),
    ):
        done = tlora_here("export", run, "--format", "merged", *options)
        assert_one_sentence(done, 2, message)
