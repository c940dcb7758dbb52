"""The ``inlay`` command. Each command is a file here; heavy libraries are imported when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from inlay.errors import InlayError, MissingExtraError

# command -> module with a function `command` and, for options that take several values, their names in `LISTS`
COMMANDS = {
    "train": "inlay.cli.train",
    "plan": "inlay.cli.plan",
    "methods": "inlay.cli.methods",
    "inspect": "inlay.cli.inspect",
    "merge": "inlay.cli.merge",
    "export": "inlay.cli.export",
    "generate": "inlay.cli.generate",
    "predict": "inlay.cli.predict",
}
# command -> module with a function `main(words)`; these need no extra, and pass options of a script on unread
PLAIN = {"run": "inlay.cli.run", "shim-path": "inlay.cli.shim_path"}
BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for anything wrong with the input, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    plain = words[0] in PLAIN if words else False
    debug = "--debug" in words and not plain
    try:
        if plain:
            return int(import_module(PLAIN[words[0]]).main(words[1:]))
        return _run([word for word in words if word != "--debug"])
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except InlayError as error:
        if debug:
            raise
        _complain(str(error))
        return BAD_INPUT


def _run(words: list[str]) -> int:
    try:
        from inlay.cli.application import load, run

        commands = load()
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "inlay":
            raise
        raise MissingExtraError(f"{error.name} is not installed: pip install 'inlay[train]'") from error
    return run(words, commands)


def _complain(text: str) -> None:
    """Print one red paragraph on stderr; without rich, plain."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(f"error: {text}", file=sys.stderr)
        return
    # soft_wrap: a path or pattern in the message stays in one piece for whoever copies or greps it
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (text, "red")), soft_wrap=True)
