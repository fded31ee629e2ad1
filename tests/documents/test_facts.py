"""The documents are correct wherever that can be checked: options, files, links, messages."""

import ast
import inspect
import re
from dataclasses import MISSING, fields

import pytest
from helpers.paths import ROOT

import tlora_mlx
from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.config.export_options import ExportCommand, UploadCommand
from tlora_mlx.config.option import Config
from tlora_mlx.config.training_options import PlanCommand, PlanConfig, TrainConfig
from tlora_mlx.config.usage_options import (
    EvaluateCommand,
    GenerateCommand,
    InspectCommand,
    ReportCommand,
)

OPTIONS = (ROOT / "docs/OPTIONS.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    assert "\n".join(shared) in OPTIONS
    assert "\n".join(own) in OPTIONS


def test_the_other_commands_flags():
    last = OPTIONS[OPTIONS.index("`tlora export RUN` takes") :]
    commands = (ExportCommand, UploadCommand, GenerateCommand, EvaluateCommand, ReportCommand)
    for config_class in commands:
        for item in fields(config_class):
            if not item.metadata["positional"] and item.name != "trust_remote_code":
                assert f"--{item.name.replace('_', '-')}" in last


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_and_links_in_it_exist(document):
    text = document.read_text()
    folders = "scripts|examples|docs|tests|tlora_mlx"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w(?!\*|\w)", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            path, _, section = link.partition("#")
            other = (document.parent / path) if path else document
            assert other.exists(), link
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE) if section else []
            anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
            assert not section or section in anchors, link


def texts_of_the_code():
    """All texts in the package, with … in place of values."""
    for path in (ROOT / "tlora_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"\{\w*\}", "…", node.value)


def test_the_messages_that_troubleshooting_quotes():
    """Each part of a quote, split at semicolons and colons, is in the code; … may be anything."""
    text = (ROOT / "docs/TROUBLESHOOTING.md").read_text()
    quotes = [" ".join(quote.split()) for quote in re.findall(r"\*\*`([^`]+)`\*\*", text)]
    assert len(quotes) > 30
    known = list(texts_of_the_code())
    for quote in quotes:
        for part in re.split("[;:] ", quote):
            words = [re.escape(word) for word in part.strip("… ").split("…")]
            pattern = re.compile(".*".join(words), re.DOTALL)
            assert not part.strip("… ") or any(pattern.search(k) for k in known), part


def test_the_flags_that_the_documents_name():
    commands = (PlanCommand, TrainConfig, ExportCommand, UploadCommand, GenerateCommand)
    commands += (InspectCommand, EvaluateCommand, ReportCommand, CheckCommand)
    known = {f"--{i.name.replace('_', '-')}" for command in commands for i in fields(command)}
    # Of pip, pytest, mlx-lm, mlx.launch, vLLM, the Hub's client and EvalPlus; and of all commands.
    known |= {"--adapter-path", "--hostfile", "--env", "--hosts", "--over", "--backend"}
    known |= {"--auto-setup", "--enable-lora", "--lora-modules", "--max-lora-rank", "--local-dir"}
    known |= {"--dataset", "--help"}
    for document in DOCUMENTS:
        # Whose flags are the scripts' and mlx-lm's.
        if document.name not in ("BENCHMARKS.md", "RESULTS.md", "FROM_MLX_LM.md"):
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", document.read_text()))
            assert flags <= known, document


@pytest.mark.parametrize("name", [name for name in tlora_mlx.__all__ if name != "__version__"])
def test_public_names_are_described(name):
    """Each argument or attribute by name, and what a function returns and raises."""
    thing = getattr(tlora_mlx, name)
    text = inspect.getdoc(thing)
    if isinstance(thing, type) and issubclass(thing, (Exception, Config)):
        assert len(text) > 40
        return
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), parameter
    if inspect.isfunction(thing):
        assert "Returns:" in text
        assert "Raises:" in text


if __name__ == "__main__":  # prints the tables, to paste them
    head = "| option | default | meaning |\n|---|---|---|"
    print(head, *flag_rows(PlanConfig), sep="\n")
    print()
    own = flag_rows(TrainConfig, {item.name for item in fields(PlanConfig)})
    print(head, *own, sep="\n")
