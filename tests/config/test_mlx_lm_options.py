"""mlx-lm's configuration files and flags: translated, told in one line, or refused all at once."""

import inspect
import json
import re
from dataclasses import fields
from importlib import import_module

import pytest
from helpers.commands import assert_one_sentence
from helpers.models import ROWS, write_jsonl
from helpers.paths import ROOT

from tlora_mlx import cli
from tlora_mlx.config.commands import OPTIONS_OF
from tlora_mlx.config.mlx_lm_options import command_line
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.errors import UserError
from tlora_mlx.training.schedule import learning_rate

DOCUMENT = (ROOT / "docs/FROM_MLX_LM.md").read_text()

# The settings of ml-explore/mlx-lm d78bf58, mlx_lm/examples/lora_config.yaml, with all that is
# commented out there.
EXAMPLE = """
model: "mlx-community/Llama-3.2-1B-Instruct-bf16"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}
data: "mlx-community/WikiSQL"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: wandb,swanlab
project_name: "Your-awesome-mlx-project-name"
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 1
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset:
  path: "billsum"
  train_split: "train[:1000]"
  valid_split: "train[-100:]"
  prompt_feature: "text"
  completion_feature: "summary"
"""


def translated(tmp_path, text, *flags):
    """The configuration, and what was told about it."""
    path, told = tmp_path / "lora_config.yaml", []
    path.write_text(text)
    arguments = ["-c", str(path), *flags]
    return parse(TrainConfig, "tlora train", "", arguments, note=told.append), "\n".join(told)


