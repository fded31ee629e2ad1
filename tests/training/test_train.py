"""The command as a user runs it: its files, its reproducibility, and how it fails."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import arguments, assert_one_sentence, quick_train, tlora, val_losses
from helpers.models import ROWS, save_model, write_jsonl
from mlx_lm.utils import load_model

from tlora_mlx import load_adapter, read_run
from tlora_mlx.method.layers import trained_parameters


def test_the_run_directory(model_path, data_path, tmp_path):
    run = tmp_path / "run"
    options = ["--test", "--save-every", 2, "--steps-per-report", 2, "--steps-per-eval", 2]
    result = tlora(*arguments(model_path, data_path, run, *options))
    assert result.returncode == 0, result.stderr
    assert "rank × scale of each module" in result.stdout
    assert "test loss" in result.stdout
    assert f"next: python -m tlora_mlx export {run} --format peft" in result.stdout
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert files == [
        "adapter_config.json",
        "adapters.safetensors",
        "captured_energy.json",
        "checkpoints/0000002/adapters.safetensors",
        "checkpoints/0000002/optimizer.safetensors",
        "checkpoints/0000002/state.json",
        "checkpoints/0000004/adapters.safetensors",
        "checkpoints/0000004/optimizer.safetensors",
        "checkpoints/0000004/state.json",
        "loss.png",
        "metrics.jsonl",
        "rank_plan.json",
    ]
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["model"] == str(model_path)
    assert (config["rank"], config["alpha"], config["model_type"]) == (4, 4, "llama")
    assert config["versions"].keys() == {"tlora_mlx", "mlx", "mlx-lm", "transformers"}
    plan = json.loads((run / "rank_plan.json").read_text())
    assert (plan["rank"], plan["alpha"], len(plan["modules"])) == (4, 4, 14)
    assert sum(module["rank"] for module in plan["modules"].values()) == 4 * 14
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in reports if "val_loss" in r] == [0, 2, 4]
    trained = [r for r in reports if "train_loss" in r]
    assert [r["iteration"] for r in trained] == [2, 4]
    assert trained[0].keys() == {
        "iteration", "train_loss", "learning_rate", "grad_norm", "iterations_per_second",
        "tokens_per_second", "trained_tokens", "peak_memory",
    }  # fmt: skip


def test_training_learns(model_path, data_path, tmp_path):
    run = quick_train(model_path, data_path, tmp_path / "run", iters=40)
    losses = val_losses(run)
    assert losses[-1] < 0.6 * losses[0]


def test_the_same_command_gives_the_same_run_bit_for_bit(model_path, data_path, tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for run, seed in zip(runs, (5, 5, 6), strict=True):
        options = ["--seed", seed, "--calibration-samples", 8, "--learning-rate", "1e-2"]
        assert tlora(*arguments(model_path, data_path, run, *options)).returncode == 0
    first, again, other = [
        [(run / name).read_bytes() for name in ("rank_plan.json", "adapters.safetensors")]
        for run in runs
    ]
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_trained_parameters_before_and_after_a_save(run_path, model_path):
    run = read_run(run_path)
    base = load_adapter(run_path)
    expected = sum(m.rank * m.out_features for m in run.plan.modules.values())
    saved = sum(t.size for key, t in run.tensors.items() if key.endswith(".lora_b"))
    assert trained_parameters(base.model) == expected == saved == run.plan.trained_parameters()
    tokens = mx.array([[5, 6, 7]])
    assert mx.abs(base.model(tokens) - load_model(model_path)[0](tokens)).max().item() > 1e-3


def test_a_hub_repository(model_path, data_path, tmp_path):
    """By its name, from the cache of the Hub's client: there is no network here."""
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model_path, repository / "snapshots" / commit)
    run = tmp_path / "run"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}
    result = tlora(*arguments("org/tiny", data_path, run), env=environment)
    assert result.returncode == 0, result.stderr
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["model"], config["base_model"]) == ("org/tiny", "org/tiny")


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_quantized_base(data_path, tmp_path, bits, mode):
    """A model converted by mlx-lm's own command, as users do it; exported for its original."""
    original = save_model(tmp_path / "original", hidden_size=64, intermediate_size=128)
    converted = tmp_path / "converted"
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(original)]
    command += ["--mlx-path", str(converted), "-q", "--q-bits", str(bits)]
    command += ["--q-group-size", "32", "--q-mode", mode]
    subprocess.run(command, check=True, capture_output=True)
    (converted / "README.md").write_text("---\nbase_model: org/original\n---\n")
    run = quick_train(converted, data_path, tmp_path / "run", iters=30)
    losses = val_losses(run)
    assert losses[-1] < 0.8 * losses[0]
    out = tmp_path / "peft"
    assert tlora("export", run, "--output", out).returncode == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/original"


