"""GGUF adapters and models, in llama.cpp itself."""

import re

import gguf
import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import make_run, without_effect, zero_one_cap
from helpers.commands import assert_one_sentence
from helpers.corruption import finds_every_wrong_write
from helpers.families import VARIANTS
from helpers.llama_cpp import LlamaCpp, convert, rarely
from helpers.logits import TOKENS, mlx_logits
from helpers.models import save_model
from helpers.paths import ROOT

import tlora_mlx
from tlora_mlx import (
    export_gguf,
    export_gguf_adapter,
    load_adapter,
    load_base_model,
    read_adapter,
    read_run,
)
from tlora_mlx.adapters.readers import readings
from tlora_mlx.models.llama_cpp import FAMILIES

# What llama.cpp assumes and the tiny checkpoints of tests/helpers/families.py do not have.
GEMMA3 = {
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "sliding_window": 64,
}
SETTINGS = {
    "gemma3_text": GEMMA3,
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# llama.cpp's GELU is a table of float16.
GELU = ("gemma", "gemma2", "gemma3", "gemma3_text")
OFTEN = ("qwen3", "phi3", "gemma2", "mixtral")


def tiny(family, path):
    settings = dict(SETTINGS.get(family, {}))
    if family == "gemma3":
        from helpers.families import COMMON
        from helpers.families import GEMMA3 as SMALL

        text = {**COMMON, **SMALL, **GEMMA3, "model_type": "gemma3_text"}
        settings = {"text_config": text}
    return save_model(path, family, **settings)


def difference(llama_cpp, expected):
    found = [llama_cpp.logits(tokens) for tokens in TOKENS]
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


def greedy(model, tokens, count, ends=()):
    """The next tokens by MLX."""
    new = []
    while len(new) < count and not (new and new[-1] in ends):
        logits = model(mx.array([[*tokens, *new]]))[0, -1]
        new.append(logits.argmax().item())
    return new


def check_in_llama_cpp(run, root, tolerance=1e-3):
    """The adapter on the base and the merged model give MLX's logits and its next 40 tokens."""
    run = read_run(run)
    export_gguf(without_effect(run), root / "base", outtype="f32")
    export_gguf(run, root / "merged", outtype="f32")
    export_gguf_adapter(run, root / "adapter")
    base = root / "base" / "model.gguf"
    loaded = load_adapter(run)
    expected = np.array(loaded.model(mx.array(TOKENS)))
    plain = np.array(load_base_model(run.model).model(mx.array(TOKENS)))
    assert np.abs(expected - plain).max() > 0.1
    own = difference(LlamaCpp(base), plain)
    assert own < tolerance
    text = greedy(loaded.model, TOKENS[0], 40, loaded.tokenizer.eos_token_ids)
    for read in (
        LlamaCpp(root / "merged/model.gguf"),
        LlamaCpp(base, root / "adapter/adapter.gguf"),
    ):
        assert difference(read, expected) < max(1e-3, 2 * own)
        assert read.greedy(TOKENS[0], 40) == text


@pytest.mark.parametrize(
    "family",
    [f if f in OFTEN else pytest.param(f, marks=rarely) for f in sorted(FAMILIES)],
)
def test_a_family_in_llama_cpp(family, tmp_path):
    model_path = tiny(family, tmp_path / "model")
    run = make_run(tmp_path / "run", model_path, zero_one_cap, experts=family in MIXTURES)
    check_in_llama_cpp(run, tmp_path, 5e-3 if family in GELU else 1e-4)


ROPES = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=rarely) for kind in ROPES])
def test_kinds_of_rope_in_llama_cpp(kind, tmp_path):
    original = {} if kind == "linear" else {"original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind], **original}
    family = "qwen3" if kind == "yarn" else "llama"
    model_path = save_model(tmp_path / "model", family, rope_parameters=rope)
    run = make_run(tmp_path / "run", model_path, zero_one_cap)
    check_in_llama_cpp(run, tmp_path, 1e-4)


def test_the_example_in_llama_cpp(tmp_path):
    run = make_run(tmp_path / "run", ROOT / "examples/model", lambda i, shape: i % 3)
    check_in_llama_cpp(run, tmp_path)


@rarely
def test_gpt2_goes_to_llama_cpp_merged(tmp_path):
    """Its converter makes a file of an adapter that llama.cpp refuses, as ``inspect`` says."""
    model_path = save_model(tmp_path / "model", "gpt2")
    run = read_run(make_run(tmp_path / "run", model_path, zero_one_cap))
    expected = mlx_logits(run)
    tlora_mlx.export_merged(run, tmp_path / "merged")
    convert("base", tmp_path / "merged", tmp_path / "merged.gguf")
    assert difference(LlamaCpp(tmp_path / "merged.gguf"), expected) < 5e-3
    plain = np.array(load_base_model(run.model).model(mx.array(TOKENS)))
    assert np.abs(expected - plain).max() > 0.1
    tlora_mlx.export_peft(run, tmp_path / "peft")
    convert("lora", tmp_path / "peft", model_path, tmp_path / "lora.gguf")
    with pytest.raises(AssertionError, match="does not load"):
        LlamaCpp(tmp_path / "merged.gguf", tmp_path / "lora.gguf")  # of the base's shapes
    found = {r.reader: r for r in readings(read_adapter(tmp_path / "peft"), "gpt2")}
    fault, remedy = found["llama.cpp"].fault, found["llama.cpp"].remedy
    assert (fault, remedy) == ("loads no adapters for gpt2", "--format merged")


@rarely
def test_multimodal_names_in_llama_cpp(tmp_path):
    """Its converter takes the names of the whole model; of Mistral 3 it writes the base instead."""
    model_path = save_model(tmp_path / "model", "qwen3_vl")
    run = read_run(make_run(tmp_path / "run", model_path, zero_one_cap))
    tlora_mlx.export_peft(run, tmp_path / "peft")
    convert("base", model_path, tmp_path / "base.gguf")
    convert("lora", tmp_path / "peft", model_path, tmp_path / "lora.gguf")
    adapted = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert difference(adapted, mlx_logits(run)) < 1e-4
    model_path = save_model(tmp_path / "mistral", "mistral3", **VARIANTS["mistral3"])
    run = read_run(make_run(tmp_path / "mistral-run", model_path, zero_one_cap))
    tlora_mlx.export_peft(run, tmp_path / "mistral-peft")
    convert("lora", tmp_path / "mistral-peft", model_path, tmp_path / "mistral.gguf")
    written = gguf.GGUFReader(tmp_path / "mistral.gguf")
    assert "token_embd.weight" in {tensor.name for tensor in written.tensors}
    found = {r.reader: r for r in readings(read_adapter(tmp_path / "mistral-peft"), "mistral3")}
    assert found["llama.cpp"].fault == "loads no adapters for mistral3"


@rarely
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_converts_our_exports_to_the_same(family, tmp_path):
    """Its converters read merged and portable; tensors and settings equal those of our GGUF."""
    model_path = tiny(family, tmp_path / "model")
    run = read_run(make_run(tmp_path / "run", model_path, zero_one_cap))
    expected = mlx_logits(run)
    tlora_mlx.export_merged(run, tmp_path / "merged")
    tlora_mlx.export_peft(run, tmp_path / "peft")
    convert("base", tmp_path / "merged", tmp_path / "theirs.gguf")
    convert("base", model_path, tmp_path / "base.gguf")
    convert("lora", tmp_path / "peft", model_path, tmp_path / "lora.gguf")
    assert difference(LlamaCpp(tmp_path / "theirs.gguf"), expected) < 1e-4
    adapted = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert difference(adapted, expected) < 1e-4
    export_gguf(run, tmp_path / "gguf", outtype="f32")
    theirs, ours = (
        gguf.GGUFReader(path) for path in (tmp_path / "theirs.gguf", tmp_path / "gguf/model.gguf")
    )
    tensors = {tensor.name: tensor.data for tensor in ours.tensors}
    assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_allclose(tensors[tensor.name], tensor.data, atol=1e-6)
    for name, field in theirs.fields.items():
        if not name.startswith(("GGUF.", "general.")):
            assert ours.fields[name].contents() == pytest.approx(field.contents()), name


@rarely
def test_llama_cpp_takes_rslora_for_lora(tmp_path):
    """Its converter keeps alpha and not ``use_rslora``: its scale is alpha / r, as it is ours."""
    run = read_run(make_run(tmp_path / "run", ROOT / "examples/model", zero_one_cap))
    tlora_mlx.export_peft(run, tmp_path / "peft")
    config = tmp_path / "peft/adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    convert("base", run.model, tmp_path / "base.gguf")
    convert("lora", tmp_path / "peft", run.model, tmp_path / "lora.gguf")
    adapted = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert difference(adapted, mlx_logits(run)) < 1e-4
    found = {r.reader: r.fault for r in readings(read_adapter(tmp_path / "peft"), "llama")}
    assert (found["llama.cpp"] is None, found["PEFT, transformers"]) == (False, None)


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """Rows of 64 and 96, which quantized types can hold."""
    root = tmp_path_factory.mktemp("wide")
    model_path = save_model(root / "model", "qwen3", hidden_size=64, intermediate_size=96)
    return read_run(make_run(root / "run", model_path, zero_one_cap))


def test_types(wide_run, tmp_path):
    expected = mlx_logits(wide_run)
    within = {"f16": 0.01, "bf16": 0.1, "q8_0": 0.2, "q5_1": 2, "q5_0": 3, "q4_1": 3, "q4_0": 4}
    sizes = []
    for outtype, tolerance in within.items():
        proof = export_gguf(wide_run, tmp_path / outtype, outtype=outtype)
        assert ("survives" in proof.summary()) == outtype.startswith("q")
        file = tmp_path / outtype / "model.gguf"
        sizes.append(file.stat().st_size)
        found = difference(LlamaCpp(file), expected)
        assert tolerance / 100 < found < tolerance, (outtype, found)
    assert sizes[0] == sizes[1]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_every_wrong_write_of_a_model_is_found(wide_run, tmp_path, monkeypatch):
    for outtype in ("bf16", "q4_1"):
        finds_every_wrong_write(
            lambda output, outtype=outtype: export_gguf(wide_run, output, outtype=outtype),
            tmp_path,
            monkeypatch,
            more_than=20,
            match="wrong|overflows|not finite",
        )
        monkeypatch.undo()
        (tmp_path / "counted").rename(tmp_path / f"counted-{outtype}")


def test_a_wrong_adapter_is_found(wide_run, tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor

    def corrupted(writer, name, data, **options):
        if name == "blk.1.attn_k.weight.lora_b":
            data = data[::-1].copy()
        add(writer, name, data, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", corrupted)
    with pytest.raises(tlora_mlx.RunError, match=r"layers\.1\.self_attn\.k_proj is wrong"):
        export_gguf_adapter(wide_run, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_dtypes_of_an_adapter(wide_run, tmp_path):
    expected = mlx_logits(wide_run)
    export_gguf(without_effect(wide_run), tmp_path / "base", outtype="f32")
    for dtype, tolerance in (("float16", 2e-2), ("bfloat16", 2e-1)):
        export_gguf_adapter(wide_run, tmp_path / dtype, dtype=dtype)
        read = LlamaCpp(tmp_path / "base/model.gguf", tmp_path / dtype / "adapter.gguf")
        assert tolerance / 1000 < difference(read, expected) < tolerance


def test_the_command(wide_run, tmp_path, tlora_here):
    command = ("export", wide_run.directory, "--format", "gguf")
    done = tlora_here(*command, "--output", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert f"llama-cli -m base.gguf --lora {tmp_path}/adapter/adapter.gguf" in done.stdout
    done = tlora_here(*command, "--merged", "--outtype", "q8_0", "--output", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert re.search(r"in q8_0: \d+\.\d% of the delta survives", done.stdout)
    assert f"llama-cli -m {tmp_path}/model/model.gguf" in done.stdout
    names = {"README.md", "rank_plan.png"}
    for directory, own in (("adapter", {"adapter.gguf"}), ("model", {"model.gguf", "Modelfile"})):
        assert {path.name for path in (tmp_path / directory).iterdir()} == names | own
        assert "llama.cpp" in (tmp_path / directory / "README.md").read_text()


def test_what_cannot_be_gguf(tmp_path, tlora_here, wide_run, monkeypatch):
    gpt2 = make_run(tmp_path / "gpt2", save_model(tmp_path / "m", "gpt2"), lambda i, shape: 2)
    windows = save_model(tmp_path / "w", "gemma3_text", sliding_window=64)
    gemma3 = make_run(tmp_path / "gemma3", windows, lambda i, shape: 2)
    monkeypatch.chdir(tmp_path)
    for run, options, message in (
        (gpt2, [], "family 'gpt2' cannot be written as GGUF (known: gemma, gemma2,"),
        (gpt2, ["--merged"], "--format merged, and convert that with llama.cpp's"),
        (gemma3, ["--merged"], "layer_types is not 'full_attention' in every 6th layer alone"),
        (wide_run.directory, ["--outtype", "q8_0"], "--outtype needs --merged"),
        (wide_run.directory, ["--merged", "--dtype", "float16"], "choose --outtype"),
    ):
        done = tlora_here("export", run, "--format", "gguf", *options)
        assert_one_sentence(done, 2, message)
        assert not list(run.parent.glob("*-gguf*"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    done = tlora_here("export", wide_run.directory, "--format", "gguf")
    assert_one_sentence(done, 2, "install it with: pip install 'tlora-mlx[gguf]'")
