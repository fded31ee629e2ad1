"""Rounding by the task: exact where nothing changes, better than nearest where something does."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.commands import assert_one_sentence, quick_train
from helpers.models import ROWS, save_model, write_jsonl

from tlora_mlx import load_base_model, read_run, target_linears
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Sample
from tlora_mlx.merging import compensation, requantize, rounding, task
from tlora_mlx.merging.compensation import COARSER_DAMPING, DAMPING, round_module
from tlora_mlx.merging.grid import Grid
from tlora_mlx.merging.refitting import refitted, weighted_error
from tlora_mlx.merging.rounding import compensated
from tlora_mlx.method.curvature import Curvature, Tap, curvatures, summed
from tlora_mlx.method.layers import dense_weight, replace_modules

AFFINE = [
    {"mode": "affine", "bits": b, "group_size": 32 * 2 ** (b % 3)} for b in (2, 3, 4, 5, 6, 8)
]
MODES = [
    *AFFINE,
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
]


def factor(random, size, decay=8.0):
    """A positive definite matrix, (size, size), whose eigenvalues fall quickly."""
    basis, _ = np.linalg.qr(random.normal(size=(size, size)))
    values = np.exp(-np.arange(size) / decay) + 1e-3
    return ((basis * values) @ basis.T).astype(np.float32)


def curvature(inputs, outputs):
    gradient = mx.zeros((len(outputs), len(inputs)))
    return Curvature(mx.array(inputs), mx.array(outputs), gradient)


def quantized(random, settings, shape):
    weight = mx.array(random.normal(size=shape)).astype(mx.bfloat16)
    return mx.quantize(weight, **settings), Grid(settings, mx.bfloat16)


def stored_weight(grid, rounded):
    """What a file has of it, in the affine mode with bfloat16 scales."""
    dtypes = zip(rounded.parts, (mx.uint32, mx.bfloat16, mx.bfloat16), strict=True)
    return grid.take_apart([mx.array(data).view(dtype) for data, dtype in dtypes]).dense()


@pytest.mark.parametrize("settings", MODES, ids=lambda s: f"{s['mode']}{s['bits']}")
def test_what_is_on_the_grid_stays(settings):
    random = np.random.default_rng(0)
    parts, grid = quantized(random, settings, (40, 128))
    start = grid.take_apart(parts)
    # In float32 throughout, unlike mx.dequantize with bfloat16 scales.
    scales = [p if p.dtype == mx.uint8 else p.astype(mx.float32) for p in parts[1:]]
    dense = mx.dequantize(parts[0], *scales, **settings, dtype=mx.float32)
    assert np.array_equal(start.dense(), np.array(dense))
    found = compensated(start.dense(), start, grid, factor(random, 128), factor(random, 40))
    for data, part in zip(grid.put_together(found, parts[1]), parts, strict=True):
        assert np.array_equal(data, np.array(part.view(mx.uint8)))


@pytest.mark.parametrize("blocks", [256, 5])
@pytest.mark.parametrize("settings", MODES, ids=lambda s: f"{s['mode']}{s['bits']}")
def test_better_than_nearest(settings, blocks, monkeypatch):
    """Rows that are no multiple of a block (of 4 or 5), and in more than one panel."""
    monkeypatch.setattr(rounding, "PANEL", 16)
    monkeypatch.setattr(rounding, "BLOCKS", blocks)
    random = np.random.default_rng(1)
    shape = (29, 128)
    parts, grid = quantized(random, settings, shape)
    start = grid.take_apart(parts)
    step = np.abs(start.scales).mean() * grid.nearest(np.array([1e9]))[0] / 2**grid.bits
    delta = 0.15 * step * random.normal(size=(shape[0], 2)) @ random.normal(size=(2, shape[1]))
    delta = delta.astype(np.float32)
    inputs, outputs = factor(random, shape[1]), factor(random, shape[0])
    factors = curvature(inputs, outputs)
    target = start.dense() + delta
    nearest = mx.quantize(mx.array(target).astype(mx.bfloat16), **settings)
    best = round_module(parts, nearest, delta, grid, grid, factors)
    difference = grid.take_apart(nearest).dense() - target
    error = weighted_error(difference, factors.inputs, factors.outputs)
    assert best.outputs.error < 0.7 * error
    assert best.outputs.relative < 0.9
    again = round_module(parts, nearest, delta, grid, grid, factors)
    assert all(map(np.array_equal, best.parts, again.parts))


def test_the_best_of_the_candidates_is_stored():
    """Nearest where Δ outgrows W's scales; else scales and biases that fit the levels found."""
    random = np.random.default_rng(5)
    shape = (24, 128)
    parts, grid = quantized(random, AFFINE[2], shape)
    start = grid.take_apart(parts)
    gradient = random.normal(size=shape).astype(np.float32)
    factors = curvature(factor(random, shape[1]), factor(random, shape[0]))
    factors = factors._replace(gradient=mx.array(gradient))

    def stored(delta):
        target = mx.array(start.dense() + delta).astype(mx.bfloat16)
        nearest = mx.quantize(target, **AFFINE[2])
        rounded = round_module(parts, nearest, delta.astype(np.float32), grid, grid, factors)
        # The slopes are those of what is stored, too.
        error = stored_weight(grid, rounded) - start.dense() - delta
        along_error = (gradient * error).sum()
        assert rounded.slopes.along_error == pytest.approx(along_error, rel=1e-3)
        return rounded.parts, [np.array(part.view(mx.uint8)) for part in nearest]

    assert all(map(np.array_equal, *stored(30 * random.normal(size=shape))))
    found, nearest = stored(0.3 * np.abs(start.scales).mean() * random.normal(size=shape))
    for i in (1, 2):
        assert not np.array_equal(found[i], nearest[i])
        assert not np.array_equal(found[i], np.array(parts[i].view(mx.uint8)))


