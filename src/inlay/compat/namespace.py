"""``inlay.compat.peft``: every public module of PEFT, built from a table of names when it is imported.

``names.json`` records which names each module of PEFT 0.21.2 has and which of its modules defines each of them. What
stands behind a name is looked up when it is asked for: first in the *providers* of the defining module, then in the
method that the module's folder is about. Classes and functions of what is not built yet are placeholders, until a
provider has them; this file needs no change then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from inlay.core.registry import BUILTIN_METHODS
from inlay.errors import did_you_mean

__all__ = ["ROOT", "Namespace", "enter", "home_of", "table", "value_of"]

ROOT = "inlay.compat.peft"

# Defining module of PEFT (without "peft.") -> modules of Inlay that are searched for its names, in this order. A key
# ending in "." stands for everything below it.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "": ("inlay.compat.version",),
    "auto": ("inlay.models.auto", "inlay.compat.auto"),
    "config": ("inlay.config", "inlay.compat.config"),
    "functional": ("inlay.compat.tuners.functions",),
    "helpers": ("inlay.models.kappa", "inlay.compat.helpers"),
    "import_utils": ("inlay.compat.import_utils",),
    "mapping": ("inlay.compat.entry", "inlay.compat.mappings"),
    "mapping_func": ("inlay.compat.entry",),
    "mixed_model": ("inlay.models.mixed", "inlay.compat.constants"),
    "optimizers.": ("inlay.training.optimizers",),
    "peft_model": (
        "inlay.models.peft_model",
        "inlay.models.tasks",
        "inlay.models.status",
        "inlay.compat.entry",
        "inlay.compat.constants",
    ),
    "tuners.": ("inlay.compat.tuners", "inlay.compat.layers"),
    "tuners.adamss.asa_callback": ("inlay.training.callback",),
    "tuners.lora.config": ("inlay.config.variants",),
    "tuners.lora.conversion": ("inlay.models.conversion",),
    "tuners.lora.corda": ("inlay.inits.corda",),
    "tuners.lora.eva": ("inlay.models.eva",),
    "tuners.lora.intruders": ("inlay.combine.intruders",),
    "tuners.lora.loraga": ("inlay.inits.lora_ga",),
    "tuners.shira.mask_functions": ("inlay.compat.masks",),
    "tuners.tuners_utils": ("inlay.compat.tuners.functions", "inlay.compat.tuners.base", "inlay.compat.layers.base"),
    "utils.constants": ("inlay.compat.constants", "inlay.config"),
    "utils.error": ("inlay.compat.errors",),
    "utils.hotswap": ("inlay.checkpoint.hotswap",),
    "utils.incremental_pca": ("inlay.inits.incremental_pca",),
    "utils.integrations": ("inlay.compat.integrations",),
    "utils.loftq_utils": ("inlay.models.loftq",),
    "utils.merge_utils": ("inlay.combine.tensors",),
    "utils.other": (
        "inlay.compat.layers.auxiliary",
        "inlay.compat.other",
        "inlay.compat.tuners.extras",
        "inlay.models.preparing",
    ),
    "utils.peft_types": ("inlay.config.types", "inlay.compat.tuners.own"),
    "utils.quantization_utils": ("inlay.compat.quantization",),
    "utils.save_and_load": ("inlay.checkpoint", "inlay.models.base_weights", "inlay.compat.save_and_load"),
    "utils.transformers_weight_conversion": ("inlay.compat.weight_conversion", "inlay.compat.conversion_steps"),
    "utils.warning": ("inlay.compat.errors",),
}


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Return module -> name -> (defining module, name there, kind: ``c``lass, ``f``unction or ``v``alue)."""
    recorded = json.loads(files("inlay.compat").joinpath("names.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    for module, homes in recorded.items():
        names = found[module] = {}
        for home, words in homes.items():
            for word in words.split():
                label, _, kind = word.partition(":")
                name, _, original = label.partition("=")
                names[name] = (home, original or name, kind)
    return found


def home_of(module: str, name: str) -> tuple[str, str, str] | None:
    """Return what the table says of a name in a module of PEFT."""
    return table().get(module, {}).get(name)


def method_of(home: str) -> str | None:
    """Return the ``peft_type`` that a folder of ``peft.tuners`` is about."""
    parts = home.split(".")
    return parts[1].upper() if len(parts) > 1 and parts[0] == "tuners" else None


def _providers(home: str) -> Iterator[str]:
    yield from PROVIDERS.get(home, ())
    method = method_of(home)
    if method is not None and method in BUILTIN_METHODS:
        yield BUILTIN_METHODS[method]
    parts = home.split(".")
    for end in range(len(parts), 0, -1):
        yield from PROVIDERS.get(".".join(parts[:end]) + ".", ())


def value_of(home: str, name: str, kind: str) -> Any:
    """Return what stands behind a name that the module ``home`` of PEFT defines.

    Raises:
        AttributeError: Inlay has nothing of the kind.
    """
    for place in _providers(home):
        try:
            provider = import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise  # something else is missing inside of it
            continue
        provide = vars(provider).get("provide")  # knows one name in many modules (`Linear`)
        if provide is not None:
            value = provide(home, name)
            if value is not None:
                return value
        elif name in vars(provider) or name in getattr(provider, "__all__", ()):
            return getattr(provider, name)
    if not name.startswith("_"):
        from inlay.compat.unavailable import unavailable_class, unavailable_function

        if kind == "c":
            return unavailable_class(home, name)
        if kind == "f":
            return unavailable_function(home, name)
    raise AttributeError(f"peft.{home}.{name} has no counterpart in Inlay; docs/compatibility.md lists all names")


class Namespace(ModuleType):
    """One module of the namespace; names are looked up when they are used and kept from then on."""

    @property
    def _path(self) -> str:
        return self.__name__.removeprefix(ROOT).lstrip(".")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        path = self._path
        found = home_of(path, name)
        if found is None:
            below = f"{path}.{name}".lstrip(".")
            if below in table():
                return import_module(f"{ROOT}.{below}")
            shown = f"peft.{path}".rstrip(".")
            raise AttributeError(f"module {shown!r} has no attribute {name!r}.{did_you_mean(name, table()[path])}")
        home, original, kind = found
        value = value_of(home, original, kind)
        if "inlay.core.surface" in sys.modules:
            import_module("inlay.compat.layers")  # adapted layers then answer to all names that PEFT's have
        if type(value).__name__ != "Unavailable":  # it may be there later
            self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        path = self._path
        below = {
            module[len(path) :].lstrip(".").partition(".")[0]
            for module in table()
            if module.startswith(f"{path}.") or not path
        }
        return sorted({*self.__dict__, *table()[path], *below} - {""})


class _Builder(MetaPathFinder, Loader):
    """Finds and builds the modules of the namespace."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != ROOT and not fullname.startswith(ROOT + "."):
            return None
        below = fullname.removeprefix(ROOT).lstrip(".")
        if below not in table():
            return None
        package = any(module.startswith(f"{below}.") for module in table()) or not below
        return ModuleSpec(fullname, self, origin="inlay.compat.names", is_package=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Namespace(spec.name, f"The names of ``peft{spec.name.removeprefix(ROOT)}``.")

    def exec_module(self, module: ModuleType) -> None:
        below = module.__name__.removeprefix(ROOT).lstrip(".")
        if not below:
            module.__dict__["__file__"] = str(Path(__file__).with_name("__init__.py"))  # asked for to see where peft is
        module.__dict__["__all__"] = sorted(name for name in table()[below] if not name.startswith("_"))


def enter() -> None:
    """Make ``inlay.compat.peft`` importable."""
    if not any(isinstance(finder, _Builder) for finder in sys.meta_path):
        sys.meta_path.append(_Builder())