def test_generate_shows_base_and_adapter(run_path):
    result = tlora("generate", run_path, "--prompt", "Add 1 and 2.\n", "--max-tokens", 5)
    assert result.returncode == 0, result.stderr
    base, adapted = result.stdout.split("--- with the adapter")
    assert "--- base model" in base
    assert base.split("\n", 1)[1].strip() != adapted.split("\n", 1)[1].strip()
    piped = tlora("generate", run_path, "--prompt", "-", "--max-tokens", 5, input="Add 1 and 2.\n")
    assert piped.stdout == result.stdout
    for prompt, message in (("", "--prompt must not be empty"), ("-", "standard input is empty")):
        result = tlora("generate", run_path, "--prompt", prompt, input="")
        assert_one_sentence(result, 2, message)


# ---------------------------------------------------------------- bad input


def test_bad_models(model_path, data_path, tmp_path, tlora_here):
    def broken(name, change):
        path = tmp_path / name
        shutil.copytree(model_path, path)
        change(path)
        return path

    def cut(path):
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])

    def drop_tensor(path):
        tensors = mx.load(str(path / "model.safetensors"))
        del tensors["model.norm.weight"]
        mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "pt"})

    def drop_tokenizer(path):
        for file in path.glob("tokenizer*"):
            file.unlink()

    def set_type(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))

    def grow(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**7}))

    def run_code(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
        (path / "own.py").write_text("raise SystemExit('this code ran')")

    cases = [
        (broken("own-code", run_code), "runs its own code (own.py); pass --trust-remote-code"),
        (tmp_path / "missing", "does not exist"),
        (model_path / "config.json", "is a file"),
        (data_path, "the configuration of model"),
        (broken("cut", cut), "damaged or cut short"),
        (broken("incomplete", drop_tensor), "norm.weight"),
        (broken("mute", drop_tokenizer), "has no tokenizer (tokenizer.json, "),
        (broken("weightless", lambda p: (p / "model.safetensors").unlink()), "has no model*.safe"),
        (broken("garbled", lambda p: (p / "config.json").write_text("{")), "is not valid JSON"),
        (broken("typeless", lambda p: (p / "config.json").write_text("{}")), "no 'model_type'"),
        (broken("unknown", set_type), "nonesuch not supported"),
        (broken("tall", grow), "has num_hidden_layers 10000000, which is no model's"),
        (
            broken("piped", lambda p: os.mkfifo(p / "vocab.json")),
            "vocab.json is no file, but a pipe",
        ),
        ("organisation/no-such-model", "the Hugging Face Hub did not provide it"),
    ]
    for model, message in cases:
        result = tlora_here(*arguments(model, data_path, tmp_path / "run"))
        assert_one_sentence(result, 2, message)
        assert not (tmp_path / "run").exists()


def test_bad_data_and_targets(model_path, data_path, tmp_path, tlora_here):
    bad = tmp_path / "bad"
    write_jsonl(bad / "train.jsonl", ROWS[:2])
    (bad / "valid.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    cases = [
        ([model_path, bad], f"{bad / 'valid.jsonl'}, line 2 is not valid JSON"),
        ([model_path, tmp_path / "missing"], "does not exist"),
        ([model_path, data_path, "--target-modules", "qproj"], "its linear layers are down_proj"),
        ([model_path, data_path, "--num-layers", "3"], "the model has only 2 blocks"),
    ]
    for (model, data, *options), message in cases:
        result = tlora_here(*arguments(model, data, tmp_path / "run", *options))
        assert_one_sentence(result, 2, message)
        assert not (tmp_path / "run").exists()
    (bad / "valid.jsonl").unlink()
    result = tlora_here(*arguments(model_path, bad, tmp_path / "run", "--test"))
    assert_one_sentence(result, 2, "--test needs test data: test.jsonl, or a split 'test'")


def test_a_directory_with_another_run_is_left_alone(model_path, data_path, run_path, tlora_here):
    before = {p: p.read_bytes() for p in run_path.rglob("*") if p.is_file()}
    result = tlora_here(*arguments(model_path, data_path, run_path))
    assert_one_sentence(result, 2, "holds another run")
    assert {p: p.read_bytes() for p in run_path.rglob("*") if p.is_file()} == before
    result = tlora_here(*arguments(model_path, data_path, run_path / "metrics.jsonl"))
    assert_one_sentence(result, 2, "is a file")


def test_another_programs_reports_are_left_alone(model_path, data_path, tmp_path, tlora_here):
    (tmp_path / "metrics.jsonl").write_text("mine")
    result = tlora_here(*arguments(model_path, data_path, tmp_path))
    assert_one_sentence(result, 2, "holds another run (metrics.jsonl)")
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_an_adapter_path_that_cannot_be_made(model_path, data_path, tmp_path, tlora_here):
    (tmp_path / "file").write_text("")
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "file" / "run"))
    assert_one_sentence(result, 1, "cannot write to --adapter-path")


