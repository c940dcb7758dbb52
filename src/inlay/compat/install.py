"""Letting ``inlay.compat.peft`` answer to ``import peft``, for code and libraries that know only that name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from inlay.compat import namespace
from inlay.compat.version import check_version
from inlay.config import COMPATIBLE_PEFT_VERSION, PeftConfig, PeftType, TaskType
from inlay.core.policy import PEFT, set_default_policy
from inlay.core.registry import config_class, method_types
from inlay.errors import StateError

__all__ = ["install_as_peft", "stand_in"]

# Modules that look for peft once, while they are imported, and what they then hold if they found it.
_DECIDED = {
    "transformers.trainer": "PeftModel",
    "transformers.trainer_utils": "PeftModel",
    "diffusers.utils.import_utils": "_peft_available",
}
_DECIDED_BELOW = ("trl.trainer.", "trl.experimental.")  # there it is `PeftModel`, or another class beside it
_FILES = {
    "METADATA": "Metadata-Version: 2.1\nName: peft\nVersion: {version}\nSummary: Inlay, standing in for peft\n",
    "top_level.txt": "peft\n",
    "INSTALLER": "inlay\n",
}


class _Distribution(metadata.Distribution):
    """What ``importlib.metadata`` says of peft."""

    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        text = _FILES.get(filename)
        return None if text is None else text.format(version=self._version)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class Alias(MetaPathFinder, Loader):
    """Finds ``peft`` and what is below it: the very modules of the namespace, under a second name.

    Attributes:
        version: what metadata say; None where a distribution on the path says it.
    """

    version: str | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("peft."):
            return None
        below = fullname[len("peft") :].lstrip(".")
        if below not in namespace.table():
            return None
        own = import_module(namespace.ROOT + fullname[len("peft") :])
        return ModuleSpec(fullname, self, origin="inlay.compat", is_package=hasattr(own, "__path__"))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(namespace.ROOT + spec.name[len("peft") :])
        spec.loader_state = module.__spec__  # the import system is about to write its own
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        """Answer ``importlib.metadata`` for peft."""
        name = getattr(context, "name", None)
        if self.version is not None and (name is None or name.lower() == "peft"):
            yield _Distribution(self.version)


_alias = Alias()


def install_as_peft(version: str = COMPATIBLE_PEFT_VERSION, *, force: bool = False) -> ModuleType:
    """Make ``import peft`` mean Inlay in this process, with peft's behaviour as the default policy.

    Call it before anything that looks for peft is imported (transformers' Trainer, TRL, diffusers). Processes that are
    started from this one do not inherit it: put the folder that ``inlay shim-path`` prints on ``PYTHONPATH`` for that.

    Args:
        version: what ``peft.__version__`` and its metadata say. transformers 5 wants 0.20 or newer.
        force: also where the distribution peft is installed; it is then hidden.

    Returns:
        The module that answers to ``peft``: ``inlay.compat.peft``.

    Raises:
        ConfigError: ``version`` is no version.
        StateError: peft was imported before, or something that decided that it is not there, or (without ``force``)
            peft is installed. Nothing is changed then.
    """
    check_version(version)
    own = import_module(namespace.ROOT)
    if sys.modules.get("peft") is not own:
        _refuse_late()
        if not force:
            _refuse_beside()
    _alias.version = version
    _enter(own, version)
    return own


def stand_in(version: str) -> None:
    """Do what :func:`install_as_peft` does, from inside a package ``peft`` whose metadata lie on the path."""
    _enter(import_module(namespace.ROOT), version)


def _enter(own: ModuleType, version: str) -> None:
    pickled = list(_pickled())  # imports every method, so whatever is broken shows before anything is changed
    if _alias not in sys.meta_path:
        sys.meta_path.insert(0, _alias)
    sys.modules["peft"] = own
    for name in list(sys.modules):
        if name.startswith(namespace.ROOT + "."):
            sys.modules["peft" + name[len(namespace.ROOT) :]] = sys.modules[name]
    own.__dict__["__version__"] = version
    set_default_policy(PEFT)
    _name_as_peft(pickled)
    _forget_answers()


def _refuse_late() -> None:
    if "peft" in sys.modules:
        where = getattr(sys.modules["peft"], "__file__", None)
        raise StateError(f"peft was imported already (from {where}); call install_as_peft before anything imports it")
    late = sorted(_decided())
    if late:
        raise StateError(
            f"{', '.join(late)} looked for peft while it was imported, and found none; call install_as_peft before "
            "importing it"
        )


def _decided() -> Iterator[str]:
    """Iterate over the imported modules that hold the answer "no peft"."""
    for name, module in list(sys.modules.items()):
        found = _DECIDED.get(name)
        if found is None and "is_peft_available" in getattr(module, "__dict__", {}):
            found = "PeftModel" if name.startswith(_DECIDED_BELOW) else None
        if found is not None and not getattr(module, "__dict__", {}).get(found):
            yield name


def _refuse_beside() -> None:
    """Refuse to hide an installed peft; a stand-in does not count, nor a folder ``peft`` that is no package."""
    spec = find_spec("peft")
    if spec is not None and spec.loader is not _alias and spec.origin is not None and not _is_shim(spec.origin):
        raise StateError(
            f"peft is installed ({spec.origin}); uninstall it, or pass force=True to hide it in this process"
        )


def _is_shim(origin: str) -> bool:
    try:
        return "stand_in" in Path(origin).read_text(encoding="utf-8")
    except OSError:
        return False


def _forget_answers() -> None:
    """Clear caches of the question whether peft is there."""
    for name in ("transformers.utils.import_utils", "transformers.utils"):
        module = sys.modules.get(name)
        for function in ("is_peft_available", "is_peft_greater_or_equal", "_is_package_available"):
            clear = getattr(vars(module).get(function) if module is not None else None, "cache_clear", None)
            if clear is not None:
                clear()


def _name_as_peft(classes: Iterable[type[Any]]) -> None:
    """Let pickles of configurations, their parts and enums say where PEFT has them, so that either side reads them."""
    for cls in classes:
        home = next(
            (
                module
                for module, names in namespace.table().items()
                if names.get(cls.__name__, ("-", "", ""))[0] == module and names[cls.__name__][2] == "c"
            ),
            None,
        )
        if home is None or cls.__module__.startswith("peft."):
            continue
        public = import_module(f"peft.{home}")
        for name, value in vars(sys.modules[cls.__module__]).items():
            if namespace.home_of(home, name) is not None:
                getattr(public, name)  # is kept there
            elif not name.startswith("__"):
                public.__dict__.setdefault(name, value)  # typing.get_type_hints looks names up there
        cls.__module__ = f"peft.{home}"


def _pickled() -> Iterator[type[Any]]:
    """Iterate over enums, configurations, and what a method's module defines as parts of them (`LoraRuntimeConfig`)."""
    yield from (PeftType, TaskType, PeftConfig)
    for module in {config_class(method).__module__ for method in method_types()}:
        for value in list(vars(sys.modules[module]).values()):
            if isinstance(value, type) and is_dataclass(value) and value.__module__ == module:
                yield value
