"""The parser of a command, made from its options, and its help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import textwrap
import typing
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from tlora_mlx.config.commands import PATHS
from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.config.help_groups import grouped
from tlora_mlx.config.mlx_lm_options import MLX_LM_FLAGS
from tlora_mlx.config.option import Config, flag, kind_of, may_be_list, words_of
from tlora_mlx.errors import UserError
from tlora_mlx.version import __version__

# The longest name of a value that the help shows, in columns: with the flag it fits into a line.
WIDEST = 56


class _Help(argparse.HelpFormatter):
    """Names and flags are not broken at their hyphens, nor anything at a space that holds."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
        return [line.replace("\xa0", " ") for line in lines]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        given = re.findall(r"--([\w-]+)", message) if message.startswith("unrecognized") else []
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(given[0], known, n=1) if given else []
        meant = f"did you mean --{near[0]}?" if near else f"see {self.prog} --help"
        if "adapter-path" in given:  # as mlx-lm's commands have it
            meant = f"it is {self.usage}"
        raise UserError(f"{message}; {meant}")


def make_parser(
    config_class: type[Config], prog: str, description: str, show_all: bool = False
) -> argparse.ArgumentParser:
    """The parser of a command; its help has the options in groups.

    Args:
        config_class: a subclass of ``Config``.
        prog: the command's name in the help.
        description: its first line.
        show_all: have ``--help`` show all groups, not only the first.
    """
    items, hints = {f.name: f for f in fields(config_class)}, typing.get_type_hints(config_class)
    groups = grouped(items, config_class.groups)
    required = [i for i in items.values() if i.default is MISSING or i.metadata["positional"]]
    needed = [
        shown_name(i)
        if i.metadata["positional"]
        else f"{shown_name(i)} {shown_name(i)[2:].upper()}"
        for i in required
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *needed, "[options]"]),
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    for number, (title, names) in enumerate(groups.items()):
        hidden = number > 0 and not show_all
        group = parser.add_argument_group(title)
        for name in names:
            _add_argument(group, items[name], hints[name], hidden)
    others = parser.add_argument_group("help and files" if len(groups) > 1 else "other")
    if issubclass(config_class, DataConfig):
        for name in (n for n in items if hints[n] is bool):  # off, where the file says on
            arguments = {"action": "store_false", "default": None, "help": argparse.SUPPRESS}
            others.add_argument(f"--no-{flag(name)[2:]}", dest=name, **arguments)
        text = "YAML file with the same options, or mlx-lm's; flags win"
        others.add_argument("-c", "--config", metavar="FILE", help=text)
        for name, arguments in MLX_LM_FLAGS.items():
            others.add_argument(flag(name), help=argparse.SUPPRESS, **arguments)
    text = "show this help"
    if len(groups) > 1:
        text += f"; --help-all: all {len(items)} options"
    others.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    others.add_argument("-h", "--help", action="help", help=text)
    version = f"tlora_mlx {__version__}"
    others.add_argument("--version", action="version", version=version, help="show the version")
    return parser


def shown_name(item: dataclasses.Field) -> str:
    """How a message or the help names an option: ``--rank``, or ``RUN`` without a flag."""
    return item.name.upper() if item.metadata["positional"] else flag(item.name)


def _add_argument(
    parser: argparse._ArgumentGroup, item: dataclasses.Field, hint: Any, hidden: bool
) -> None:
    """Values arrive as text (True or False for a flag); ``_convert`` converts them."""
    text = item.metadata["help"].replace("%", "%%")
    if item.default is not MISSING and item.default is not None and item.default is not False:
        text += f" (default:\xa0{item.default})"
    choices = "|".join(item.metadata["choices"])
    if len(choices) > WIDEST:
        text += f"; TYPE is one of {', '.join(item.metadata['choices'])}"
        choices = "TYPE"
    text = argparse.SUPPRESS if hidden else text
    kind, is_path = kind_of(hint), item.name in PATHS
    if item.metadata["positional"]:
        parser.add_argument(item.name, nargs="?", metavar=item.name.upper(), help=text)
    elif kind is bool:
        action = "store_true" if hint is bool else argparse.BooleanOptionalAction
        parser.add_argument(flag(item.name), action=action, default=None, help=text)
    elif may_be_list(hint):
        parser.add_argument(flag(item.name), action="append", metavar="PATH", help=text)
    elif typing.get_origin(kind) is list:
        name = "PATH" if is_path else "NAME"
        parser.add_argument(flag(item.name), nargs="+", action="extend", metavar=name, help=text)
    else:
        name = {int: "N", float: "X"}.get(kind, "PATH" if is_path else "TEXT")
        metavar = choices or "|".join((name, *words_of(hint)))
        parser.add_argument(flag(item.name), metavar=metavar, help=text)
