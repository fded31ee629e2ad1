"""Whatever the files of PEFT's and mlx-lm's adapters hold: an adapter, or one sentence, soon."""

import json
import shutil

import pytest
from helpers.paths import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tlora_mlx import UserError, read_adapter
from tlora_mlx.adapters import peft_patterns
from tlora_mlx.storage.safetensors import TensorFile

KEPT = ROOT / "tests/compatibility/version_0_1_0"
TENSORS = {"peft-compact": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}
LAYER = "base_model.model.model.layers.{}.self_attn.v_proj.lora_A.weight"
ODD = st.one_of(
    st.sampled_from(
        [None, True, 0, -1, 10**7, 10**30, 10**400, 5e-324, 1e308, float("nan"), [], {}]
    ),
    st.sampled_from(
        [*"\0²٣", "\ud800", "x" * 5000, "9" * 5000, LAYER.format("9" * 5000), "[[", "("]
    ),
    st.sampled_from(["F64", "F8_E5M2", "F8_E4M3", "F4", "BOOL", "U32", "BF16"]),
    st.just({"(a+)+$": 3, "a{99999}" * 9: 2, "(" * 900: 1, "(?R)": 1}),
    st.lists(st.integers(-2, 2**40), max_size=3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return shutil.copytree(KEPT, tmp_path_factory.mktemp("fuzz") / "kept")


def spots(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(inner, (*path, key))


def changed(data, value):
    """A value with one spot replaced, or under another key."""
    *path, last = data.draw(st.sampled_from([spot for spot in spots(value) if spot]))
    inner = value
    for key in path:
        inner = inner[key]
    odd = data.draw(ODD)
    if isinstance(inner, dict) and isinstance(odd, str) and data.draw(st.booleans()):
        inner[odd] = inner.pop(last)
    else:
        inner[last] = odd
    return value


def with_header(whole, change):
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), kind=st.sampled_from(list(TENSORS)), tensors=st.booleans())
def test_any_adapter(place, data, kind, tensors):
    path = place / kind / (TENSORS[kind] if tensors else "adapter_config.json")
    whole = path.read_bytes()
    if tensors:
        path.write_bytes(with_header(whole, lambda header: changed(data, header)))
    else:
        path.write_text(json.dumps(changed(data, json.loads(whole))))
    try:
        assert read_adapter(place / kind).plan.modules
    except UserError:
        pass
    finally:
        path.write_bytes(whole)


def edited(place, kind, **changes):
    path = place / kind / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return place / kind


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"([a-z._0-9]|[a-z._0-9])*[!?]", "matching it takes too long"),
        ("((((a{1000}){1000}){1000}){1000})", "it is too long, or repeats too often"),
        ("a" * 2000, "it is too long, or repeats too often"),
        ("(?R)", "which is not a regular expression"),
        ("(" * 900, "which is not a regular expression"),
    ],
)
def test_patterns_that_would_never_end(tmp_path, monkeypatch, pattern, message):
    monkeypatch.setattr(peft_patterns, "SECONDS_OF_MATCHING", 0.2)
    place = shutil.copytree(KEPT, tmp_path / "kept")
    with pytest.raises(UserError, match=message) as error:
        read_adapter(edited(place, "peft-compact", rank_pattern={pattern: 3}))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("kind", TENSORS)
def test_dtypes_that_mlx_does_not_have(tmp_path, kind):
    place = shutil.copytree(KEPT, tmp_path / "kept")
    path = place / kind / TENSORS[kind]
    name = next(iter(TensorFile(path, "it")))

    def smaller(header):
        rows, columns = header[name]["shape"]
        header[name] = {**header[name], "dtype": "F64", "shape": [rows, columns // 2]}
        return header

    path.write_bytes(with_header(path.read_bytes(), smaller))
    with pytest.raises(UserError, match="has dtype F64, which MLX does not support"):
        read_adapter(place / kind)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("peft-compact", {"r": 10**400}),
        ("peft-compact", {"lora_alpha": 10**400}),
        ("peft-compact", {"alpha_pattern": {"v_proj": 1e308}}),
        ("mlx-lm", {"lora_parameters": {"rank": 10**400, "scale": 1.5}}),
        ("mlx-lm", {"lora_parameters": {"rank": 4, "scale": 1e308}}),
    ],
)
def test_numbers_that_are_no_ranks_and_scales(tmp_path, kind, changes):
    place = shutil.copytree(KEPT, tmp_path / "kept")
    with pytest.raises(UserError, match="above 0"):
        read_adapter(edited(place, kind, **changes))
