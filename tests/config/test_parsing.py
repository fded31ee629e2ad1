import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers.commands import tlora

from tlora_mlx.cli import COMMANDS, main
from tlora_mlx.config.arguments import make_parser
from tlora_mlx.config.commands import OPTIONS_OF
from tlora_mlx.config.export_options import ExportCommand
from tlora_mlx.config.help_groups import FEW, grouped
from tlora_mlx.config.option import flag
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import PlanCommand, TrainConfig
from tlora_mlx.errors import UserError

REQUIRED = ["--model", "m", "--data", "d"]


def train_config(*arguments):
    return parse(TrainConfig, "tlora train", "", [*REQUIRED, *arguments])


def yaml_config(tmp_path, text, *arguments, config_class=TrainConfig, **options):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(config_class, "tlora train", "", ["-c", str(path), *arguments], **options)


def test_defaults_and_flags():
    config = train_config(
        "--rank", "16", "--target-modules", "q_proj", "v_proj", "--no-mask-prompt"
    )
    assert (config.rank, config.alpha, config.seed) == (16, 16, 0)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.mask_prompt is False
    assert train_config().mask_prompt is None
    assert train_config("--alpha", "4").alpha == 4.0


def test_yaml_has_the_same_names_and_flags_win(tmp_path):
    text = """
        model: m
        data: d
        learning_rate: 1e-4   # PyYAML reads this as text
        target-modules: [q_proj]
        mask_prompt: true
        epochs: null
        rank: 4
        grad_checkpoint: true
    """
    assert yaml_config(tmp_path, text).grad_checkpoint is True
    config = yaml_config(tmp_path, text, "--rank", "2", "--no-grad-checkpoint")
    assert config == train_config(
        "--learning-rate", "1e-4", "--target-modules", "q_proj", "--mask-prompt", "--rank", "2"
    )


def test_a_number_of_updates_as_a_flag_wins_over_epochs_in_the_file(tmp_path):
    text = "{model: m, data: d, epochs: 3, iters: 7}"
    assert yaml_config(tmp_path, text).epochs == 3
    config = yaml_config(tmp_path, text, "--iters", "16")
    assert (config.iters, config.epochs) == (16, None)
    config = yaml_config(tmp_path, text, "--iters", "16", "--epochs", "2")
    assert config.epochs == 2


