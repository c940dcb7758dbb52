"""The typer application: commands from the table in ``inlay.cli``, and options that take several values."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Annotated

import typer

from inlay.cli import COMMANDS


def load() -> dict[str, ModuleType]:
    """Import every command's file; ImportError names a part of the extra that is not installed."""
    return {command: import_module(place) for command, place in COMMANDS.items()}


def run(words: list[str], commands: dict[str, ModuleType]) -> int:
    """Parse ``words`` and run the command; typer's own usage errors return 2."""
    name = next((word for word in words if not word.startswith("-")), "")
    application = typer.Typer(
        name="inlay",
        help="Adapters for pretrained models: train, look at, merge and try them.",
        epilog="Also: inlay run SCRIPT (import peft means Inlay in it), inlay shim-path. Each has --help.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    application.callback()(_options)
    for command, module in commands.items():
        application.command(command)(module.command)
    lists = getattr(commands.get(name), "LISTS", ())
    try:
        application(spread(words, lists), prog_name="inlay")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Adapters for pretrained models: train, look at, merge and try them."""


def spread(words: list[str], lists: tuple[str, ...]) -> list[str]:
    """Let ``--data a b c`` mean ``--data a --data b --data c`` for the options in ``lists``."""
    spread_out: list[str] = []
    option = None
    first = True
    for word in words:
        if word.startswith("-"):
            option = word if word in lists else None
            first = True
        elif option is not None and not first:
            spread_out.append(option)
        spread_out.append(word)
        if not word.startswith("-"):
            first = False
    return spread_out
