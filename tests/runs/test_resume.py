"""What a run survives: kill -9 at any moment, signals, a full disk, damage, changed inputs."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import arguments, assert_one_sentence, quick_train, tlora
from helpers.models import ROWS, save_model, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from tlora_mlx import read_run
from tlora_mlx.errors import Interrupted, RunError, UserError
from tlora_mlx.runs import checkpoint
from tlora_mlx.storage import foreign

ITERATIONS = 40
SLOW = {"iters": ITERATIONS, "save_every": 1, "keep_checkpoints": 2, "steps_per_report": 3}
SLOW |= {"steps_per_eval": 7, "batch_size": 3, "grad_accumulation_steps": 2}


def results(run):
    """All files that an interrupted run must have in common with an uninterrupted one."""
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for report in reports:
        for key in ("val_time", "iterations_per_second", "tokens_per_second", "peak_memory"):
            report.pop(key, None)
    adapters = (run / "adapters.safetensors").read_bytes()
    return adapters, (run / "rank_plan.json").read_bytes(), reports


def contents(directory):
    """Every file's bytes, and where every link leads."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


def train_quietly(model, data, run, options):
    """A child process's whole life."""
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        quick_train(model, data, run, **options)


@pytest.fixture(scope="module")
def forks():
    """Processes that start instantly: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tlora_mlx.training.session", "matplotlib"])
    return context


@pytest.fixture(scope="module")
def uncut(model_path, data_path, tmp_path_factory):
    return quick_train(model_path, data_path, tmp_path_factory.mktemp("uncut") / "run", **SLOW)


def test_killed_at_twelve_random_moments(forks, uncut, model_path, data_path, tmp_path):
    draw = random.Random(0)
    run = tmp_path / "run"
    kills, reached = 0, []
    while kills < 12:
        options = {**SLOW, "resume": True}
        process = forks.Process(target=train_quietly, args=(model_path, data_path, run, options))
        process.start()
        if kills % 4 == 0:  # at any moment, the start included
            time.sleep(draw.uniform(0.0, 1.5))
        else:  # among the quick steps, whenever they begin
            before = newest(run)
            deadline = time.monotonic() + 60
            while newest(run) == before and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it came to its end: begin again
            assert results(run) == results(uncut)
            shutil.rmtree(run)
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        reached.append(newest(run))
    assert len(set(reached)) > 6
    quick_train(model_path, data_path, run, **SLOW, resume=True)
    assert results(run) == results(uncut)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["0000039", "0000040"]
    assert not [p for p in run.rglob("*") if p.name.endswith(".part")]


def newest(run):
    return max((p.name for p in run.glob("checkpoints/[0-9]*")), default="")


def started(command, run):
    """A process of the command that has reported a training loss."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and "train_loss" in metrics.read_text():
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(model_path, data_path, tmp_path, tlora_here, number, code):
    run = tmp_path / "run"
    command = [*arguments(model_path, data_path, run), "--iters", 3000, "--batch-size", 2]
    command += ["--steps-per-report", 1, "--steps-per-eval", 7]
    process = started([f"tlora_mlx.{command[0]}", *command[1:]], run)
    second = tlora_here(*command, "--resume")
    assert_one_sentence(second, 2, "is in use by another training process")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "interrupted after iteration" in errors
    assert f"continue with: python -m tlora_mlx train --adapter-path {run} --resume" in errors
    assert "Traceback" not in errors
    assert read_run(run).tensors
    # The rest of the run, shorter than it was: nothing but what was saved says where it stands.
    progress = json.loads((run / "checkpoints" / newest(run) / "state.json").read_text())
    assert progress["progress"]["iteration"] == int(newest(run)) > 0