def test_with_fewer_bits_it_does_not_fit_the_samples_too_closely(monkeypatch):
    """Factors of 60 samples, and errors by those of their whole distribution."""
    random = np.random.default_rng(3)
    shape, settings = (64, 128), {"mode": "affine", "bits": 4, "group_size": 64}
    parts, grid = quantized(random, settings, shape)
    target = grid.take_apart(parts).dense()
    onto = Grid(settings | {"bits": 2}, mx.bfloat16)
    nearest = mx.quantize(mx.array(target).astype(mx.bfloat16), group_size=64, bits=2)
    whole = [factor(random, size, decay=40.0) for size in (shape[1], shape[0])]
    drawn = [random.multivariate_normal(np.zeros(len(m)), m, 60).astype(np.float32) for m in whole]
    samples = curvature(*(x.T @ x for x in drawn))

    def error(damping):
        monkeypatch.setattr(compensation, "COARSER_DAMPING", damping)
        rounded = round_module(parts, nearest, 0 * target, grid, onto, samples)
        found = stored_weight(onto, rounded) - target
        inputs, outputs, size = samples.damped(DAMPING)
        reported = size * weighted_error(found, inputs, outputs)
        assert rounded.outputs.error == pytest.approx(reported, rel=1e-3)
        return weighted_error(found, *map(mx.array, whole))

    assert error(COARSER_DAMPING) < 0.9 * error(DAMPING)