def test_a_base_model_that_is_not_finite(data_path, tmp_path, tlora_here):
    model = save_model(tmp_path / "model")
    tensors = mx.load(str(model / "model.safetensors"))
    tensors["model.norm.weight"] *= mx.nan
    mx.save_safetensors(str(model / "model.safetensors"), tensors, {"format": "pt"})
    result = tlora_here(*arguments(model, data_path, tmp_path / "run"))
    assert_one_sentence(result, 1, "the base model's loss is not finite on calibration samples 1")


# ---------------------------------------------------------------- plans and covariances


def test_training_with_a_given_plan(model_path, data_path, run_path, tmp_path, tlora_here):
    """Given the plan that training would make, the adapter is the same, without sensitivities."""
    common = ["--learning-rate", "1e-2", "--iters", 6, "--seed", 0]
    result = tlora_here(
        *arguments(model_path, data_path, tmp_path / "run", *common),
        "--plan", run_path / "rank_plan.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "calibrating" not in result.stdout
    assert "no effect" not in result.stdout
    given, made = read_run(tmp_path / "run"), read_run(run_path)
    assert given.plan == made.plan
    for key, value in made.tensors.items():
        a, b = (t @ t.T if key.endswith("_a") else t for t in (value, given.tensors[key]))
        assert mx.abs(a - b).max().item() < (1e-3 if key.endswith("_a") else 1), key


def test_a_plan_edited_by_hand(model_path, data_path, run_path, tmp_path, tlora_here):
    plan = json.loads((run_path / "rank_plan.json").read_text())
    names = list(plan["modules"])
    plan["modules"] = {name: plan["modules"][name] for name in names[:3]}
    plan["modules"][names[0]] |= {"rank": 0}
    plan["modules"][names[1]] |= {"rank": 2, "scale": 3.0}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    run = tmp_path / "run"
    options = ["--plan", path, "--rank", 5, "--alpha", 7]
    result = tlora_here(*arguments(model_path, data_path, run, *options))
    assert result.returncode == 0, result.stderr
    warning = "warning: --rank, --alpha have no effect: ranks and scales are those of --plan"
    assert warning in result.stdout
    assert sorted(read_run(run).plan.adapted()) == sorted(names[1:3])
    assert read_run(run).tensors[f"{names[1]}.lora_a"].shape == (48, 2)


def test_all_faults_of_a_plan_in_one_message(model_path, data_path, run_path, tmp_path, tlora_here):
    plan = json.loads((run_path / "rank_plan.json").read_text())
    first, second, third, *_ = plan["modules"]
    plan["modules"][first]["rank"] = 49
    plan["modules"][second]["in_features"] = 7
    plan["modules"]["model.layers.9.mlp.up_proj"] = plan["modules"][first]
    plan["modules"][third]["scale"] = "2"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "run", "--plan", path))
    assert_one_sentence(result, 2, "is invalid")
    assert f"'scale' of {third} is not a finite number" in result.stderr
    assert f"{first} has rank 49, above min(48, 48)" in result.stderr
    assert f"{second} has shape (24, 48) in the model, but (24, 7) in the plan" in result.stderr
    assert "model.layers.9.mlp.up_proj is not a target module of the model" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_plan_with_a_scale_of_0(model_path, data_path, run_path, tmp_path, tlora_here):
    plan = json.loads((run_path / "rank_plan.json").read_text())
    first, second, *_ = (name for name, module in plan["modules"].items() if module["rank"])
    plan["modules"][first]["scale"] = 0
    plan["modules"][second] |= {"rank": 0, "scale": 0}  # left out, so it does not matter
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "run", "--plan", path))
    assert_one_sentence(result, 2, "and scale 0, so it would learn nothing")
    assert first in result.stderr
    assert second not in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "covariance: exact, 1 pass, about"),
        (["--calibration-memory", "1e-5"], "covariance: streaming, about"),
        (["--covariance", "exact", "--calibration-memory", "2e-5"], "covariance: exact, 6 passes"),
        (["--covariance", "streaming"], "covariance: streaming, about"),
    ],
)
def test_every_covariance_option(
    model_path, data_path, run_path, tmp_path, tlora_here, options, said
):
    run = tmp_path / "run"
    result = tlora_here(*arguments(model_path, data_path, run, *options))
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    assert "peak memory" in result.stdout
    assert read_run(run).plan == read_run(run_path).plan