def test_the_example_with_everything_in_it(tmp_path):
    config, told = translated(tmp_path, EXAMPLE)
    expected = {
        "model": "mlx-community/Llama-3.2-1B-Instruct-bf16",
        "rank": 8, "alpha": 160.0, "target_modules": ["q_proj", "v_proj"], "num_layers": 16,
        "learning_rate": 1e-5, "lr_schedule": "cosine", "warmup": 0.1, "weight_decay": 0.05,
        "iters": 1000, "project_name": "Your-awesome-mlx-project-name",
        "from_adapter": None, "test": False,
        "data": [{
            "path": "billsum", "train_split": "train[:1000]", "valid_split": "train[-100:]",
            "prompt_column": "text", "completion_column": "summary",
        }],
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert told.count("\n") == 0
    for part in (
        "lora_parameters.scale 20 → --alpha 160", "lora_parameters.keys → --target-modules q_proj",
        "hf_dataset → data", "ignored: test_batches", "betas", "warmup_init",
    ):  # fmt: skip
        assert part in told


def test_plain_configurations_say_nothing(tmp_path):
    """The names that both have mean the same, null where mlx-lm has null."""
    text = "{model: m, data: d, iters: 50, report_to: null, lr_schedule: null, mask_prompt: null}"
    config, told = translated(tmp_path, text)
    assert told == ""
    assert (config.iters, config.lr_schedule, config.mask_prompt) == (50, "cosine", None)


def test_flags_win_and_have_the_same_names(tmp_path):
    text = "{model: m, data: d, lora_parameters: {rank: 8, scale: 2.0}}"
    flags = ["--rank", "4", "--train", "--fine-tune-type", "lora", "--test-batches", "3"]
    config, told = translated(tmp_path, text, *flags)
    assert (config.rank, config.alpha) == (4, 8.0)
    assert "--rank" not in told
    assert "test_batches" in told
    (tmp_path / "empty.yaml").write_text("")
    flags = ["--model", "m", "--data", "d", "--train", "--resume-adapter-file"]
    told = []
    config = parse(
        TrainConfig, "tlora train", "", [*flags, "a/adapters.safetensors"], note=told.append
    )
    assert config.from_adapter == "a"
    assert told == ["mlx-lm's options, translated: resume_adapter_file → --from-adapter a"]


def test_an_adapter_to_resume_from_brings_its_parameters(tmp_path):
    text = "{model: m, data: d, num_layers: 16, resume_adapter_file: a/0000100_adapters.safetensors"
    config, told = translated(tmp_path, text + ", lora_parameters: {rank: 16, scale: 20.0}}")
    assert config.from_adapter == "a/0000100_adapters.safetensors"
    assert (config.rank, config.num_layers) == (8, -1)
    assert "ignored: lora_parameters (they are the adapter's), num_layers" in told


def test_batches_are_counted_in_updates(tmp_path):
    text = "{model: m, data: d, train: true, iters: 1000, grad_accumulation_steps: 4,"
    schedule = " lr_schedule: {name: linear_schedule, arguments: [1e-4, 0, 250], warmup: 50}}"
    config, told = translated(tmp_path, text + schedule)
    assert (config.iters, config.lr_schedule, config.warmup) == (250, "linear", 0.2)
    assert "iters 1000 batches → 250 updates" in told


def test_columns_and_several_data_sets(tmp_path):
    config, _ = translated(tmp_path, "{model: m, data: d, prompt_feature: q}")
    assert (config.prompt_column, config.completion_column) == ("q", "completion")
    text = """
        model: m
        hf_dataset:
          - {path: a, config: {name: main}, chat_feature: chosen}
          - {name: b, text_feature: body, test_split: "test[:5]"}
    """
    config, _ = translated(tmp_path, text)
    default = {"train_split": "train[:80%]", "valid_split": "train[-10%:]"}
    assert config.data == [
        {**default, "path": "a", "config": {"name": "main"}, "messages_column": "chosen"},
        {**default, "path": "b", "text_column": "body", "test_split": "test[:5]"},
    ]


def test_what_has_no_counterpart_is_one_error(tmp_path):
    text = """
        {model: m, data: d, train: false, fine_tune_type: dora, optimizer: muon,
         lora_parameters: {rank: 8, dropout: 0.1, magic: 1}, lr_schedule: {name: step_decay}}
    """
    with pytest.raises(UserError) as error:
        translated(tmp_path, text)
    for part in (
        "train: false", "fine_tune_type: dora", "optimizer: muon", "lora_parameters.dropout",
        "lora_parameters.magic", "lr_schedule: step_decay", "or train with mlx_lm.lora",
    ):  # fmt: skip
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_parameters: 8", "lora_parameters must be a mapping, not 8"),
        ("lora_parameters: {scale: big}", "lora_parameters.scale must be a number, not 'big'"),
        ("lora_parameters: {rank: 8.5}", "--rank must be a whole number"),
        ("lora_parameters: {keys: q_proj}", "lora_parameters.keys must be a list of names"),
        ("lr_schedule: {name: cosine_decay}", "lr_schedule.arguments must be a list of numbers"),
        ("resume_adapter_file: 3", "resume_adapter_file must be a path, not 3"),
        ("hf_dataset: billsum", "entry 1 of 'hf_dataset' is not a mapping with 'path'"),
        ("hf_dataset: {train_split: x}", "entry 1 of 'data' has no 'path'"),
        ("optimizer_config: {adamw: 3}", "optimizer_config.adamw must be a mapping"),
    ],
)
def test_faulty_values(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        translated(tmp_path, f"model: m\ndata: d\n{text}")


def test_training_as_mlx_lm_documents_it(model_path, tmp_path, tlora_here, monkeypatch):
    """LORA.md's commands with ``tlora`` in place of ``mlx_lm.lora``; resumed from a step's file."""
    from mlx_lm import lora

    data = write_jsonl(tmp_path / "data/train.jsonl", [{"text": row["completion"]} for row in ROWS])
    flags = ["--model", model_path, "--train", "--data", data.parent, "--iters", 2]
    flags += ["--batch-size", 2, "--num-layers", 1]
    theirs = [*map(str, flags), "--adapter-path", str(tmp_path / "theirs"), "--save-every", "1"]
    monkeypatch.setattr("sys.argv", ["mlx_lm.lora", *theirs])
    lora.main()
    step = tmp_path / "theirs/0000001_adapters.safetensors"
    (tmp_path / "theirs/adapters.safetensors").unlink()
    flags = [flag for flag in flags if flag not in ("--num-layers", 1)]
    resumed = tlora_here(
        "train", *flags, "--resume-adapter-file", step, "--adapter-path", tmp_path / "run"
    )
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert f"translated: resume_adapter_file → --from-adapter {step}" in resumed.stdout
    plan = json.loads((tmp_path / "run/rank_plan.json").read_text())
    scales = {m["scale"] for m in plan["modules"].values()}
    assert scales == {20.0}
    tested = [*map(str, flags[:2]), "--adapter-path", str(tmp_path / "run"), "--test"]
    write_jsonl(data.with_name("test.jsonl"), [{"text": ROWS[0]["completion"]}])
    assert cli.main([*tested, "--data", str(data.parent), "--test-batches", "4"]) == 0
    summary = json.loads((tmp_path / "run/evaluations/perplexity-data/summary.json").read_text())
    assert (summary["rows"], summary["model"]) == (1, str(model_path))
    result = tlora_here("train", *flags, "--fine-tune-type", "full")
    assert_one_sentence(
        result, 2, "mlx-lm's options ask for what tlora does not have: fine_tune_ty"
    )


def test_the_command_line_of_mlx_lm():
    given = ["--model", "m", "--data", "d", "--test", "--test-batches", "3", "--batch-size", "2"]
    evaluated = ["evaluate", "adapters", "--task", "perplexity", "--data", "d"]
    assert command_line(given) == [*evaluated, "--base-model", "m", "--batch-size", "2"]
    for more in (["--train"], ["--config", "x.yaml"], ["-c", "x.yaml"]):
        assert command_line([*given, *more]) == ["train", *given, *more]
    assert command_line(["--model", "m"]) is None
    assert command_line(["--test", "--data"]) == evaluated[:-2]


def test_every_command_in_the_tables_is_one():
    """Its flags are; those that the code blocks have too."""
    counts = {"mlx_lm": 0, "tlora": 0}
    for text in re.findall(r"(?:`|^)((?:mlx_lm\.|tlora )[^`#\n]+)", DOCUMENT, re.MULTILINE):
        program, *words = text.split()
        if program == "tlora":
            words = command_line(words) if words[0].startswith("-") else words
            known = {f"--{item.name.replace('_', '-')}" for item in fields(OPTIONS_OF[words[0]])}
            known |= {"-c", "--train"}
        else:
            known = {*re.findall(r'"(--?\w[\w-]*)"', inspect.getsource(import_module(program)))}
        flags = {word for word in words if word.startswith("-")}
        assert flags <= known, text
        counts[program.partition(".")[0]] += len(flags)
    assert min(counts.values()) > 15


def test_every_option_is_in_the_tables_or_the_same():
    """What mlx_lm.lora knows is named or has the same name here; what is named is there."""
    from mlx_lm.lora import CONFIG_DEFAULTS, build_parser

    theirs = {action.dest for action in build_parser()._actions} | {*CONFIG_DEFAULTS}
    theirs |= {"hf_dataset", "prompt_feature", "completion_feature", "chat_feature", "text_feature"}
    ours = {item.name for item in fields(TrainConfig)}
    _, text, back = re.split("## Options|And back, what", DOCUMENT)
    (_, _, *rows), (_, _, *rows_back) = (
        [line.split(" | ") for line in part.splitlines() if line.startswith("|")]
        for part in (text, back)
    )
    named = {*re.findall(r"\w+", "".join(left for left, _ in rows).replace("-", "_"))}
    assert theirs - ours - {"help", "config"} <= named
    flags = re.findall(r"--[a-z-]+", "".join(right for _, right in rows))
    flags += re.findall(r"--[a-z-]+", "".join(left for left, _ in rows_back))
    assert len(flags) > 25
    assert {flag[2:].replace("-", "_") for flag in flags} <= ours
    keys = {*re.findall(r"(\w+)`?:", "".join(right for _, right in rows_back))}
    assert keys <= theirs | {"scale", "name", "arguments", "warmup", "warmup_init"}


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_schedule_back_in_mlx_lm_is_the_same(name):
    """The table's row, filled in: 100 updates, 10 of them warm-up."""
    from mlx_lm.tuner.utils import build_schedule

    rate, iters, warmup = 1e-3, 100, 10
    arguments = {
        "cosine": ("cosine_decay", [rate, iters - warmup]),
        "linear": ("linear_schedule", [rate, 0, iters - warmup]),
    }
    kind, arguments = arguments[name]
    config = {"name": kind, "arguments": arguments, "warmup": warmup - 1}
    schedule = build_schedule({**config, "warmup_init": rate / warmup})
    expected = [learning_rate(i, iters, rate, name, warmup / iters) for i in range(iters)]
    assert [float(schedule(i)) for i in range(iters)] == pytest.approx(expected, rel=1e-3)