def test_a_delta_that_nearest_rounding_loses_is_kept():
    random = np.random.default_rng(2)
    parts, grid = quantized(random, AFFINE[2], (48, 256))
    start = grid.take_apart(parts)
    inputs, outputs = factor(random, 256, 3.0), factor(random, 48, 3.0)
    # Along the directions that matter most, as training has it.
    delta = np.linalg.eigh(outputs)[1][:, -1:] @ np.linalg.eigh(inputs)[1][:, -1:].T
    delta = (0.2 * np.abs(start.scales).min() * delta / np.abs(delta).max()).astype(np.float32)
    size = grid.group_size
    units = (start.dense() + delta - np.repeat(start.biases, size, 1)) / np.repeat(
        start.scales, size, 1
    )
    assert np.array_equal(grid.nearest(units), start.levels)  # all of it is lost
    found = compensated(start.dense() + delta, start, grid, inputs, outputs)
    metric = mx.array(inputs), mx.array(outputs)
    left = weighted_error(found.dense() - start.dense() - delta, *metric)
    assert left < 0.1 * weighted_error(delta, *metric)


def test_no_single_change_would_help_much():
    """Against each entry's neighbouring levels, tried one by one."""
    random = np.random.default_rng(3)
    parts, grid = quantized(random, {"mode": "affine", "bits": 4, "group_size": 32}, (3, 32))
    start = grid.take_apart(parts)
    inputs, outputs = factor(random, 32), factor(random, 3)
    target = start.dense() + 0.3 * start.scales * random.normal(size=(3, 32)).astype(np.float32)
    found = compensated(target, start, grid, inputs, outputs).levels

    def error(levels):
        difference = start._replace(levels=levels).dense() - target
        return weighted_error(difference, mx.array(inputs), mx.array(outputs))

    for row, column in np.ndindex(3, 32):
        for change in (-1, 1):
            levels = found.copy()
            levels[row, column] += change
            assert error(levels) > 0.7 * error(found)
    nearest = grid.nearest((target - start.biases) / start.scales)
    assert error(found) < 0.7 * error(nearest)


def test_refitted_is_the_least_squares_solution():
    random = np.random.default_rng(4)
    settings = {"mode": "affine", "bits": 4, "group_size": 32}
    parts, _ = quantized(random, settings, (6, 64))
    grid = Grid(settings, mx.float32)
    start = grid.take_apart(parts)
    inputs, outputs = factor(random, 64), factor(random, 6)
    target = (start.dense() + 0.1 * random.normal(size=(6, 64))).astype(np.float32)
    found = refitted(target, start, grid, mx.array(inputs), mx.array(outputs))
    # Columns of the linear map from scales and biases to Q, in the metric's square roots.
    left, right = np.linalg.cholesky(outputs).T, np.linalg.cholesky(inputs)
    columns = []
    for row, group in np.ndindex(6, 2):
        for values in (start.levels[row, group * 32 : group * 32 + 32], np.ones(32)):
            unit = np.zeros((6, 64))
            unit[row, group * 32 : group * 32 + 32] = values
            columns.append((left @ unit @ right).ravel())
    goal = (left @ (target - start.dense()) @ right).ravel()
    solution, *_ = np.linalg.lstsq(np.stack(columns, 1), goal, rcond=None)
    least = ((np.stack(columns, 1) @ solution - goal) ** 2).sum()
    before = weighted_error(start.dense() - target, mx.array(inputs), mx.array(outputs))
    after = weighted_error(found.dense() - target, mx.array(inputs), mx.array(outputs))
    assert least <= after * 1.001
    assert after - least < 0.02 * (before - least)


def test_refitting_never_harms_where_scales_are_coarse():
    """bfloat16 scales: rounding the fitted ones costs more than fitting them gained."""
    random = np.random.default_rng(6)
    settings = {"mode": "affine", "bits": 4, "group_size": 64}
    parts, grid = quantized(random, settings, (48, 256))
    start = grid.take_apart(parts)
    inputs, outputs = factor(random, 256), factor(random, 48)
    delta = 0.3 * start.scales.mean() * random.normal(size=(48, 256))
    target = (start.dense() + delta).astype(np.float32)
    found = compensated(target, start, grid, inputs, outputs)
    metric = mx.array(inputs), mx.array(outputs)
    fitted = refitted(target, found, grid, *metric)
    before, after = (weighted_error(part.dense() - target, *metric) for part in (found, fitted))
    assert after <= before