def raise_in(monkeypatch, where, number, wanted=lambda *args: True):
    """Let a signal arrive as soon as a function is called with the wanted arguments."""
    module, name = where.rsplit(".", 1)
    function = getattr(import_module(module), name)

    def interrupted(*args, **kwargs):
        if wanted(*args):
            signal.raise_signal(number)
        return function(*args, **kwargs)

    monkeypatch.setattr(where, interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_before_the_first_checkpoint(
    model_path, data_path, tmp_path, tlora_here, monkeypatch, number, code
):
    raise_in(monkeypatch, "tlora_mlx.method.initialise.plan_ranks", number)
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "run"))
    assert (result.returncode, result.stderr) == (code, "interrupted\n")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "mine"))
    assert result.returncode == code
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_the_last_test(
    model_path, data_path, tmp_path, tlora_here, monkeypatch, number, code
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlora_here(*arguments(model_path, data_path, whole, "--test")).returncode == 0
    calls = []
    with monkeypatch.context() as patch:
        raise_in(
            patch, "tlora_mlx.training.session.evaluate", number,
            lambda *args: args[3] == "testing" and calls.append(1) is None and len(calls) == 2,
        )  # fmt: skip
        result = tlora_here(*arguments(model_path, data_path, run, "--test"))
    again = f"python -m tlora_mlx train --adapter-path {run} --resume"
    said = f"interrupted; continue from the last checkpoint: {again}\n"
    assert (result.returncode, result.stderr) == (code, said)
    assert not (run / "adapters.safetensors").exists()
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert results(run) == results(whole)
    assert ["test_loss" in report for report in results(run)[2]].count(True) == 2


def test_interrupted_right_after_a_validation(
    model_path, data_path, tmp_path, tlora_here, monkeypatch
):
    """It is not made again, nor counted twice by ``--early-stop``."""
    options = {"iters": 8, "steps_per_eval": 2, "early_stop": 2, "learning_rate": 0.5}
    options |= {"lr_schedule": "constant", "warmup": 0.0}
    whole = quick_train(model_path, data_path, tmp_path / "whole", **options)
    calls, run = [], tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_in(
            patch, "tlora_mlx.training.validation.end_stage", signal.SIGINT,
            lambda: calls.append(1) is None and len(calls) == 4,
        )  # fmt: skip
        with pytest.raises(Interrupted, match="interrupted after iteration 6"):
            quick_train(model_path, data_path, run, **options)
    assert "val_loss" in results(run)[2][-1]
    again = quick_train(model_path, data_path, run, **options, resume=True)
    assert results(again) == results(whole)


def test_a_signal_while_a_file_is_written(tmp_path):
    from tlora_mlx.cli import sigterm_as_ctrl_c
    from tlora_mlx.errors import Terminated
    from tlora_mlx.storage.files import replace_file

    def write_and_stop(file):
        file.write(b"half")
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated), sigterm_as_ctrl_c():
        replace_file(tmp_path / "a", write_and_stop)
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_the_output(model_path, data_path, tmp_path):
    """A terminal or pipe that disappears does not end the run."""
    run = tmp_path / "run"
    command = ["tlora_mlx.train", *arguments(model_path, data_path, run)[1:]]
    command = [sys.executable, "-m", *map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    assert read_run(run).tensors


def test_a_finished_run_says_so(uncut, tlora_here):
    before = {p: p.read_bytes() for p in uncut.rglob("*") if p.is_file()}
    result = tlora_here("train", "--adapter-path", uncut, "--resume")
    assert result.returncode == 0
    assert "is finished; next: python -m tlora_mlx export" in result.stdout
    assert {p: p.read_bytes() for p in uncut.rglob("*") if p.is_file()} == before


def unfinished(uncut, path):
    """A copy of the run as it was after the last iteration but one."""
    shutil.copytree(uncut, path)
    shutil.rmtree(path / "checkpoints" / f"{ITERATIONS:07d}")
    (path / "adapters.safetensors").unlink()
    return path


@pytest.mark.parametrize("left", [None, "35"])
def test_killed_between_the_last_checkpoint_and_the_adapter(uncut, tmp_path, tlora_here, left):
    """With no adapter there yet, or with that of an earlier interruption."""
    run = shutil.copytree(uncut, tmp_path / "run")
    file = run / "adapters.safetensors"
    tensors, metadata = mx.load(str(file), return_metadata=True)
    file.unlink()
    if left:
        zeros = {name: mx.zeros_like(tensor) for name, tensor in tensors.items()}
        mx.save_safetensors(str(file), zeros, metadata | {"iteration": left})
    assert tlora_here("train", "--adapter-path", run, "--resume").returncode == 0
    assert results(run) == results(uncut)


@pytest.mark.parametrize("length", [0, 100, -10])
def test_the_adapter_of_a_finished_run_is_cut_short(uncut, tmp_path, tlora_here, length):
    run = shutil.copytree(uncut, tmp_path / "run")
    adapters = (run / "adapters.safetensors").read_bytes()
    (run / "adapters.safetensors").write_bytes(adapters[:length])
    assert tlora_here("train", "--adapter-path", run, "--resume").returncode == 0
    assert results(run) == results(uncut)


def test_extra_and_missing_files_in_a_run(uncut, tmp_path, tlora_here):
    run = unfinished(uncut, tmp_path / "run")
    (run / "checkpoints" / "9999999").write_text("no directory")
    (run / "metrics.jsonl").write_bytes(b"\xff no report\n" * 1000)
    plan = (run / "rank_plan.json").read_bytes()
    (run / "rank_plan.json").unlink()
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert_one_sentence(result, 2, "the run's rank plan is missing")
    (run / "rank_plan.json").write_bytes(plan)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "loss.png was not drawn" in result.stdout
    assert (run / "adapters.safetensors").read_bytes() == results(uncut)[0]


def test_a_damaged_checkpoint_is_skipped(uncut, tmp_path, tlora_here):
    run = shutil.copytree(uncut, tmp_path / "run")
    (run / "adapters.safetensors").unlink()
    damaged = run / "checkpoints" / f"{ITERATIONS:07d}" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert result.returncode == 0
    assert f"skipping checkpoint {ITERATIONS:07d}: optimizer.safetensors is damaged" in (
        result.stdout
    )
    assert f"continuing after iteration {ITERATIONS - 1}" in result.stdout
    assert results(run) == results(uncut)
    aside = run / "checkpoints" / f"{ITERATIONS:07d}.damaged-1"
    assert f"it is now called {aside.name}" in result.stdout
    assert (aside / "optimizer.safetensors").read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["progress"].update(momentum=1),
        lambda state: state["progress"]["window"].update(median=1.0),
        lambda state: state["progress"].update(window=[]),
        lambda state: state.pop("fingerprints"),
        lambda state: state.update(random_state=[1, 2]),
        lambda state: state["files"].update({"../../rank_plan.json": "0"}),
    ],
)
def test_a_checkpoint_of_another_version_is_kept(uncut, tmp_path, tlora_here, change):
    """It is no damage: the version that wrote it goes on from there."""
    run = unfinished(uncut, tmp_path / "run")
    path = run / "checkpoints" / f"{ITERATIONS - 1:07d}" / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    change(state)
    path.write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    before = contents(run)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert_one_sentence(result, 2, "was written by another version of tlora_mlx; resume with that")
    assert contents(run) == before


