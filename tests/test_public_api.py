"""The public names of ``tlora_mlx``: explicit, typed, and not hidden by commands."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
from helpers.paths import ROOT

import tlora_mlx
from tlora_mlx import TrainConfig


def spelt_out():
    """The imports that editors and type checkers read: module by name."""
    tree = ast.parse((ROOT / "tlora_mlx/__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name
            yield alias.name, node.module


def test_editors_see_the_same_names_as_python():
    assert {name: f"tlora_mlx.{module}" for name, module in tlora_mlx._MODULE_OF.items()} == dict(
        spelt_out()
    )
    assert set(dir(tlora_mlx)) == {"__version__", *dict(spelt_out())}
    for name, module in spelt_out():
        assert getattr(tlora_mlx, name) is getattr(import_module(module), name)


def test_a_command_of_the_same_name_hides_no_function():
    code = (
        "import tlora_mlx.train, tlora_mlx.export, sys\n"
        "from tlora_mlx import train, export, plan\n"
        "from tlora_mlx.train import main\n"
        "print(train.__module__, export.__module__, plan.__module__, main.__module__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "tlora_mlx.api tlora_mlx.api tlora_mlx.api tlora_mlx.train"
    assert result.stdout.strip() == expected, result.stderr


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, tlora_mlx; print(sorted({'mlx', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_options_are_keyword_only():
    """After the adapter and the output directory, arguments must be passed by name."""
    for name in tlora_mlx.__all__:
        thing = getattr(tlora_mlx, name)
        if inspect.isfunction(thing) and name.startswith(("export_", "load_adapter")):
            parameters = list(inspect.signature(thing).parameters.values())
            options = [p for p in parameters if p.name not in ("adapter", "output")]
            assert all(p.kind is p.KEYWORD_ONLY for p in options), name


def test_a_path_is_accepted_wherever_an_adapter_is(run_path, tmp_path):
    by_path = tlora_mlx.export_peft(str(run_path), tmp_path / "path")
    by_adapter = tlora_mlx.export_peft(tlora_mlx.read_run(run_path), tmp_path / "adapter")
    for file in sorted(by_path.directory.iterdir()):
        assert file.read_bytes() == (by_adapter.directory / file.name).read_bytes()
    base = tlora_mlx.load_adapter(run_path)
    assert base.model.layers[0].self_attn.q_proj["lora_b"].any().item()


def short_run(model, data, run, **options):
    """The options of two iterations."""
    paths = {"model": str(model), "data": str(data), "adapter_path": str(run)}
    return tlora_mlx.TrainConfig(**paths, iters=2, rank=2, batch_size=4, **options)


def test_library_functions_print_nothing(model_path, data_path, tmp_path, capsys):
    """The observer is silent by default."""
    config = short_run(model_path, data_path, tmp_path / "run")
    result = tlora_mlx.train(config)
    assert result.progress.iteration == 2
    tlora_mlx.export_peft(result.directory, tmp_path / "peft")
    tlora_mlx.export_merged(result.directory, tmp_path / "merged")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_an_observer_is_notified(model_path, data_path, tmp_path):
    class Listener(tlora_mlx.Observer):
        def __init__(self):
            self.plans, self.losses, self.notes = [], [], []

        def planned(self, plan):
            self.plans.append(plan)

        def reported(self, metrics):
            self.losses.append(metrics.get("train_loss"))

        def note(self, text):
            self.notes.append(text)

    listener = Listener()
    config = short_run(model_path, data_path, tmp_path / "run", steps_per_report=1)
    result = tlora_mlx.train(config, listener)
    assert listener.plans == [tlora_mlx.read_run(result.directory).plan]
    assert len([loss for loss in listener.losses if loss]) == 2
    assert any(note.startswith("train: 13 samples") for note in listener.notes)


def test_keywords_as_a_notebook_has_them(model_path, data_path, tmp_path, capsys):
    """The same run as with a configuration; a callback, quiet or not; shown as HTML."""
    told = []
    options = {"model": model_path, "data": data_path, "iters": 2, "rank": 2, "batch_size": 4}
    result = tlora_mlx.train(
        **options, adapter_path=tmp_path / "a", quiet=True, on_report=told.append
    )
    assert capsys.readouterr().out == ""
    config = short_run(model_path, data_path, tmp_path / "b")
    other = tlora_mlx.train(config)
    assert tlora_mlx.read_run(result.directory).plan == tlora_mlx.read_run(other.directory).plan
    assert [line["iteration"] for line in told] == [m["iteration"] for m in result.metrics()]
    html = result._repr_html_()
    assert "<polyline" in html
    assert html.count('<table class="heat">') == 2
    assert "trained 2 iterations" in html
    assert ":root" not in html  # the notebook's own style is left alone

    plan = tlora_mlx.plan(sensitivities=tmp_path / "a/rank_plan.json", rank=4)
    assert isinstance(plan, tlora_mlx.RankPlan)
    assert plan.rank == 4
    assert plan._repr_html_().count('<table class="heat">') == 2
    exported = tlora_mlx.export(run=tmp_path / "a", output=tmp_path / "peft", quiet=True)
    assert exported.directory == tmp_path / "peft"
    assert capsys.readouterr().out == ""
    again = tlora_mlx.train(adapter_path=tmp_path / "a", resume=True)
    assert again.was_finished


def test_faults_of_keywords():
    for options, message in (
        ({"modle": "m"}, "unknown option 'modle'; the nearest one is 'model'"),
        ({"model": "m"}, "missing: --data"),
        ({"model": "m", "data": "d", "rank": 0}, "--rank must be at least 1, not 0"),
    ):
        with pytest.raises(tlora_mlx.UserError, match=re.escape(message)):
            tlora_mlx.train(**options)


def test_options_are_in_signature_and_help():
    """What a notebook completes and shows."""
    signature = inspect.signature(tlora_mlx.train)
    assert {*TrainConfig.__dataclass_fields__} < {*signature.parameters}
    assert signature.parameters["rank"].default == 8
    assert "\n    rank: base rank: N per module on average" in tlora_mlx.train.__doc__


def test_types_are_shipped():
    assert (ROOT / "tlora_mlx/py.typed").exists()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text()