class _Shifted(nn.Module):
    """A layer whose outputs are shifted by a parameter, whose gradient is that by the outputs."""

    def __init__(self, linear, shape):
        super().__init__()
        self.linear, self.shift = linear, mx.zeros(shape)
        self.linear.freeze()

    def __call__(self, x):
        self.seen = mx.stop_gradient(x)
        return self.linear(x) + self.shift


def test_curvatures(model_path):
    """Against gradients by the outputs, sample by sample, of three samples of different length."""
    base = load_base_model(str(model_path))
    samples = [Sample(list(range(3, 3 + n)), 2) for n in (7, 12, 9)]
    name = "model.layers.1.self_attn.v_proj"
    linear = target_linears(base.model)[name]
    out_features, in_features = linear.weight.shape
    batches = list(batches_in_order(samples, 2, 64))
    modules = {name: (linear, (out_features, in_features))}
    total, factors = curvatures(base.model, modules, batches)
    found = factors[name]
    inputs, outputs, gradient, expected = 0, 0, 0, 0
    for sample in samples:
        tokens = mx.array([sample.tokens])
        counts = mx.array(sample.counts()[None])
        shifted = _Shifted(linear, (1, tokens.shape[1], out_features))
        replace_modules(base.model, {name: shifted})

        def loss(model, tokens=tokens, counts=counts):
            losses = nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])
            losses = losses * counts[:, 1:]
            return losses.sum()

        value, gradients = nn.value_and_grad(base.model, loss)(base.model)
        expected += value.item()
        *path, last = name.split(".")
        tree = gradients
        for part in (*path, last):
            tree = tree[int(part)] if part.isdigit() else tree[part]
        delta = np.array(tree["shift"][0])
        replace_modules(base.model, {name: linear})
        x = np.array(_seen(base.model, name, linear, tokens))
        weighted = x * np.linalg.norm(delta, axis=1, keepdims=True)
        inputs, outputs = inputs + weighted.T @ weighted, outputs + delta.T @ delta
        gradient = gradient + delta.T @ x
    assert total == pytest.approx(expected, rel=1e-5)
    assert np.abs(np.array(found.gradient) - gradient).max() < 1e-4 * np.abs(gradient).max()
    assert np.abs(np.array(found.inputs) - inputs).max() < 1e-4 * np.abs(inputs).max()
    assert np.abs(np.array(found.outputs) - outputs).max() < 1e-4 * np.abs(outputs).max()


def _seen(model, name, linear, tokens):
    shifted = _Shifted(linear, (1, 1, 1))
    replace_modules(model, {name: shifted})
    model(tokens)
    replace_modules(model, {name: linear})
    return shifted.seen[0]


def test_sums_of_a_half_precision_model(tmp_path):
    """Beyond float16's range, and to float32's precision."""
    model = load_base_model(str(save_model(tmp_path, dtype="float16"))).model
    model.model.layers[1].input_layernorm.weight *= 100
    name = "model.layers.1.self_attn.v_proj"
    linear = target_linears(model)[name]
    samples = [Sample(list(range(3, 3 + n)), 2) for n in (7, 12, 9)]
    squares = Tap(linear, [mx.zeros(())], lambda x, delta: [(x * x).sum()])
    _, sums = summed(model, {name: squares}, list(batches_in_order(samples, 2, 64)))
    seen = [_seen(model, name, linear, mx.array([sample.tokens])) for sample in samples]
    expected = sum(np.square(np.array(x).astype(np.float64)).sum() for x in seen)
    assert expected > 1e6
    assert sums[name][0].item() == pytest.approx(expected, rel=2e-3)


def export(tlora_here, run, output, *more):
    command = ("export", run, "--format", "merged", "--quantize", "--output", output)
    return tlora_here(*command, *more)