@pytest.mark.parametrize("fault", [errno.EACCES, errno.EIO, "directory"])
def test_a_checkpoint_that_cannot_be_read_is_kept(uncut, tmp_path, tlora_here, monkeypatch, fault):
    run = unfinished(uncut, tmp_path / "run")
    newest_one = run / "checkpoints" / newest(run)
    if fault == "directory":
        (newest_one / "state.json").unlink()
        (newest_one / "state.json").mkdir()
        (newest_one / "state.json" / "file").write_text("mine")
    else:
        openly = foreign.open_file

        def failing(path):
            if path == newest_one / "optimizer.safetensors":
                raise OSError(fault, os.strerror(fault), str(path))
            return openly(path)

        monkeypatch.setattr("tlora_mlx.storage.files.open_file", failing)
    before = contents(run)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert_one_sentence(result, 2, f"checkpoint {newest_one} is not readable (")
    assert contents(run) == before


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "adapter_config.json"])
def test_links_in_a_run_are_not_followed(uncut, tmp_path, tlora_here, name):
    run, elsewhere = unfinished(uncut, tmp_path / "run"), tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert_one_sentence(result, 2, "link")
    assert contents(tmp_path) == before


def test_metrics_that_got_shorter_are_noticed(uncut, tmp_path, tlora_here):
    run = unfinished(uncut, tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert result.returncode == 0
    assert f"{metrics} is shorter than when checkpoint {ITERATIONS - 1} was saved" in result.stdout
    assert (run / "adapters.safetensors").read_bytes() == results(uncut)[0]


def test_without_any_intact_checkpoint_the_run_starts_again(uncut, tmp_path, tlora_here):
    run = unfinished(uncut, tmp_path / "run")
    (run / "checkpoints" / f"{ITERATIONS - 1:07d}" / "state.json").write_text("{")
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert result.returncode == 0
    damaged = f"skipping checkpoint {ITERATIONS - 1:07d}: its state is not valid JSON"
    assert damaged in result.stdout
    assert "no checkpoint is intact, so the run starts over" in result.stdout
    assert results(run) == results(uncut)


@pytest.mark.parametrize("left", ["nothing", "damaged"])
def test_an_adapter_without_checkpoints_is_not_replaced(uncut, tmp_path, tlora_here, left):
    run = tmp_path / "run"
    shutil.copytree(uncut, run)
    if left == "nothing":
        shutil.rmtree(run / "checkpoints")
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{")
    result = tlora_here("train", "--adapter-path", run, "--resume")
    assert_one_sentence(result, 2, f"replace it; restore {run / 'checkpoints'}, train it")
    assert results(run) == results(uncut)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["adapters.safetensors", "optimizer.safetensors", "state.json"]),
    position=st.floats(0, 1),
    change=st.one_of(st.integers(1, 255), st.just("cut")),
)
def test_damage_anywhere_is_detected(uncut, tmp_path_factory, name, position, change):
    from tlora_mlx.runs.checkpoint import read_checkpoint

    path = uncut / "checkpoints" / f"{ITERATIONS:07d}"
    copy = shutil.copytree(path, tmp_path_factory.mktemp("damaged") / "checkpoint")
    data = bytearray((copy / name).read_bytes())
    at = min(int(position * len(data)), len(data) - 1)
    if change == "cut":
        del data[at:]
    else:
        data[at] ^= change
    (copy / name).write_bytes(data)
    assert read_checkpoint(path).state.progress.iteration == ITERATIONS
    try:
        read_checkpoint(copy)
    except UserError:
        return
    # Space around JSON's tokens says nothing, so it may be damaged without harm.
    same = json.loads((copy / name).read_text()) == json.loads((path / name).read_text())
    assert (name, same) == ("state.json", True)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    finished=st.booleans(),
    file=st.floats(0, 1, exclude_max=True),
    position=st.floats(0, 1, exclude_max=True),
    change=st.one_of(st.integers(1, 255), st.just("cut")),
)
def test_a_run_damaged_anywhere(
    uncut, tmp_path_factory, tlora_here, finished, file, position, change
):
    """It resumes to the same adapter as the undamaged run, or fails with one sentence."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(uncut, run) if finished else unfinished(uncut, run)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".png")
    path = files[int(file * len(files))]
    data = bytearray(path.read_bytes())
    at = int(position * len(data))
    if change == "cut":
        del data[at:]
    else:
        data[at] ^= change
    path.write_bytes(data)
    result = tlora_here("train", "--adapter-path", run, "--resume")
    if result.returncode == 0 and path.name != "adapters.safetensors":
        assert (run / "adapters.safetensors").read_bytes() == results(uncut)[0]
    elif result.returncode:
        assert_one_sentence(result, 2, "")
    shutil.rmtree(run)


def test_changed_inputs_are_refused(uncut, model_path, data_path, tmp_path, tlora_here):
    run = unfinished(uncut, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def refused(message, *flags):
        result = tlora_here("train", "--adapter-path", run, "--resume", *flags)
        assert_one_sentence(result, 2, message)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    refused("these differ: --rank 5 (it has 4), --seed 3 (it has 0)", "--rank", 5, "--seed", 3)
    rows = [{**row, "completion": row["completion"] + "#"} for row in ROWS]
    for name, kept in (("train", ["valid"]), ("valid", ["train"])):
        changed = tmp_path / f"changed-{name}"
        write_jsonl(changed / f"{name}.jsonl", rows)
        for other in kept:
            shutil.copy(data_path / f"{other}.jsonl", changed)
        refused(f"its {name} data changed", "--data", changed)
    model = shutil.copytree(model_path, tmp_path / "model")
    tensors = mx.load(str(model / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    mx.save_safetensors(str(model / "model.safetensors"), tensors, {"format": "pt"})
    refused("its model changed", "--model", model)
    plan = json.loads((run / "rank_plan.json").read_text())
    plan["modules"]["model.layers.0.mlp.up_proj"]["scale"] = 2.5
    (run / "rank_plan.json").write_text(json.dumps(plan))
    before[run / "rank_plan.json"] = (run / "rank_plan.json").read_bytes()
    refused("its rank plan changed")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "learning_rate": 2e-2}))
    before[run / "adapter_config.json"] = (run / "adapter_config.json").read_bytes()
    refused("its options and rank plan changed")


def test_moved_model_and_data_are_the_same(uncut, model_path, data_path, tmp_path, tlora_here):
    run = unfinished(uncut, tmp_path / "run")
    model = shutil.copytree(model_path, tmp_path / "model")
    data = shutil.copytree(data_path, tmp_path / "data")
    moved = ["--model", model, "--data", data, "--save-every", 5]
    result = tlora_here("train", "--adapter-path", run, "--resume", *moved)
    assert result.returncode == 0, result.stderr
    assert results(run) == results(uncut)


def test_nothing_to_resume(model_path, data_path, tmp_path, tlora_here):
    result = tlora_here("train", "--adapter-path", tmp_path / "run", "--resume")
    assert_one_sentence(result, 2, f"--resume: there is no run in {tmp_path / 'run'}")
    result = tlora_here(*arguments(model_path, data_path, tmp_path / "run", "--resume"))
    assert result.returncode == 0


def test_random_state_is_resumed(model_path, data_path, tmp_path, monkeypatch):
    """Base models with dropout draw from MLX's random state."""
    import mlx.nn as nn

    from tlora_mlx.models import base_model

    load = base_model.load_base_model

    def load_with_dropout(*args):
        base = load(*args)
        for layer in base.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
        return base

    monkeypatch.setattr("tlora_mlx.training.setup.load_base_model", load_with_dropout)
    options = {"save_every": 2, "target_modules": ["q_proj"], "iters": 8}
    whole = quick_train(model_path, data_path, tmp_path / "whole", **options)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "0000008")
    again = quick_train(model_path, data_path, cut, **options, resume=True)
    assert results(again) == results(whole)
    other = quick_train(model_path, data_path, tmp_path / "other", **{**options, "seed": 1})
    assert results(other)[0] != results(whole)[0]