# ---------------------------------------------------------------- where reports go


def test_reports_also_go_to_wandb(model_path, data_path, tmp_path):
    """The real client, offline: it writes the reports into the run's directory."""
    run = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = arguments(model_path, data_path, run, "--report-to", "wandb", "--steps-per-report", 2)
    result = tlora(*command, env=environment)
    assert result.returncode == 0, result.stderr
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    told = log.read_bytes()
    for key in (b"train_loss", b"val_loss", b"tokens_per_second"):
        assert key in told


def test_reports_also_go_to_tensorboard_and_trackio(model_path, data_path, tmp_path, monkeypatch):
    """The real packages, without a network: what the files hold is what metrics.jsonl holds."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from tensorboardX.proto.event_pb2 import Event

    run = quick_train(
        model_path, data_path, tmp_path / "run", report_to="tensorboard,trackio",
        project_name="mine", steps_per_report=2, iters=4,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {(n, k, v) for line in lines for n, k, v in numbers(line)}
    assert {k for _, k, _ in expected} > {"train_loss", "val_loss", "tokens_per_second"}
    (file,) = run.glob("tensorboard/events.*")
    content, found, place = file.read_bytes(), set(), 0
    while place < len(content):  # TFRecords: length, checksum of it, content, checksum of that
        size = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + size])
        scalars = [v for v in event.summary.value if v.HasField("simple_value")]
        found |= {(event.step, v.tag, np.float32(v.simple_value)) for v in scalars}
        place += size + 16
    assert found == {(step, tag, np.float32(value)) for step, tag, value in expected}
    with sqlite3.connect(tmp_path / "trackio/mine.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    assert {(step, k, v) for _, step, m in rows for k, v in json.loads(m).items()} >= expected


def numbers(line):
    """Iteration, name and value of all that a report says."""
    for name, value in line.items():
        if name != "iteration" and isinstance(value, (int, float)):
            yield line["iteration"], name, value


def test_both_reporters_and_one_that_fails(
    model_path, data_path, tmp_path, tlora_here, monkeypatch
):
    """mlx-lm's own callbacks, over stand-ins for the clients."""
    told = {"wandb": [], "swanlab": []}

    def client(name, fails_at=None):
        def log(metrics, step):
            if step == fails_at:
                raise ConnectionError("no route to host")
            told[name].append((step, {"train_loss", "val_loss"} & metrics.keys()))

        return SimpleNamespace(init=lambda **options: None, log=log)

    for name in told:
        monkeypatch.setattr(f"mlx_lm.tuner.callbacks.{name}", client(name))
    options = ["--report-to", "wandb,swanlab", "--steps-per-report", 2, "--steps-per-eval", 4]
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "a", *options))
    assert result.returncode == 0, result.stderr
    assert told["wandb"] == told["swanlab"]
    assert told["wandb"] == [
        (0, {"val_loss"}), (2, {"train_loss"}), (4, {"train_loss"}), (4, {"val_loss"}),
    ]  # fmt: skip
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", client("wandb", fails_at=2))
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "b", *options))
    assert result.returncode == 0, result.stderr
    assert (
        "--report-to wandb,swanlab stopped: no route to host; training continues" in result.stdout
    )
    assert read_run(tmp_path / "b").tensors


