"""Adapters are combined like PEFT's ``add_weighted_adapter`` does it, on the same files."""

import json
import math
from collections import defaultdict, deque
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.adapters import KINDS, edit, make_run, peft_adapter
from helpers.commands import assert_one_sentence
from helpers.exports import export_peft
from helpers.logits import base_model, logits_of, mlx_logits, peft_logits
from peft import PeftModel

from tlora_mlx import Combination, UserError, combine, read_run, resolve_adapter
from tlora_mlx.adapters import combine as combining
from tlora_mlx.adapters.source import path_and_weight
from tlora_mlx.method.subspace import top_right_vectors

# Ranks differ from module to module and agree between the two; scales do neither.
FIRST = {"rank_pattern": {"q_proj": 2, "up_proj": 3}, "alpha_pattern": {"v_proj": 1}}
SECOND = {**FIRST, "lora_alpha": 3, "alpha_pattern": {"q_proj": 9}}
WEIGHTS = ([0.7, 0.4], [1.5, -0.6])


@pytest.fixture(scope="module")
def adapters(model_path, tmp_path_factory):
    """Two adapters of equal ranks, the second on fewer kinds of modules; a third of other ranks."""
    place = tmp_path_factory.mktemp("adapters")
    peft_adapter(model_path, place / "a", seed=1, **FIRST)
    peft_adapter(model_path, place / "b", seed=2, target_modules=KINDS[:-2], **SECOND)
    peft_adapter(model_path, place / "c", seed=3, r=3, target_modules=KINDS[2:])
    return place


@pytest.fixture(scope="module")
def in_peft(model_path, adapters):
    model = PeftModel.from_pretrained(base_model(model_path), adapters / "a", adapter_name="a")
    for name in ("b", "c"):
        model.load_adapter(adapters / name, name)
    return model


@pytest.fixture
def shared_masks(monkeypatch):
    """PEFT keeps the same random entries as we do: both visit the modules of a shape in order."""
    drawn = defaultdict(deque)

    def draw(shape, density, key):
        mask = mx.random.bernoulli(density, shape, key=key)
        drawn[tuple(shape)].append(np.array(mask).T)
        return mask

    def repeat(probabilities):
        return torch.tensor(drawn[tuple(reversed(probabilities.shape))].popleft()).float()

    monkeypatch.setattr(combining, "random_mask", draw)
    monkeypatch.setattr(torch, "bernoulli", repeat)
    return drawn


def by_peft(model, names, weights, kind, **options):
    """A (rank, in), B (out, rank) and the delta of each module, as PEFT combines them."""
    model.add_weighted_adapter(list(names), weights, "new", kind, **options)
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if "new" in getattr(layer, "lora_A", ()):
            assert layer.scaling["new"] == 1
            tensors = layer.lora_A["new"].weight, layer.lora_B["new"].weight
            tensors += (layer.get_delta_weight("new"),)
            found[name] = [tensor.detach().numpy() for tensor in tensors]
    model.delete_adapter("new")
    return found


def in_transformers_order(run):
    """The modules in the order of transformers, so that masks can be shared."""
    modules = run.plan.modules.items()
    order = sorted(modules, key=lambda item: (item[0].split(".")[2], KINDS.index(suffix(item[0]))))
    return replace(run, plan=replace(run.plan, modules=dict(order)))


def suffix(name):
    return name.rsplit(".", 1)[-1]


def by_us(adapters, names, weights, kind, density=1.0, **options):
    runs = [in_transformers_order(resolve_adapter(adapters / name)) for name in names]
    run = combine(runs, weights, Combination(kind, density, **options))
    found = {}
    for name, module in run.plan.adapted().items():
        assert module.scale == 1
        a, b = (np.array(run.tensors[f"{name}.{key}"]).T for key in ("lora_a", "lora_b"))
        found[name] = [a, b, b @ a]
    return found


def largest_difference(ours, theirs, which):
    assert ours.keys() == theirs.keys()
    pairs = [zip(ours[name][which], theirs[name][which], strict=True) for name in ours]
    return max(np.abs(x - y).max() for pair in pairs for x, y in pair)