def test_the_command(trained, tmp_path, tlora_here):
    run, place = trained
    done = export(tlora_here, run, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "ours/survival.json").read_text())
    losses = measured["losses"]
    said = " ".join(done.stdout.split())
    assert f"{losses['kept']:.1%} of the adapter's improvement is left" in said
    assert "; 1 module rounded to nearest (expert, not quantized, or without" in said
    assert 0.9 < losses["kept"] < 1.1
    # A pass of their own over the same rows, with mlx-lm's model.
    base = load_base_model(str(tmp_path / "ours"))
    assert loss_of(base, place) == pytest.approx(losses["merged"], rel=1e-3)
    assert loss_of(load_base_model(str(place / "4bit")), place) == pytest.approx(
        losses["base"], rel=1e-3
    )
    assert export(tlora_here, run, tmp_path / "plain", "--rounding", "nearest").returncode == 0
    plain = loss_of(load_base_model(str(tmp_path / "plain")), place)
    assert losses["merged"] < plain
    card = (tmp_path / "ours/README.md").read_text()
    assert f"{losses['kept']:.1%} of the improvement is left" in card
    worst = max(measured["relative_output_errors"].values())
    assert f"| {worst:.3f} |" in card
    # Nothing but the adapted modules has changed.
    before, after = (target_weights(path) for path in (place / "4bit", tmp_path / "ours"))
    plan = json.loads((run / "rank_plan.json").read_text())["modules"]
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed <= {name for name, module in plan.items() if module["rank"]}
    assert (tmp_path / "ours/config.json").read_text() == (place / "4bit/config.json").read_text()


def loss_of(base, place, split="valid"):
    """The mean loss per counted token on the rows of a split."""
    from tlora_mlx.config.data_options import DataConfig
    from tlora_mlx.training.setup import read_data
    from tlora_mlx.training.validation import mean_loss

    data, _ = read_data(DataConfig(model=str(place / "4bit"), data=str(place / "data")))
    return mean_loss(base.model, batches_in_order(data[split].samples, 4, 2048))


def target_weights(path):
    targets = target_linears(load_base_model(str(path)).model)
    return {name: np.array(dense_weight(linear)) for name, linear in targets.items()}


def test_adjusting(trained, tmp_path, tlora_here, monkeypatch):
    """It takes the loss on samples to check by towards the adapter's, changing scales only."""
    run, _ = trained
    losses, files = [], [str(tmp_path / name) for name in ("rounded", "adjusted")]

    def rounded(task, weights, _, files):
        task.merge(weights, files)
        return {}

    for how, file in zip((rounded, requantize.adjusted), files, strict=True):

        def measured(task, weights, slopes, files, how=how):
            moved = how(task, weights, slopes, files)
            for name, parts in moved.items():
                task.place(weights[name], parts)
            losses.append((task.check_loss(), task.goal))
            return moved

        monkeypatch.setattr(requantize, "adjusted", measured)
        assert export(tlora_here, run, file).returncode == 0
    (before, goal), (after, same) = losses
    assert before > goal == same
    assert abs(after - goal) < 0.3 * (before - goal)
    before, after = (mx.load(f"{file}/model.safetensors") for file in files)
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed
    assert {name.rsplit(".", 1)[1] for name in changed} <= {"scales", "biases"}