def test_bad_reporters(model_path, data_path, tmp_path, tlora_here, monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", None)
    for name, message in (("wandb", "pip install wandb"), ("nonesuch", "wandb, swanlab")):
        result = tlora_here(*arguments(model_path, data_path, tmp_path / "r", "--report-to", name))
        assert_one_sentence(result, 2, message)
        assert not (tmp_path / "r").exists()

    def not_logged_in(**options):
        raise RuntimeError(
            "No API key configured."
        )  # as wandb's UsageError, which is no ValueError

    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", SimpleNamespace(init=not_logged_in))
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "r", "--report-to", "wandb"))
    assert_one_sentence(result, 2, "--report-to wandb: No API key configured.")
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- validation data


def test_validating_on_a_share_of_the_training_rows(model_path, data_path, tmp_path, tlora_here):
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS[:13])
    command = arguments(model_path, tmp_path / "data", tmp_path / "run", "--val-split", "0.25")
    result = tlora_here(*command)
    assert result.returncode == 0, result.stderr
    assert "train: 10 samples\nvalid: 3 samples" in result.stdout
    assert "iteration 4: validation loss" in result.stdout
    command = arguments(model_path, data_path, tmp_path / "other", "--val-split", "0.25")
    assert_one_sentence(tlora_here(*command), 2, "has a validation split already")
    command = arguments(model_path, tmp_path / "data", tmp_path / "other", "--early-stop", 1)
    assert_one_sentence(tlora_here(*command), 2, "--early-stop needs validation data")
    write_jsonl(tmp_path / "one" / "train.jsonl", ROWS[:1])
    command = arguments(model_path, tmp_path / "one", tmp_path / "other", "--val-split", "0.25")
    assert_one_sentence(tlora_here(*command), 2, "at least two training samples")


def test_clipping(model_path, data_path, tmp_path):
    """Plain gradient descent in disguise: Adam's first step shows the clipped norm."""
    reports = {}
    for bound in (0.0, 1e-3):
        run = quick_train(
            model_path, data_path, tmp_path / str(bound), iters=1, max_grad_norm=bound,
            save_every=1, steps_per_report=1,
        )  # fmt: skip
        state = mx.load(str(run / "checkpoints" / "0000001" / "optimizer.safetensors"))
        # After one update Adam's first moment is 0.1 of the gradient that it was given.
        squares = [mx.square(10 * v).sum().item() for k, v in state.items() if k.endswith(".m")]
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        norm = next(r["grad_norm"] for r in lines if "grad_norm" in r)
        reports[bound] = (norm, sum(squares) ** 0.5)
    assert reports[0.0][0] == pytest.approx(reports[0.0][1], rel=1e-4)
    assert reports[1e-3][0] == pytest.approx(reports[0.0][0], rel=1e-6)
    assert reports[1e-3][1] == pytest.approx(1e-3, rel=1e-3)
