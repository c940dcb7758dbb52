"""The names of PEFT: ``inlay.compat.peft`` and ways to let it answer to ``import peft``.

This room may import everything; nothing imports it but the public names of ``inlay``, lazily, and the command line.
``inlay.compat.peft`` and all modules below it are built from a table when they are imported; see ``namespace``.
"""

from inlay.compat import namespace

namespace.enter()