# ---------------------------------------------------------------- a full disk, not a number


def test_a_full_disk(model_path, data_path, tmp_path):
    """Simulated by the system's limit on file sizes: a write fails part-way, as on a full disk."""

    def limit(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    run = tmp_path / "run"
    command = arguments(model_path, data_path, run)
    result = tlora(*command, preexec_fn=limit(8192))
    assert_one_sentence(result, 1, "cannot write")
    left = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    names = ["adapter_config.json", "captured_energy.json", "metrics.jsonl", "rank_plan.json"]
    assert left == names
    # Room for checkpoints, but metrics.jsonl grows beyond it.
    size = 60_000
    options = ["--iters", 1000, "--save-every", 5, "--steps-per-report", 1, "--resume"]
    result = tlora(*arguments(model_path, data_path, tmp_path / "b", *options),
                   preexec_fn=limit(size))  # fmt: skip
    assert_one_sentence(result, 1, "cannot write")
    assert "--resume" in result.stderr
    from tlora_mlx.runs.checkpoint import read_checkpoint

    kept = tmp_path / "b" / "checkpoints" / newest(tmp_path / "b")
    assert read_checkpoint(kept).state.progress.iteration >= 5


def poisoned_model(path):
    """A model with one poisoned token, ``~``: its embedding is NaN."""
    model = save_model(path)
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(model).encode("~")
    tensors = mx.load(str(model / "model.safetensors"))
    embedding = np.array(tensors["model.embed_tokens.weight"])
    embedding[token] = np.nan
    tensors["model.embed_tokens.weight"] = mx.array(embedding)
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = mx.array(np.nan_to_num(np.array(tensors["lm_head.weight"])))
    mx.save_safetensors(str(model / "model.safetensors"), tensors, {"format": "pt"})
    return model


def test_a_validation_or_test_loss_that_is_not_finite(tmp_path, tlora_here):
    model, data = poisoned_model(tmp_path / "model"), tmp_path / "data"
    write_jsonl(data / "train.jsonl", ROWS[:4])
    for split in ("valid", "test"):
        write_jsonl(data / f"{split}.jsonl", [{"prompt": "~", "completion": "b"}])
    run = tmp_path / "run"
    result = tlora_here(*arguments(model, data, run, "--test"))
    assert result.returncode == 0, result.stderr
    assert "the test loss of iteration 4 is not finite" in result.stdout
    reports = results(run)[2]
    assert [r["test_loss"] for r in reports if "test_loss" in r] == [None, None]
    assert [r["val_loss"] for r in reports if "val_loss" in r] == [None, None]
    assert read_run(run).tensors


def test_a_gradient_that_is_not_finite(model_path, data_path, tmp_path, monkeypatch):
    """The loss is finite, but its gradient at B = 0 is not: B stays unchanged."""
    from tlora_mlx.training import step

    plain = step.summed_loss

    def steep(model, *args):
        squares = [mx.square(b).sum() for _, b in tree_flatten(model.trainable_parameters())]
        loss, *rest = plain(model, *args)
        return loss + mx.sqrt(sum(squares)), *rest

    monkeypatch.setattr(step, "summed_loss", steep)
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"the gradient is not finite in iteration 1 \(.*, line \d"):
        quick_train(model_path, data_path, run)
    tensors = mx.load(str(run / "checkpoints" / newest(run) / "adapters.safetensors"))
    assert not any(value.any().item() for key, value in tensors.items() if key.endswith("lora_b"))