A_B_DELTA, DELTA = slice(3), slice(2, 3)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("kind", "sign"),
    [
        ("linear", "total"),
        ("ties", "total"),
        ("ties", "frequency"),
        ("dare_linear", "total"),
        ("dare_ties", "total"),
        ("dare_ties", "frequency"),
    ],
)
def test_on_a_and_b(adapters, in_peft, shared_masks, kind, sign, weights):
    ours = by_us(adapters, "ab", weights, kind, 0.4, majority_sign=sign)
    options = {"density": 0.4, "majority_sign_method": sign}
    theirs = by_peft(in_peft, "ab", weights, kind, **options)
    assert not any(shared_masks.values())  # PEFT has used all of them
    assert bool(shared_masks) == kind.startswith("dare")
    assert largest_difference(ours, theirs, A_B_DELTA) < 1e-5


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd"])
def test_on_deltas(adapters, in_peft, shared_masks, kind, weights):
    """Ranks and kinds of modules differ; the factors are determined only up to signs."""
    options = {} if kind == "cat" else {"svd_rank": 5}
    density = {"density": 0.3} if "_" in kind else {}
    ours = by_us(adapters, "abc", [*weights, 0.9], kind, **density, **options)
    theirs = by_peft(in_peft, "abc", [*weights, 0.9], kind, **density, **options)
    assert not any(shared_masks.values())
    assert largest_difference(ours, theirs, DELTA) < 1e-5
    if kind == "svd":  # and no worse than is possible: what was cut off is what must be
        exact = by_us(adapters, "abc", [*weights, 0.9], "cat")
        for name, (a, _, delta) in ours.items():
            assert np.abs(a @ a.T - np.eye(len(a))).max() < 1e-5
            left = np.linalg.norm(exact[name][2] - delta)
            values = np.linalg.svd(exact[name][2], compute_uv=False)
            assert left == pytest.approx(np.linalg.norm(values[5:]), abs=1e-5)


def test_cat_is_the_weighted_sum(adapters):
    """Compared with the deltas themselves, not with PEFT's sum of them."""
    ours = by_us(adapters, "abc", [0.5, -2.0, 1.0], "cat")
    expected = defaultdict(float)
    for name, weight in zip("abc", [0.5, -2.0, 1.0], strict=True):
        for module, (_, _, delta) in by_us(adapters, [name], [weight], "cat").items():
            expected[module] = expected[module] + delta
    for name, (_, _, delta) in ours.items():
        assert np.abs(delta - expected[name]).max() < 1e-5
    run = resolve_adapter(adapters / "a")
    single = by_us(adapters, "a", [0.5], "cat")
    for name, module in run.plan.modules.items():
        a, b = run.tensors[f"{name}.lora_a"], run.tensors[f"{name}.lora_b"]
        delta = np.array(0.5 * module.scale * (a @ b)).T
        assert np.abs(single[name][2] - delta).max() < 1e-6


