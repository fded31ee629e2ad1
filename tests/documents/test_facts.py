"""The documents are correct wherever that can be checked: options, files, links, messages."""

import ast
import inspect
import re
import runpy
from dataclasses import MISSING, fields

import pytest
from helpers.paths import ROOT

import tlora_mlx
from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.config.export_options import ExportCommand, UploadCommand
from tlora_mlx.config.option import Config
from tlora_mlx.config.training_options import PlanCommand, PlanConfig, TrainConfig
from tlora_mlx.config.usage_options import (
    ChatCommand,
    EvaluateCommand,
    GenerateCommand,
    InspectCommand,
    ReportCommand,
    ServeCommand,
)

OPTIONS = (ROOT / "docs/OPTIONS.md").read_text()
HOME = "https://github.com/tlora-mlx/tlora_mlx/blob/main/"
DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


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
    commands += (ChatCommand, ServeCommand)
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
        ours = link.startswith(HOME)  # the README is read on PyPI too
        if ours or "://" not in link:
            path, _, section = link.removeprefix(HOME).partition("#")
            other = ((ROOT if ours else document.parent) / path) if path else document
            assert other.exists(), link
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE) if section else []
            anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
            assert not section or section in anchors, link


def test_the_readme_is_complete_on_pypi():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert all("://" in link for link in links)


def test_a_release_has_its_section_of_the_changelog():
    section = runpy.run_path(str(ROOT / "scripts/changelog_section.py"))["section"]

    text = "# Changelog\n\n## 0.2.0 (unreleased)\n\n- b\n\n## 0.1.0 (2026-11-30)\n\n- a\n"
    assert section(text, "0.1.0") == "- a\n"
    for version, message in (("0.2.0", "still calls 0.2.0 unreleased"), ("0.3.0", "no section")):
        with pytest.raises(SystemExit, match=message):
            section(text, version)


def test_the_python_page_is_made_from_the_docstrings():
    document = runpy.run_path(str(ROOT / "scripts/make_api_document.py"))["document"]
    same = (ROOT / "docs/API.md").read_text() == document()
    assert same, "run: python scripts/make_api_document.py"


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
    commands += (ChatCommand, ServeCommand)
    known = {f"--{i.name.replace('_', '-')}" for command in commands for i in fields(command)}
    # Of pip, pytest, mlx-lm, mlx.launch, vLLM, the Hub's client and EvalPlus; and of all commands.
    known |= {"--adapter-path", "--hostfile", "--env", "--hosts", "--over", "--backend"}
    known |= {"--auto-setup", "--enable-lora", "--lora-modules", "--max-lora-rank", "--local-dir"}
    known |= {"--dataset", "--help", "--lora", "--real"}  # llama.cpp, scripts/demo.sh
    known |= {"--enable-mixed-moe-lora-format", "--train"}
    known |= {"--no-mask-prompt", "--no-grad-checkpoint"}
    for document in DOCUMENTS:
        # Whose flags are the scripts' and mlx-lm's.
        if document.name not in ("BENCHMARKS.md", "RELIABILITY.md", "RESULTS.md", "FROM_MLX_LM.md"):
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
