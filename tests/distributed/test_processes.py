"""Several processes act as one: what they compute, who writes, and none waits forever."""

import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import quick_train
from helpers.models import ROWS, write_jsonl

from tlora_mlx import read_run

QUICK = ["--iters", 6, "--rank", 4, "--learning-rate", "1e-2", "--batch-size", 4]
LONG = ["--iters", 100_000, "--rank", 4, "--batch-size", 2, "--steps-per-report", 1]
LONG += ["--steps-per-eval", 7, "--save-every", 5]
# How the tests shorten the watch's patience.
IMPATIENT = {"SILENCE": 6.0, "STUCK": 6.0}


def free_ports(number):
    """Consecutive ports, outside the range that systems use for outgoing connections.

    A process that looks for one that does not listen yet could find itself there.
    """
    while True:
        first = random.SystemRandom().randrange(10_000, 30_000)
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + number):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + number))


def launch(*arguments):
    """Run a command as two processes with mlx.launch itself."""
    scripts = str(Path(sys.executable).parent)
    script = shutil.which("mlx.launch", path=scripts)
    # "python" by PATH, as in the README: MLX 0.31 takes a full path for a script of Python's.
    command = [script, "-n", "2", "--starting-port", str(free_ports(2)[0])]
    command += ["--env", f"PATH={scripts}{os.pathsep}{os.environ['PATH']}"]
    command += ["--", "python", "-m", *map(str, arguments)]
    # mlx.launch exits with 0 even if a process failed: what was written counts.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )


class Ranks:
    """Processes started like mlx.launch does it, but with visible exit codes and outputs."""

    def __init__(self, context, path, number, work, *arguments):
        path.mkdir()
        self.path = path
        hostfile = path / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(number)]))
        self.processes = [
            context.Process(target=a_rank, args=(rank, path, work, arguments))
            for rank in range(number)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds=120):
        """All exit codes (None for a process that is still running), and what each printed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        return codes, [(self.path / f"{n}.txt").read_text() for n in range(len(codes))]

    def send(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def end(self):
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()


def a_rank(rank, path, work, arguments):
    """A child process's whole life."""
    os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(path / "hosts.json")}
    with open(path / f"{rank}.txt", "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        faulthandler.dump_traceback_later(110, exit=True)  # says where, should it hang
        sys.exit(work(rank, *arguments))


def command(rank, name, arguments, patience=None, only_first=()):
    """Run a command in a rank; the first may have more arguments."""
    from tlora_mlx.distributed import watch

    for constant, value in (patience or {}).items():
        setattr(watch, constant, value)
    arguments = [*arguments, *(only_first if rank == 0 else ())]
    return import_module(f"tlora_mlx.{name}").main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def context():
    """Processes that start instantly: forked from one that has imported everything heavy.

    Nothing of ours, since that would look for the group of processes before there is one.
    """
    context = multiprocessing.get_context("forkserver")
    heavy = ["mlx_lm.utils", "mlx_lm.tuner.trainer", "mlx_lm.tuner.datasets"]
    heavy += ["mlx_lm.tuner.callbacks", "matplotlib.pyplot"]
    context.set_forkserver_preload(heavy)
    return context


@pytest.fixture
def ranks(context, tmp_path):
    """Start processes: ``ranks(number, work, *arguments)``; none is left after the test."""
    started = []

    def start(number, work, *arguments):
        path = tmp_path / f"ranks{len(started)}"
        started.append(Ranks(context, path, number, work, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.end()


def arguments(model, data, run, *more):
    return ["--model", model, "--data", data, "--adapter-path", run, *more]


def reports(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_the_same(ours, one, tolerance=2e-5):
    """Adapters within ``tolerance`` everywhere, and so are the losses, relatively.

    Covariances are summed batch by batch, so A differs by a rounding, and Adam's steps of 1e-2 for
    entries of B whose gradient is nearly 0 by more.
    """
    a, b = read_run(ours), read_run(one)
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in b.tensors.items():
        assert mx.abs(a.tensors[name] - value).max().item() < tolerance, name
    assert [r["iteration"] for r in reports(ours)] == [r["iteration"] for r in reports(one)]
    for x, y in zip(reports(ours), reports(one), strict=True):
        for key in {"train_loss", "val_loss", "test_loss", "grad_norm"} & y.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-5), key
        assert x.get("trained_tokens") == y.get("trained_tokens")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_training(run):
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("train_loss") > 3


# ---------------------------------------------------------------- the same result


def test_the_plan_of_two_processes(model_path, data_path, run_path, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["--model", model_path, "--data", data_path, "--rank", 4, "--output", out]
    result = launch("tlora_mlx.plan", *arguments)
    assert out.exists(), result.stdout + result.stderr
    ours = json.loads(out.read_text())["modules"]
    one = json.loads((run_path / "rank_plan.json").read_text())["modules"]
    assert ours.keys() == one.keys()
    for name, module in one.items():
        assert (ours[name]["rank"], ours[name]["scale"]) == (module["rank"], module["scale"])
        assert ours[name]["sensitivity"] == pytest.approx(module["sensitivity"], rel=1e-5)
    assert result.stdout.count("rank × scale of each module") == 1


def test_two_processes_train_as_one(model_path, data_path, run_path, tmp_path):
    """13 samples in batches of 4: the last batch leaves the second process without a sample."""
    run = tmp_path / "run"
    result = launch("tlora_mlx.train", *arguments(model_path, data_path, run, *QUICK))
    assert (run / "adapters.safetensors").exists(), result.stdout + result.stderr
    assert result.stdout.count("adapter saved in") == 1
    assert_the_same(run, run_path)


def test_processes_without_a_sample(ranks, model_path, data_path, tmp_path):
    """One sample for three processes, and one sample a batch."""
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", ROWS[:2])
    write_jsonl(data / "valid.jsonl", ROWS[5:6])
    options = {"covariance": "streaming", "batch_size": 1, "grad_accumulation_steps": 3}
    options |= {"steps_per_eval": 2, "calibration_samples": 1}
    one = quick_train(model_path, data, tmp_path / "one", **options)
    flags = ["--covariance", "streaming", "--grad-accumulation-steps", 3, "--steps-per-eval", 2]
    flags += ["--calibration-samples", 1, *QUICK, "--batch-size", 1]
    three = ranks(3, command, "train", arguments(model_path, data, tmp_path / "three", *flags))
    codes, outputs = three.wait()
    assert codes == [0, 0, 0], outputs
    assert "--batch-size 1 is split among 3 processes" in outputs[0]
    assert outputs[1] == outputs[2] == ""
    assert_the_same(tmp_path / "three", one)


def test_a_run_of_one_process_is_resumed_by_two(ranks, model_path, data_path, tmp_path):
    """Only the first process has the checkpoint, its best adapter and the plan."""
    options = {"iters": 12, "save_every": 4, "steps_per_eval": 3, "keep_checkpoints": 9}
    options |= {"test": True, "plan": None, "early_stop": 50}
    one = quick_train(model_path, data_path, tmp_path / "one", **options)
    run = shutil.copytree(one, tmp_path / "run")
    for later in ("0000008", "0000012"):
        shutil.rmtree(run / "checkpoints" / later)
    (run / "adapters.safetensors").unlink()
    codes, outputs = ranks(2, command, "train", ["--adapter-path", run, "--resume"]).wait()
    assert codes == [0, 0], outputs
    assert "continuing after iteration 4" in outputs[0]
    assert_the_same(run, one)
    finished = ranks(2, command, "train", ["--adapter-path", run, "--resume"])
    codes, outputs = finished.wait()
    assert codes == [0, 0], outputs
    assert "is finished" in outputs[0]


def sums(rank):
    """The collectives alone, as a rank sees them."""
    import numpy as np

    from tlora_mlx.distributed import collectives as together

    together.PIECE = 1 << 12
    numbers = np.random.default_rng(0).integers(-50, 50, (2, 5000)).astype(np.float32)
    expected = numbers.sum(axis=0)
    assert np.array_equal(np.array(together.total(mx.array(numbers[rank]))), expected)
    before = together.begun
    tree = {"a": [mx.array(numbers[rank])[:10].reshape(2, 5), {}], "b": mx.array(rank + 1.0)}
    tree = together.total_of_tree(tree)
    assert together.begun == before + 1 == together.ended
    assert np.array_equal(np.array(tree["a"][0]), expected[:10].reshape(2, 5))
    assert tree["b"].item() == 3.0
    assert together.largest([7, 15][rank]) == 15
    assert together.from_each({"ü": rank}) == [{"ü": 0}, {"ü": 1}]
    assert together.from_first(["a", "b"][rank]) == "a"
    nan = mx.array([0x7FC1, 0x8000, 0x3F80], mx.uint16).view(mx.bfloat16)
    first = {"x": nan, "none": mx.zeros((0, 3)), "t": mx.arange(6).reshape(2, 3).T}
    got = together.tensors_from_first(first if rank == 0 else {})
    assert list(got) == list(first)
    assert mx.array_equal(got["x"].view(mx.uint16), nan.view(mx.uint16))
    assert got["none"].shape == (0, 3)
    assert mx.array_equal(got["t"], first["t"])
    assert [together.share([1, 2, 3]), together.share([1])] == [[[1, 3], [1]], [[2], []]][rank]
    return 0


def test_collectives(ranks):
    codes, outputs = ranks(2, sums).wait()
    assert codes == [0, 0], outputs


def initialised_on_unequal_machines(rank, config):
    """Machines that round differently and have less memory get the first one's A."""
    from tlora_mlx import Terminal, TrainConfig
    from tlora_mlx.distributed import collectives as distributed
    from tlora_mlx.method import initialise, linalg
    from tlora_mlx.training import planning
    from tlora_mlx.training.setup import prepare

    if rank == 1:
        svd, qr = linalg.svd, linalg.qr
        linalg.svd = lambda matrix: svd(matrix * 1.0001 + 1e-4)
        linalg.qr = lambda matrix: qr(matrix * 1.0001 + 1e-4)
        planning.allowed_memory = lambda config: 10_000
        initialise.STREAMING_TOLERANCE = 0.3
    for how in ("exact", "streaming"):
        options = TrainConfig(**config, covariance=how, rank=4)
        setup = prepare(options, Terminal())
        found = planning.plan_and_initialise(options, setup, Terminal())
        plan, tensors = found.plan, found.a
        digests = [
            hashlib.sha256(memoryview(mx.contiguous(tensors[k]))).hexdigest() for k in tensors
        ]
        first, other = distributed.from_each([plan.to_dict(), list(tensors), digests])
        assert first == other
        assert len(tensors) == 14
    return 0


def test_all_have_the_same_subspaces(ranks, model_path, data_path):
    config = {"model": str(model_path), "data": str(data_path)}
    codes, outputs = ranks(2, initialised_on_unequal_machines, config).wait()
    assert codes == [0, 0], outputs
    assert "covariance: exact, 8 passes" in outputs[0]


# ---------------------------------------------------------------- one decision


def slow_to_save(rank, *arguments):
    """The first process takes longer to save than the others wait for an answer."""
    from tlora_mlx.distributed import watch
    from tlora_mlx.runs.writer import RunWriter

    watch.FAREWELL = 0.5
    finish = RunWriter.finish

    def slow_finish(*args):
        time.sleep(2.0)
        finish(*args)

    RunWriter.finish = slow_finish
    return command(rank, "train", *arguments)


@pytest.mark.parametrize(
    ("rank", "number", "code"),
    [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130), (1, signal.SIGHUP, 129)],
)
def test_all_stop_after_the_same_step(ranks, model_path, data_path, tmp_path, rank, number, code):
    run = tmp_path / "run"
    two = ranks(2, slow_to_save, arguments(model_path, data_path, run, *LONG))
    wait_for(lambda: is_training(run))
    two.send(rank, number)
    codes, outputs = two.wait()
    assert codes == [code, code], outputs
    assert outputs[0].count("interrupted after iteration") == 1
    assert "error" not in outputs[0]  # nothing went wrong
    assert f"continue with: python -m tlora_mlx train --adapter-path {run} --resume" in outputs[0]
    assert "error" not in outputs[1]
    state = max(run.glob("checkpoints/0*")) / "state.json"
    iteration = json.loads(state.read_text())["progress"]["iteration"]
    assert f"interrupted after iteration {iteration} of" in outputs[0]
    assert read_run(run).tensors


def test_a_loss_that_is_not_finite_stops_all(ranks, model_path, data_path, tmp_path):
    flags = [*QUICK, "--learning-rate", "1e30", "--optimizer", "adam", "--iters", 50]
    two = ranks(2, command, "train", arguments(model_path, data_path, tmp_path / "run", *flags))
    codes, outputs = two.wait()
    assert codes == [1, 1], outputs
    assert outputs[0].count("is not finite in iteration") == 1
    assert "train.jsonl, line" in outputs[0]
    assert outputs[1] == ""


def test_bad_input_is_reported_once(ranks, model_path, data_path, run_path, tmp_path):
    """On all processes, only on the first, and only on another."""
    nowhere = ranks(2, command, "train", arguments(tmp_path / "no", data_path, tmp_path / "run"))
    held = ranks(2, command, "train", arguments(model_path, data_path, run_path))
    more = ranks(
        2, command, "train", arguments(model_path, data_path, tmp_path / "run"), None, ["--seed", 1]
    )
    for each, message in (
        (nowhere, "no does not exist"),
        (held, "holds another run"),
        (more, "process 1 has a different option --seed than the first"),
    ):
        codes, outputs = each.wait()
        assert codes == [2, 2], outputs
        assert outputs[0].count("error: ") == 1
        assert message in outputs[0]
        assert "error: " not in outputs[1]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- none waits for ever


def test_a_process_is_killed_and_the_run_is_resumed(ranks, model_path, data_path, tmp_path):
    """One of three, so that not all are its neighbours; resumed, the bits are the same."""
    flags = ["--iters", 80, "--rank", 4, "--batch-size", 4, "--steps-per-report", 1]
    flags += ["--steps-per-eval", 30, "--save-every", 5]
    uncut, run = tmp_path / "uncut", tmp_path / "run"
    codes, outputs = ranks(
        3, command, "train", arguments(model_path, data_path, uncut, *flags)
    ).wait()
    assert codes == [0, 0, 0], outputs
    three = ranks(3, command, "train", arguments(model_path, data_path, run, *flags))
    wait_for(lambda: is_training(run))
    three.send(2, signal.SIGKILL)
    codes, outputs = three.wait(60)
    assert codes == [1, 1, -signal.SIGKILL], outputs
    assert outputs[0].count("error: process 2 on ") == 1
    assert "ended unexpectedly; what was saved is intact" in outputs[0]
    assert "error: " not in outputs[1]
    codes, outputs = ranks(3, command, "train", ["--adapter-path", run, "--resume"]).wait()
    assert codes == [0, 0, 0], outputs
    for name in ("rank_plan.json", "adapters.safetensors"):
        assert (run / name).read_bytes() == (uncut / name).read_bytes()


def test_the_first_process_is_killed(ranks, model_path, data_path, tmp_path):
    run = tmp_path / "run"
    two = ranks(2, command, "train", arguments(model_path, data_path, run, *LONG))
    wait_for(lambda: is_training(run))
    two.send(0, signal.SIGKILL)
    codes, outputs = two.wait(60)
    assert codes == [-signal.SIGKILL, 1], outputs
    assert outputs[1].count("error: process 0 on ") == 1


def test_a_process_hangs(ranks, model_path, data_path, tmp_path):
    run = tmp_path / "run"
    flags = arguments(model_path, data_path, run, *LONG)
    two = ranks(2, command, "train", flags, IMPATIENT)
    wait_for(lambda: is_training(run))
    two.send(1, signal.SIGSTOP)
    two.processes[0].join(60)
    codes, outputs = two.wait(0)
    assert codes == [1, None], outputs
    assert "has been silent for 6 s" in outputs[0]


def test_all_stopped_and_continued(ranks, model_path, data_path, tmp_path):
    """Ctrl-Z stops all for longer than a process may be silent: that is not a failure."""
    run = tmp_path / "run"
    flags = arguments(model_path, data_path, run, *LONG)
    two = ranks(2, command, "train", flags, IMPATIENT)
    wait_for(lambda: is_training(run))
    for number, pause in ((signal.SIGSTOP, 8.0), (signal.SIGCONT, 1.0), (signal.SIGTERM, 0.0)):
        two.send(0, number)
        two.send(1, number)
        time.sleep(pause)
    codes, outputs = two.wait(60)
    assert codes == [143, 143], outputs


def a_long_time_alone(rank):
    """Longer without a word from Python than others wait for; then a sum of unequal lengths."""
    from tlora_mlx.cli import run_command
    from tlora_mlx.distributed import collectives as distributed
    from tlora_mlx.distributed import watch

    watch.SILENCE = watch.STUCK = 3.0

    def work():
        if rank == 1:
            time.sleep(5.0)
        print("sum", distributed.total(mx.array(rank + 1)).item())
        distributed.total(mx.zeros((10 if rank else 100_000,)))

    return run_command(work)


def test_waiting_is_not_a_deadlock_and_a_deadlock_ends(ranks):
    codes, outputs = ranks(2, a_long_time_alone).wait(60)
    assert codes == [1, 1], outputs
    assert "sum 3" in outputs[0]
    assert outputs[0].count("error: all processes waited for each other for 3 s") == 1


def alone(rank):
    """A process whose only partner never starts."""
    from tlora_mlx.cli import run_command
    from tlora_mlx.distributed import connecting

    connecting.START = 1.0
    return run_command(lambda: None) if rank == 0 else 0


def test_a_process_that_never_starts(ranks):
    codes, outputs = ranks(2, alone).wait(60)
    assert codes == [-signal.SIGTERM, 0], outputs
    expected = "error: the processes did not find each other within 1 s; did they all start?\n"
    assert outputs[0] == expected


def out_of_reach(rank):
    from tlora_mlx.cli import run_command
    from tlora_mlx.distributed import collectives as distributed
    from tlora_mlx.distributed import connecting

    if rank == 1:
        connecting._address = lambda rank: "no-such-host.invalid"
    connecting.CONNECT = 2.0
    return run_command(lambda: print("sum", distributed.total(mx.array(rank + 1)).item()))


def test_processes_that_cannot_watch_each_other_say_so(ranks):
    codes, outputs = ranks(2, out_of_reach).wait(60)
    assert codes == [0, 0], outputs
    assert outputs[0].count("warning: the processes cannot watch each other") == 1
    assert "no-such-host.invalid" in outputs[0]
    assert "sum 3" in outputs[0]
    assert "warning" not in outputs[1]