def test_portable_exports_are_combined_as_they_are(model_path, tmp_path):
    """Their padding makes the ranks equal, and counts when a share of the entries is kept."""
    for name, ranks in (("a", [0, 2, 5]), ("b", [7, 1, 3])):
        run = make_run(tmp_path / f"run-{name}", model_path, lambda i, shape, r=ranks: r[i % 3])
        export_peft(read_run(run), tmp_path / name)
    model = PeftModel.from_pretrained(base_model(model_path), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    for kind in ("linear", "ties"):
        ours = by_us(tmp_path, "ab", [0.7, 0.4], kind, 0.2)
        theirs = by_peft(model, "ab", [0.7, 0.4], kind, density=0.2)
        assert largest_difference(ours, theirs, A_B_DELTA) < 1e-5


def test_svd_uses_the_largest_rank_by_default(adapters, in_peft):
    ours = by_us(adapters, "ac", [1.0, 1.0], "svd")
    theirs = by_peft(in_peft, "ac", [1.0, 1.0], "svd")
    assert largest_difference(ours, theirs, DELTA) < 1e-5
    # The larger of the two is 4; a module in one adapter alone has no more than its own.
    ranks = {suffix(name): len(a) for name, (a, _, _) in ours.items()}
    assert (ranks["v_proj"], ranks["q_proj"]) == (4, 2)


def test_dare_keeps_the_share_and_the_expectation():
    """Without shared masks: the statistics are compared."""
    tensor = mx.full((500, 400), 2.0)
    kept = np.array(combining.keep_random(tensor, 0.3, mx.random.key(0)))
    assert set(np.unique(kept).tolist()) == {0.0, np.float32(2 / 0.3)}
    deviation = math.sqrt(0.3 * 0.7 / kept.size)
    assert abs((kept != 0).mean() - 0.3) < 4 * deviation
    again = np.array(combining.keep_random(tensor, 0.3, mx.random.key(0)))
    other = np.array(combining.keep_random(tensor, 0.3, mx.random.key(1)))
    assert (kept == again).all()
    assert 0.1 < (kept != other).mean() < 0.7


@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd"])
def test_every_adapter_and_module_draws_its_own_mask(adapters, shared_masks, kind):
    by_us(adapters, "aa", [1.0, 1.0], kind, 0.5)
    masks = [mask.tobytes() for masks in shared_masks.values() for mask in masks]
    assert len(set(masks)) == len(masks) == (28 if kind.endswith("svd") else 56)


def test_top_right_vectors_of_a_large_matrix():
    """Large enough for the iterative method; compared with numpy."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=(300, 12)) @ random.normal(size=(12, 200))
    matrix += 1e-3 * random.normal(size=(300, 200))
    found = np.array(top_right_vectors(mx.array(matrix, mx.float32), 10))
    values = np.linalg.svd(matrix, compute_uv=False)
    captured = np.linalg.norm(matrix @ found.T) ** 2 / (values[:10] ** 2).sum()
    assert captured > 1 - 1e-5
    assert np.abs(found @ found.T - np.eye(10)).max() < 1e-5


def test_the_command_combines_a_run_and_a_peft_adapter(model_path, adapters, tlora_here, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: [0, 2, 5][i % 3])
    both = ["export", "--adapter", f"{run}:0.5", "--adapter", f"{adapters / 'c'}:-1.5"]
    result = tlora_here(*both, "--output", tmp_path / "peft")
    assert (result.returncode, result.stderr) == (0, "")
    result = tlora_here(*both, "--output", tmp_path / "new", "--format", "run")
    assert (result.returncode, result.stderr) == (0, "")
    expected = mlx_logits(tmp_path / "new")
    assert np.abs(peft_logits(model_path, tmp_path / "peft") - expected).max() < 1e-4
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "combined from several with [tlora_mlx]" in card
    assert "- tlora\n" not in card
    made_from = json.loads((tmp_path / "new" / "adapter_config.json").read_text())["made_from"]
    assert made_from["combine"] == "cat"
    assert [part["weight"] for part in made_from["adapters"]] == [0.5, -1.5]

    # PEFT's own sum of the two, of what our exporter made of the run.
    export_peft(read_run(run), tmp_path / "exported")
    model = PeftModel.from_pretrained(base_model(model_path), tmp_path / "exported", "run")
    model.load_adapter(adapters / "c", "c")
    model.add_weighted_adapter(["run", "c"], [0.5, -1.5], "sum", "cat")
    model.set_adapter("sum")
    assert np.abs(logits_of(model) - expected).max() < 1e-4


def test_dare_is_reproducible_with_its_seed(adapters, tlora_here, tmp_path):
    def tensors(name, *options):
        command = ["export", "--adapter", adapters / "a", adapters / "b", "--format", "run"]
        command += ["--combine", "dare_ties_svd", "--density", 0.5, "--svd-rank", 2]
        result = tlora_here(*command, "--output", tmp_path / name, *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert {m.rank for m in read_run(tmp_path / name).plan.modules.values()} == {2}
        return (tmp_path / name / "adapters.safetensors").read_bytes()

    first = tensors("first", "--majority-sign-method", "frequency")
    assert first == tensors("again", "--majority-sign-method", "frequency")
    assert first != tensors("other", "--majority-sign-method", "frequency", "--seed", 1)
    assert first != tensors("total")


def test_adapters_that_cannot_be_combined(model_path, adapters, tmp_path):
    a, b, c = (resolve_adapter(adapters / name) for name in "abc")
    with pytest.raises(
        UserError, match=r"linear needs equal ranks, but .*v_proj has the ranks 4, 3"
    ):
        combine([a, c], [1, 1], Combination("linear"))
    other = make_run(tmp_path / "other", model_path, lambda i, shape: 2, base_model="some/where")
    with pytest.raises(UserError, match=rf"is of {model_path} \(llama\), .* of some/where"):
        combine([a, read_run(other)], [1, 1], Combination())
    assert combine([a, read_run(other)], [1, 1], Combination(), "some/where").plan.adapted()
    family = make_run(tmp_path / "family", model_path, lambda i, shape: 2, model_type="qwen2")
    with pytest.raises(UserError, match=r"\(llama\), .*\(qwen2\)"):
        combine([a, read_run(family)], [1, 1], Combination(), str(model_path))
    edit(other, base_model=str(model_path))
    run = read_run(other)
    name = "model.layers.0.self_attn.q_proj"
    run.plan.modules[name] = type(run.plan.modules[name])(2, 1.0, 1.0, 48, 30)
    with pytest.raises(UserError, match=r"q_proj has the shapes \(48, 48\), \(48, 30\)"):
        combine([a, run], [1, 1], Combination())
    for kind in ("cat", "svd", "dare_linear_svd"):
        with pytest.raises(UserError, match="cannot be combined with these weights: entries"):
            combine([a, b], [1e30, 1e39], Combination(kind))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either RUN or --adapter"),
        (["RUN", "--adapter", "a:1"], "give either RUN or --adapter"),
        (["--adapter", "a:1"], "--adapter needs --output"),
        (["--adapter", "a:x", "--output", "o"], "--adapter a:x: the weight after the colon is no"),
        (["--adapter", "a:inf", "--output", "o"], "is not a finite number"),
        (["--adapter", "a:1", "--output", "o"], "adapter directory a does not exist"),
        (
            ["--adapter", "a", "--output", "o", "--combine", "ties"],
            "--combine ties needs --density",
        ),
        (["RUN", "--combine", "svd"], "--combine does nothing without --adapter"),
        (
            ["--adapter", "a", "--output", "o", "--svd-rank", 4],
            "--svd-rank does nothing with --combine cat",
        ),
        (
            ["--adapter", "a", "--output", "o", "--combine", "svd", "--density", 0.5],
            "--density does nothing with --combine svd",
        ),
        (["--adapter", "a", "--output", "o", "--combine", "slerp"], "must be one of cat, svd"),
        (
            ["RUN", "--format", "run", "--push-to", "me/it"],
            "--push-to cannot be used with --format run, which no other tool loads",
        ),
    ],
)
def test_incompatible_combine_options(tlora_here, options, message):
    assert_one_sentence(tlora_here("export", *options), 2, message)


def test_messages_name_what_was_combined(model_path, adapters, tmp_path):
    parts = [resolve_adapter(adapters / name, str(model_path)) for name in "ab"]
    combined = combine(parts, [1, 1], Combination())
    assert combined.label == f"{adapters / 'a'} + {adapters / 'b'}"
    assert combine(parts[:1], [1], Combination()).label == str(adapters / "a")


def test_a_dtype_or_layout_that_does_not_exist(model_path, tmp_path):
    run = read_run(make_run(tmp_path / "run", model_path, lambda i, shape: 2))
    with pytest.raises(UserError, match="dtype 'float8' is none of float32, float16, bfloat16"):
        export_peft(run, tmp_path / "out", dtype="float8")
    with pytest.raises(UserError, match="layout 'wide' is none of portable"):
        export_peft(run, tmp_path / "out", layout="wide")
    assert not (tmp_path / "out").exists()


def test_a_colon_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    assert path_and_weight("run:2") == ("run:2", 1)
    assert path_and_weight("run:2:-0.5") == ("run:2", -0.5)
    assert path_and_weight("other:2") == ("other", 2)
    assert path_and_weight("other") == ("other", 1)
