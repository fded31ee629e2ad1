"""Whatever the files of a run or a model contain: a complete export, or one sentence and exit 2."""

import json
import shutil

import mlx_lm
import pytest
from helpers.adapters import make_run, zero_one_cap
from helpers.logits import base_model
from helpers.models import save_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FORMATS = {
    "peft": [],
    "compact": ["--layout", "compact"],
    "mlx-lm": ["--format", "mlx-lm"],
    "merged": ["--format", "merged"],
    "dequantized": ["--format", "merged", "--dequantize"],
    "requantized": ["--format", "merged", "--quantize"],
}
RUN = [f"run/{name}" for name in ("adapter_config.json", "rank_plan.json", "adapters.safetensors")]
MODEL = ["model/config.json", "model/model.safetensors.index.json"]
MODEL += ["model/model-00002-of-00003.safetensors"]
CONVERSION = ["4bit/config.json", "4bit/model.safetensors"]
# What each format reads.
FILES = dict.fromkeys(FORMATS, RUN) | {"merged": RUN + MODEL}
FILES |= dict.fromkeys(("dequantized", "requantized"), RUN + CONVERSION)
CASES = [(kind, file) for kind, files in FILES.items() for file in files]
JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, 10**400, -1, 0.5, float("nan"), float("inf"), [], {}, [[]], "\0", ""]),
    st.sampled_from(
        ["../x", "/etc/passwd", "~nobody/x", "x" * 5000, "a/b", "\ud800", "F32", "llama"]
    ),
    st.text(max_size=4),
    st.lists(st.integers(-2, 200), max_size=3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in three files, its 4-bit conversion, and a run on the latter."""
    place = tmp_path_factory.mktemp("fuzz")
    whole = save_model(
        place / "whole", hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=270
    )
    base_model(whole).save_pretrained(place / "model", max_shard_size="60KB")
    shutil.copyfile(whole / "tokenizer.json", place / "model" / "tokenizer.json")
    mlx_lm.convert(str(whole), str(place / "4bit"), quantize=True, q_bits=4, q_group_size=32)
    make_run(place / "run", place / "4bit", zero_one_cap, base_model=str(place / "model"))
    assert all((place / file).exists() for _, file in CASES)
    return place


def spots(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(inner, (*path, key))


def changed_json(data, value):
    """A JSON value with one spot replaced, or removed."""
    places = [path for path in spots(value) if path]
    path = data.draw(st.sampled_from(places))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.integers(0, 4)) == 0:
        del inner[path[-1]]
    else:
        inner[path[-1]] = data.draw(JSON)
    return json.dumps(value)


def changed(data, file, content):
    """A file's bytes, damaged: cut, with a byte changed, or with one JSON value replaced."""
    way = data.draw(st.sampled_from(["json", "json", "json", "cut", "byte", "length"]))
    tensors = file.suffix == ".safetensors"
    length = int.from_bytes(content[:8], "little") if tensors else 0
    if way == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    if way == "byte":
        # In a weight file most often in its header.
        end = 8 + length if tensors and data.draw(st.integers(0, 3)) else len(content)
        at = data.draw(st.integers(0, end - 1))
        return content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    if way == "length" and tensors:
        number = data.draw(st.sampled_from([0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1]))
        return number.to_bytes(8, "little") + content[8:]
    if tensors:
        header = changed_json(data, json.loads(content[8 : 8 + length])).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    return changed_json(data, json.loads(content)).encode()


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), case=st.sampled_from(CASES))
def test_any_damage(place, capsys, data, case):
    from tlora_mlx.export import main

    kind, file = case
    path, out = place / file, place / "out"
    whole = path.read_bytes()
    before = set(place.rglob("*"))
    path.write_bytes(changed(data, path, whole))
    capsys.readouterr()
    try:
        code = main([str(place / "run"), "--output", str(out), *FORMATS[kind]])
        errors = capsys.readouterr().err
        if code == 0:
            assert not errors
            assert any(out.glob("*.safetensors"))
            shutil.rmtree(out)
        else:
            assert code == 2, errors
            assert errors.startswith("error: ")
            assert errors.strip().count("\n") == 0
        assert set(place.rglob("*")) == before
    finally:
        shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(whole)
