"""The README tells the truth about what can be checked: options, families, files, commands."""

import re
from dataclasses import MISSING, fields

from conftest import ROOT

from tlora_mlx.config import (
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    PlanConfig,
    ReportCommand,
    TrainConfig,
    UploadCommand,
)

README = (ROOT / "README.md").read_text()


def flag_rows(config_class, without=()):
    """The Markdown rows of a configuration's options."""
    for item in fields(config_class):
        if item.name not in without:
            default = "required" if item.default is MISSING else f"`{item.default}`"
            if item.default is None or item.default is False:
                default = ""
            yield f"| `--{item.name.replace('_', '-')}` | {default} | {item.metadata['help']} |"


def test_the_table_of_flags():
    shared = list(flag_rows(PlanConfig))
    own = list(flag_rows(TrainConfig, {item.name for item in fields(PlanConfig)}))
    assert "\n".join(shared) in README
    assert "\n".join(own) in README


def test_the_other_commands_flags():
    last = README[README.index("`tlora export RUN` takes") :]
    commands = (ExportCommand, UploadCommand, GenerateCommand, EvaluateCommand, ReportCommand)
    for config_class in commands:
        for item in fields(config_class):
            if not item.metadata["positional"] and item.name != "trust_remote_code":
                assert f"--{item.name.replace('_', '-')}" in last


def test_what_it_names_exists():
    for path in re.findall(r"\b(?:scripts|examples|docs)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":  # prints the tables, to paste them
    head = "| option | default | meaning |\n|---|---|---|"
    print(head, *flag_rows(PlanConfig), sep="\n")
    print()
    own = flag_rows(TrainConfig, {item.name for item in fields(PlanConfig)})
    print(head, *own, sep="\n")