def test_a_loss_that_is_not_finite(tmp_path, tlora_here):
    model, data = poisoned_model(tmp_path / "model"), tmp_path / "data"
    rows = ROWS[:9]
    write_jsonl(data / "train.jsonl", rows)
    plan = tmp_path / "plan.json"
    assert tlora_here("plan", "--model", model, "--data", data, "--output", plan).returncode == 0
    rows[6] = {"prompt": "~", "completion": "b"}
    write_jsonl(data / "train.jsonl", rows)
    run = tmp_path / "run"
    # Calibration reads the good row alone.
    flags = ["--model", model, "--data", data, "--adapter-path", run, "--plan", plan]
    flags += ["--batch-size", 1, "--epochs", 2, "--learning-rate", 1e-3, "--covariance", "exact"]
    result = tlora_here("train", *flags, "--calibration-samples", 1)
    assert_one_sentence(result, 1, "the loss is not finite in iteration")
    assert "train.jsonl, line 7)" in result.stderr
    at = int(newest(run))
    resumed = ["train", "--adapter-path", run, "--resume"]
    again = tlora_here(*resumed)
    assert_one_sentence(again, 1, f"not finite in iteration {at + 1} ")
    once = tlora_here(*resumed, "--skip-nonfinite", 1)
    assert_one_sentence(once, 1, "--skip-nonfinite 2")
    assert int(newest(run)) > at
    through = tlora_here(*resumed, "--skip-nonfinite", 2)
    assert through.returncode == 0, through.stderr
    assert "2 updates skipped as not finite" in through.stdout
    assert all(mx.isfinite(t).all().item() for t in read_run(run).tensors.values())