def test_without_the_data(trained, tmp_path, tlora_here):
    run, place = trained
    config = json.loads((run / "adapter_config.json").read_text())
    gone = tmp_path / "run"
    gone.mkdir()
    for name in ("rank_plan.json", "adapters.safetensors"):
        (gone / name).write_bytes((run / name).read_bytes())

    def with_data(data):
        (gone / "adapter_config.json").write_text(json.dumps(config | {"data": data}))

    with_data("/nowhere")
    refused = export(tlora_here, gone, tmp_path / "out")
    assert_one_sentence(refused, 2, "name data with --data, or pass --rounding nearest")
    with_data(None)
    refused = export(tlora_here, gone, tmp_path / "out", "--rounding", "compensated")
    assert_one_sentence(refused, 2, "names none; name them with --data")
    assert not (tmp_path / "out").exists()
    plain = export(tlora_here, gone, tmp_path / "plain")
    assert plain.returncode == 0
    assert "rounded to nearest" in plain.stdout
    assert re.search("of the delta survives overall", " ".join(plain.stdout.split()))
    given = export(tlora_here, gone, tmp_path / "out", "--data", place / "data")
    assert given.returncode == 0, given.stderr
    assert (tmp_path / "out/survival.json").exists()
    for options, message in (
        (["--data", "d", "--rounding", "nearest"], "--data does nothing"),
        (["--rounding", "best"], "must be one of compensated, nearest"),
    ):
        assert_one_sentence(export(tlora_here, gone, tmp_path / "no", *options), 2, message)
    refused = tlora_here("export", gone, "--format", "merged", "--data", "d")
    assert_one_sentence(refused, 2, "--data is for --quantize")


def test_modules_on_which_no_loss_depends(trained, tmp_path, tlora_here):
    """With one token to attend to, queries and keys change nothing."""
    run, _ = trained
    write_jsonl(tmp_path / "data/train.jsonl", [{"text": "a"}])
    done = export(tlora_here, run, tmp_path / "out", "--data", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out/survival.json").read_text())
    plain, by_task = measured["rounded_to_nearest"], measured["relative_output_errors"]
    adapted = read_run(run).plan.adapted()
    assert set(plain) == {n for n in adapted if n.endswith(("q_proj", "k_proj"))}
    assert set(by_task) == adapted.keys() - set(plain)


def test_as_on_a_gpu(trained, tmp_path, tlora_here, monkeypatch):
    """Through quantized products, as on a Mac: the same rounding, nearly, and the same losses."""
    run, _ = trained
    assert export(tlora_here, run, tmp_path / "dense").returncode == 0
    monkeypatch.setattr(task, "make_dense", lambda model: None)
    assert export(tlora_here, run, tmp_path / "quantized").returncode == 0
    one, other = (
        json.loads((tmp_path / name / "survival.json").read_text())["losses"]
        for name in ("dense", "quantized")
    )
    for key in ("base", "adapter", "merged"):
        assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_experts_are_rounded_to_nearest_and_said_so(tmp_path, tlora_here):
    """What is not a stack of experts is rounded by the task; of mxfp4, no scale moves."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    original = save_model(tmp_path / "original", "qwen3_moe", **sizes)
    config = json.loads((original / "config.json").read_text())
    config |= {"num_experts": 4, "rope_theta": 1e4}  # where mlx-lm looks for them
    (original / "config.json").write_text(json.dumps(config))
    settings = {"quantize": True, "q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"}
    mlx_lm.convert(str(original), str(tmp_path / "4bit"), **settings)
    write_jsonl(tmp_path / "data/train.jsonl", ROWS[:4])
    options = {"target_experts": True, "target_modules": ["v_proj", "down_proj"], "iters": 2}
    run = quick_train(tmp_path / "4bit", tmp_path / "data", tmp_path / "run", **options)
    done = export(tlora_here, run, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out/survival.json").read_text())
    adapted = read_run(run).plan.adapted()
    experts = sorted(name for name in adapted if "switch_mlp" in name)
    assert experts
    assert measured["rounded_to_nearest"] == experts
    assert set(measured["relative_output_errors"]) == adapted.keys() - set(experts)
    said = " ".join(done.stdout.split())
    assert f"; {len(experts)} modules rounded to nearest (expert, " in said
    card = (tmp_path / "out/README.md").read_text()
    assert f"not by the task: {len(experts)} of {len(adapted)} modules" in card
    # A pass of its own over the same rows, through the stacks as they were written.
    merged = loss_of(load_base_model(str(tmp_path / "out")), tmp_path, "train")
    assert merged == pytest.approx(measured["losses"]["merged"], rel=1e-3)
