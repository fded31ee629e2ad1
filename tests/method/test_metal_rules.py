"""Users run on Metal, which is missing here: what would fail on it stays in one module."""

import ast

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import ROOT

from tlora_mlx.method import linalg

SOURCES = sorted((ROOT / "tlora_mlx").rglob("*.py"))


def attributes(path):
    tree = ast.parse(path.read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        alias.name.rsplit(".", 1)[-1]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if getattr(node, "module", "") != "tlora_mlx.method"
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_float64_and_factorisations_stay_in_linalg(path):
    names = {"float64"} if "subspace" in path.name else {"float64", "linalg"}
    if path.name != "linalg.py":
        assert not attributes(path) & names
    # subspace.py calls our linalg, and mx.linalg nowhere.
    if path.name != "linalg.py":
        assert "mx.linalg" not in ast.unparse(ast.parse(path.read_text())).replace('"', "")


def test_linalg_names_the_cpu_stream_in_every_call():
    tree = ast.parse((ROOT / "tlora_mlx/method/linalg.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("mx.linalg.")
    ]
    assert calls
    for call in calls:
        streams = [ast.unparse(k.value) for k in call.keywords if k.arg == "stream"]
        assert streams == ["mx.cpu"]


def test_linalg_evaluates_before_it_returns():
    """Every result of a factorisation is passed to a later ``mx.eval`` in the same function."""
    tree = ast.parse((ROOT / "tlora_mlx/method/linalg.py").read_text())
    checked = 0
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        evaluated = [
            (node.lineno, {ast.unparse(argument) for argument in node.args})
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "mx.eval"
        ]
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and "mx.linalg." in ast.unparse(node.value):
                names = set(ast.unparse(node.targets[0]).strip("()").split(", "))
                assert any(names <= found for line, found in evaluated if line > node.lineno)
                checked += 1
        returned = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
        assert not any("mx.linalg" in ast.unparse(node) for node in returned)
    assert checked == ast.unparse(tree).count("= mx.linalg.")


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_thin_factorisations_in_float32(shape, dtype):
    mx.random.seed(0)
    matrix = mx.random.normal(shape).astype(dtype)
    exact = np.array(matrix.astype(mx.float32))
    u, s, vt = linalg.svd(matrix)
    k = min(shape)
    assert (u.shape, s.shape, vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert {u.dtype, s.dtype, vt.dtype} == {mx.float32}
    assert np.abs(np.array((u * s) @ vt) - exact).max() < 1e-5
    assert np.allclose(np.array(s), np.linalg.svd(exact, compute_uv=False), atol=1e-5)
    q, r = linalg.qr(matrix)
    assert q.shape == (shape[0], k)
    assert np.abs(np.array(q @ r) - exact).max() < 1e-5
