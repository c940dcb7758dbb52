"""``inlay shim-path``: print the folder to put on ``PYTHONPATH`` so that ``import peft`` means Inlay."""

from __future__ import annotations

from inlay.errors import ConfigError

USAGE = """\
Usage: inlay shim-path [--peft-version VERSION]

  Print a folder for PYTHONPATH in which `import peft` finds Inlay, in child processes too:
  PYTHONPATH=$(inlay shim-path) torchrun --nproc_per_node 2 train.py
"""


def main(words: list[str]) -> int:
    """Print the folder."""
    from inlay.compat.shim import shim_folder
    from inlay.config import COMPATIBLE_PEFT_VERSION

    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if words and (words[0] != "--peft-version" or len(words) != 2):
        raise ConfigError(f"inlay shim-path: expected nothing, or --peft-version VERSION, found {' '.join(words)!r}")
    print(shim_folder(words[1] if words else COMPATIBLE_PEFT_VERSION))
    return 0