# ---------------------------------------------------------------- validation, best, early stop


def test_the_best_adapter_is_kept_and_training_stops_early(model_path, data_path, tmp_path):
    options = {"iters": 400, "learning_rate": 0.5, "steps_per_eval": 3, "early_stop": 2}
    options |= {"save_every": 3, "lr_schedule": "constant", "warmup": 0.0, "test": True}
    run = quick_train(model_path, data_path, tmp_path / "run", **options)
    reports = results(run)[2]
    losses = {r["iteration"]: r["val_loss"] for r in reports if "val_loss" in r}
    del losses[0]
    best = min(losses, key=losses.get)
    assert max(losses) == best + 6 < 400
    state = json.loads((run / "checkpoints" / newest(run) / "state.json").read_text())["progress"]
    assert (state["best_iteration"], state["best_loss"]) == (best, losses[best])
    assert state["finished"]
    # Its loss on the same rows as test data, not that of the last adapter.
    assert reports[-1]["test_loss"] == pytest.approx(losses[best], rel=1e-6)
    shorter = {**options, "iters": best, "early_stop": None, "save_every": 1000}
    alone = quick_train(model_path, data_path, tmp_path / "alone", **shorter)
    kept, last = read_run(run).tensors, read_run(alone).tensors
    for name, value in last.items():
        assert mx.array_equal(kept[name], value), name
    # Cut after the best and resumed, it is still the best that is kept.
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / newest(cut))
    (cut / "adapters.safetensors").unlink()
    again = quick_train(model_path, data_path, cut, **options, resume=True)
    assert results(again) == results(run)