def test_plan_takes_the_yaml_of_train(tmp_path):
    text = "{model: m, data: d, iters: 5, rank: 3}"
    config = yaml_config(tmp_path, text, config_class=PlanCommand, also_known=TrainConfig)
    assert config.rank == 3
    with pytest.raises(UserError, match="unknown option 'iterss'; the nearest one is 'iters'"):
        yaml_config(
            tmp_path, "{model: m, iterss: 5}", config_class=PlanCommand, also_known=TrainConfig
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1, not 0"),
        (["--rank", "8.5"], "--rank must be a whole number, not '8.5'"),
        (["--rank", "eight"], "--rank must be a whole number, not 'eight'"),
        (["--rank", "inf"], "--rank must be a whole number, not 'inf'"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, not -1"),
        (["--calibration-samples", "0"], "--calibration-samples must be at least 1, not 0"),
        (["--iters", "0"], "--iters must be at least 1, not 0"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--alpha", "0"], "--alpha must be above 0, not 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number, not nan"),
        (["--learning-rate", "-0.1"], "--learning-rate must be above 0, not -0.1"),
        (["--learning-rate", "inf"], "--learning-rate must be a finite number, not inf"),
        (["--learning-rate", "1e39"], "--learning-rate must be below 3e.38, not 1e.39"),
        (["--adapter-path", ""], "--adapter-path must not be empty"),
        (["-c", ""], "cannot read the configuration file"),
        (["--warmup", "1.5"], "--warmup must be at most 1, not 1.5"),
        (["--num-layers", "0"], "--num-layers must be -1 .all. or at least 1, not 0"),
        (["--val-batches", "0"], "--val-batches must be -1 .all. or at least 1, not 0"),
        (["--max-seq-length", "1"], "--max-seq-length must be at least 2, not 1"),
        (["--lr-schedule", "step"], "--lr-schedule must be one of cosine, linear, constant"),
        (["--ranks", "4"], "unrecognized arguments: --ranks 4; did you mean --rank?"),
        (["--max-seq-len=4"], "did you mean --max-seq-length?"),
        (["--qqq", "4"], "unrecognized arguments: --qqq 4; see tlora train --help"),
        (["--rank"], "--rank: expected one argument"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        train_config(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown option 'lerning_rate'; the nearest one is 'learning_rate'"),
        ("rank: [1]", r"--rank must be a whole number, not \[1\]"),
        ("rank: true", "--rank must be a whole number, not True"),
        ("rank: null", "--rank must have a value"),
        ("test: maybe", "--test must be true or false, not 'maybe'"),
        ("adapter_path: 3", "--adapter-path must be text, not 3"),
        ("target_modules: [3]", "--target-modules must be a list of names"),
        ("learning_rate: .nan", "--learning-rate must be a finite number, not nan"),
        ("rank: 4\n  data: d", "not valid YAML, line 2"),
        ("- rank", "must contain options"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        yaml_config(tmp_path, text, *REQUIRED)
    assert "\n" not in str(error.value)


def test_all_unknown_keys_are_told_at_once(tmp_path):
    with pytest.raises(UserError, match=r"unknown options: 'itres' \(nearest: 'iters'\), 'ranc' "):
        yaml_config(tmp_path, "{itres: 3, ranc: 2, seed: 1}", *REQUIRED)


@pytest.mark.parametrize("config_class", OPTIONS_OF.values(), ids=list(OPTIONS_OF))
def test_help_shows_what_matters_first_and_help_all_everything(config_class):
    """Every option is in one group of ``--help-all``; a few of them are in ``--help``."""
    names = [item.name for item in fields(config_class)]
    groups = grouped(names, config_class.groups)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    whole = make_parser(config_class, "tlora x", "", show_all=True).format_help()
    short = make_parser(config_class, "tlora x", "").format_help()
    spelt = [n.upper() if positional(config_class, n) else flag(n) for n in names]
    assert all(re.search(rf"^  (-c FILE, )?{name}\b", whole, re.MULTILINE) for name in spelt)
    first = next(iter(groups.values()))
    shown = [n for n, s in zip(names, spelt, strict=True) if re.search(rf"^  {s}\b", short, re.M)]
    assert sorted(shown) == sorted(first)
    assert len(first) <= FEW
    assert ("--help-all" in short) == (len(groups) > 1)
    assert {"run", "format", "output", "push_to"} <= set(first) or config_class != ExportCommand
    assert ("resume" in first) == (config_class is TrainConfig)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_into_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: tlora {command}" in shown
    assert not [line for line in shown.splitlines() if len(line) > 80]
    assert not [line for line in shown.splitlines() if line.endswith(("-", "(default:"))]


def positional(config_class, name):
    return config_class.__dataclass_fields__[name].metadata["positional"]


BOMB = "[&a0 [x, x]" + "".join(f", &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)) + "]"


@pytest.mark.parametrize(
    "text",
    [
        "rank: 2026-13-45",
        "rank: !!int abc",
        "rank: 0x_",
        f"rank: 0x{'f' * 6000}",
        f"? 0x{'f' * 6000}\n: 1",
        f"rank: {'9' * 6000}",
        f"rank: {'[' * 1500}",
        "rank: !!bool x",
        "rank: !!timestamp x",
        *(f"{name}: {BOMB}" for name in ("rank", "format", "target_modules", "grad_checkpoint")),
        "alpha: 1.7e308",
        "calibration_memory: 1e300",
    ],
)
def test_yaml_that_no_constructor_expects(tmp_path, text):
    with pytest.raises(UserError) as error:
        yaml_config(tmp_path, text, *REQUIRED)
    assert len(str(error.value)) < 600


def test_missing_options():
    with pytest.raises(UserError, match="missing: --model, --data"):
        parse(TrainConfig, "tlora train", "", [])
    with pytest.raises(UserError, match="give either RUN or --adapter"):
        parse(ExportCommand, "tlora export", "", [])
    with pytest.raises(UserError, match=r"cannot read the configuration file no\.yaml"):
        parse(TrainConfig, "tlora train", "", ["-c", "no.yaml"])


@pytest.mark.parametrize(
    "command", ["train", "plan", "export", "generate", "inspect", "evaluate", "report"]
)
def test_help_loads_nothing_heavy(command):
    """The loaded modules are tested, not the time, which a busy machine would spoil."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['tlora', '--help']\n"
        "try:\n"
        f"    runpy.run_module('tlora_mlx.{command}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'transformers', 'torch', 'yaml', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: tlora" in result.stdout


def test_a_terminal_that_lacks_our_characters():
    result = tlora("train", "--help-all", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    assert "(in ? in)" in result.stdout


def test_completion_in_bash(tmp_path):
    """The script is sourced and asked as bash asks it: commands, options and choices."""
    assert [*OPTIONS_OF] == [*COMMANDS]
    script = tlora("completion", "bash")
    assert script.returncode == 0, script.stderr
    (tmp_path / "tlora.sh").write_text(script.stdout)
    for line, expected in (
        ("tlora pl", ["plan"]),
        ("tlora train --learning", ["--learning-rate"]),
        ("tlora train --project", ["--project-name"]),
        ("tlora export run --quan", ["--quantize"]),
    ):
        words = line.split(" ")
        ask = (
            f"source {tmp_path}/tlora.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            "_shtab_tlora; printf '%s\n' \"${COMPREPLY[@]}\""
        )
        answer = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
        assert answer.stdout.split() == expected, answer.stderr


def test_the_console_script(capsys):
    def tlora_script(*arguments):
        code = main(list(arguments))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    for word, advice in (
        ("trian", "did you mean train? The commands are check, train, plan, export, inspect, "),
        ("nothing-like-it", "choose one of check, train, plan, export, inspect, upload, "),
        ("fuse", "tlora export RUN --format merged does that"),
        ("--rank", "'--rank' comes before a command"),
    ):
        code, out, error = tlora_script(word)
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert advice in error
    for words in ((), ("help",), ("--help",)):
        code, out, error = tlora_script(*words)
        assert (code, error) == (0, "")
        assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "usage: tlora train" in tlora_script("train", "--help")[1]
    assert tlora_script("help", "plan") == tlora_script("plan", "--help")
    assert tlora_script("--version")[1].startswith("tlora_mlx ")
    as_mlx_lm = tlora_script("--model", "no/such/model", "--train", "--data", "none")
    assert as_mlx_lm[0] == 2
    assert as_mlx_lm[2] == "error: model directory no/such/model does not exist\n"
    for module in ("tlora_mlx", "tlora_mlx.cli", "tlora_mlx.train"):
        words = [] if module == "tlora_mlx.train" else ["train"]
        command = [sys.executable, "-m", module, *words, "--rank", "0"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr[:7]) == (2, "error: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: 4\nseed: 1\nrank: 8\n", "not valid YAML, line 3: 'rank' is on line 1 too"),
        ("learning-rate: 1e-3\nlearning_rate: 1e-4\n", "both 'learning-rate' and 'learning_rate'"),
        ("lora_parameters:\n  rank: 4\n  rank: 8\n", "line 3: 'rank' is on line 2 too"),
    ],
)
def test_an_option_that_is_there_twice(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        yaml_config(tmp_path, text, *REQUIRED)
