"""Model cards describe the run correctly, and say nothing that they must not say."""

import json
import re
import sys

import pytest
from helpers.adapters import make_run
from helpers.commands import quick_train
from helpers.exports import export_peft
from helpers.models import write_jsonl
from huggingface_hub import ModelCard, constants

from tlora_mlx import Combination, combine, read_run, resolve_adapter
from tlora_mlx.publishing.card import write_card


def exported(run, path, layout="portable", base_model=None, repository=None):
    """A PEFT export with its card."""
    write_card(
        export_peft(run, path, layout, base_model=base_model), run, "peft", base_model, repository
    )
    return path


def card_of(directory):
    return ModelCard((directory / "README.md").read_text())


def rows(card, first):
    """The cells of the table whose heading begins with this."""
    table = card.text[card.text.index(f"| {first} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


@pytest.fixture(scope="module")
def tested_run(model_path, data_path, tmp_path_factory):
    return quick_train(model_path, data_path, tmp_path_factory.mktemp("runs") / "run", test=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give the Hub's client an empty cache; returns a function that puts a model's card there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(repository, front_matter):
        place = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
        (place / "snapshots" / ("a" * 40) / "README.md").write_text(f"---\n{front_matter}\n---\n")

    return put


def test_a_card_describes_its_run(tested_run, data_path, tmp_path, cache):
    cache("maker/base", "license: apache-2.0\nlanguage: [en, de]")
    run = read_run(tested_run)
    adapter = exported(run, tmp_path / "mine", base_model="maker/base")
    card = card_of(adapter)
    assert card.data.to_dict() == {
        "base_model": "maker/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["tlora", "tlora_mlx", "lora"],
    }
    assert (adapter / "rank_plan.png").read_bytes().startswith(b"\x89PNG")
    assert "(rank_plan.png)" in card.text
    # Every module's rank and scale.
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    for block, *cells in rows(card, f"block | {' | '.join(kinds)}"):
        for kind, cell in zip(kinds, cells, strict=True):
            part = "mlp" if kind in ("gate_proj", "down_proj", "up_proj") else "self_attn"
            module = run.plan.modules[f"model.layers.{block}.{part}.{kind}"]
            assert cell == f"{module.rank}×{module.scale:.3g}"
    # The losses that metrics.jsonl ends with.
    reports = [json.loads(line) for line in (tested_run / "metrics.jsonl").read_text().splitlines()]
    value = {(k, r["iteration"]): v for r in reports for k, v in r.items() if k.endswith("_loss")}
    assert [cells[1:] for cells in rows(card, "loss (nats per token)")] == [
        ["6", f"{value['train_loss', 6]:.4f}"],
        ["0", f"{value['val_loss', 0]:.4f}"],
        ["6", f"{value['val_loss', 6]:.4f}"],
        ["0", f"{value['test_loss', 0]:.4f}"],
        ["6", f"{value['test_loss', 6]:.4f}"],
    ]
    settings = dict(rows(card, "setting"))
    assert settings["`--learning-rate`"] == "0.01"
    assert settings["`--iters`"] == "6"
    assert f"Data: the directory `{data_path.name}`; 180 tokens counted in the loss." in card.text
    assert f"mlx-lm {run.config['versions']['mlx-lm']}" in card.text


def test_a_card_contains_no_paths(tested_run, model_path, tmp_path):
    """Model, data and run are directories on this machine: the card has only their names."""
    card = (exported(read_run(tested_run), tmp_path / "mine") / "README.md").read_text()
    assert model_path.name in card
    paths = (model_path, tested_run, tmp_path)
    assert not any(part in card for path in paths for part in (str(path), str(path.parent)))
    assert not re.search(r"(?<![\w/:.])/\w", card)
    assert ModelCard(card).data.base_model is None


def test_the_lowest_loss_is_the_kept_adapters(model_path, data_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2, data="maker/set")
    losses = [(0, 3.0), (2, 1.5), (4, 2.5)]
    write_jsonl(run / "metrics.jsonl", [{"iteration": i, "val_loss": v} for i, v in losses])
    with (run / "metrics.jsonl").open("a") as file:
        for odd in (10**400, "1", None, [], True):  # another tool's, or damaged
            report = {"iteration": 5, "val_loss": odd, "trained_tokens": odd}
            file.write(f"{json.dumps(report)}\n{json.dumps({**report, 'iteration': odd})}\n")
        file.write('[]\n{"iteration": 6, "val_lo')  # cut short by a crash
    card = card_of(exported(read_run(run), tmp_path / "out"))
    assert [cells[1:] for cells in rows(card, "loss (nats per token)")] == [
        ["0", "3.0000"],
        ["2", "1.5000"],
    ]
    assert card.data.datasets == ["maker/set"]
    (run / "metrics.jsonl").unlink()
    card = card_of(exported(read_run(run), tmp_path / "bare"))
    assert "| loss" not in card.text


def test_rank_and_readers_by_layout(model_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: [0, 20, 3][i % 3])
    run = read_run(run)
    portable = card_of(
        exported(run, tmp_path / "a", base_model="maker/base", repository="ann/x")
    ).text
    assert "vllm serve maker/base --enable-lora --max-lora-rank 32 --lora-modules" in portable
    assert "hf download ann/x --local-dir adapter" in portable
    assert "python convert_lora_to_gguf.py adapter --outfile" in portable
    assert portable.startswith("\n# x\n")
    assert "| vLLM from 0.32 | 0.32.0, run | as intended |" in portable
    assert "tlora export" not in portable
    compact = card_of(exported(run, tmp_path / "b's", "compact", base_model="maker/base")).text
    assert "vLLM from 0.32:" in compact
    assert "vllm serve maker/base --enable-lora --max-lora-rank 32 --lora-modules" in compact
    assert "convert_lora_to_gguf" not in compact
    assert "llama.cpp, TGI: `tlora export --format peft` of the same run" in compact
    assert 'PeftModel.from_pretrained(model, "b\'s")' in compact


@pytest.mark.parametrize(
    ("format", "config", "library", "code"),
    [
        ("mlx-lm", {}, "mlx", "mlx_lm.generate --model maker/base-4bit --adapter-path adapter "),
        ("merged", {}, "transformers", "AutoModelForCausalLM.from_pretrained('ann/x')"),
        ("merged", {"quantization": {"bits": 4}}, "mlx", "mlx_lm.generate --model ann/x "),
    ],
)
def test_the_other_formats(model_path, tmp_path, cache, format, config, library, code):
    """Their cards, from a directory that has only the files that a card depends on."""
    cache("maker/base-4bit", "license: other\nlicense_name: ours\nlicense_link: LICENSE")
    names = {"model": "maker/base-4bit", "base_model": "maker/base"}
    run = read_run(make_run(tmp_path / "run", model_path, lambda i, shape: 2, **names))
    (tmp_path / "out").mkdir()
    file = "config.json" if format == "merged" else "adapter_config.json"
    (tmp_path / "out" / file).write_text(json.dumps(config))
    write_card(tmp_path / "out", run, format, name="ann/x")
    card = card_of(tmp_path / "out")
    relation = "finetune" if format == "merged" else "adapter"
    assert (card.data.library_name, card.data.base_model) == (library, "maker/base")
    assert card.data.to_dict()["base_model_relation"] == relation
    assert code in card.text
    assert ("from_pretrained" in card.text) == (library == "transformers")
    # The original's card is not here, so the conversion's tells the licence.
    assert (card.data.license, card.data.license_name) == ("other", "ours")
    assert card.data.license_link == "https://huggingface.co/maker/base-4bit/blob/main/LICENSE"


@pytest.mark.parametrize("front_matter", ["license: 3", "license: [", "- a", "language: no"])
def test_a_useless_base_card(model_path, tmp_path, cache, front_matter):
    cache("maker/base", front_matter)
    run = read_run(make_run(tmp_path / "run", model_path, lambda i, shape: 2))
    data = card_of(exported(run, tmp_path / "out", base_model="maker/base")).data
    assert data.license is None
    assert data.language is None


def test_a_single_weighted_run_keeps_its_losses(tested_run, tmp_path):
    adapter = combine([resolve_adapter(tested_run)], [1.0], Combination())
    cards = [
        card_of(exported(source, tmp_path / name))
        for source, name in ((adapter, "a"), (read_run(tested_run), "b"))
    ]
    losses = [rows(card, "loss (nats per token)") for card in cards]
    assert losses[0] == losses[1] != []


def test_without_matplotlib_there_is_no_picture(model_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # installed, and broken
    run = read_run(make_run(tmp_path / "run", model_path, lambda i, shape: 2))
    output = exported(run, tmp_path / "out")
    assert "rank_plan.png" not in (output / "README.md").read_text()
    assert not (output / "rank_plan.png").exists()
