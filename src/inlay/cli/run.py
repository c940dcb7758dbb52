"""``inlay run``: run a script, or a module, in which ``import peft`` means Inlay."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from inlay.errors import CheckpointMissingError, ConfigError

USAGE = """\
Usage: inlay run [--peft-version VERSION] [--force] (SCRIPT | -m MODULE) [ARGUMENTS]...

  Run a Python script or module in which `import peft` means Inlay; processes that it starts inherit that.

  --peft-version VERSION   what peft.__version__ and its metadata say (default 0.21.2)
  --force                  also where peft itself is installed; it is hidden
"""


def main(words: list[str]) -> int:
    """Run what ``words`` name; its exit code is what it exits with, 1 where an exception ends it, shown whole.

    Raises:
        ConfigError: a wrong option, or nothing to run.
        CheckpointMissingError: the script is not there.
        StateError: peft is installed, and ``--force`` is not given.
    """
    from inlay.compat.install import install_as_peft
    from inlay.compat.shim import path_with_shim
    from inlay.config import COMPATIBLE_PEFT_VERSION

    version, force, module = COMPATIBLE_PEFT_VERSION, False, False
    rest = list(words)
    while rest and rest[0].startswith("-") and not module:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(USAGE)
            return 0
        if word == "--force":
            force = True
        elif word == "--peft-version" and rest:
            version = rest.pop(0)
        elif word == "-m":
            module = True
        else:
            raise ConfigError(f"inlay run: unknown or incomplete option {word!r}; options of the script come after it")
    if not rest:
        raise ConfigError("inlay run: expected a script, or -m and a module; see inlay run --help")
    if not module and not Path(rest[0]).exists():
        raise CheckpointMissingError(f"inlay run: there is no script {rest[0]!r}")
    install_as_peft(version, force=force)
    os.environ["PYTHONPATH"] = path_with_shim(version)
    sys.argv = rest
    sys.path[0:1] = [os.getcwd() if module else str(Path(rest[0]).resolve().parent)]
    try:
        if module:
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(rest[0], run_name="__main__")
    except Exception:  # an InlayError too: it is the script's, and its lines are wanted
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
