"""Which modules a configuration means, asked of one path at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.core.patterns import layer_index, matcher
from inlay.core.readers import fused_reader
from inlay.core.targets import ALL_LINEAR, linear_paths, places, shortened
from inlay.errors import ConfigError, UnsupportedError

__all__ = [
    "_ExcludedModule",
    "_check_lora_target_modules_mamba",
    "_extend_unique",
    "_find_minimal_target_modules",
    "_maybe_include_all_linear_layers",
    "check_target_module_exists",
    "inspect_matched_modules",
]

# the methods that PEFT keeps away from layers that fused kernels read
_LOW_RANK = frozenset({"ADALORA", "LORA", "RANDLORA", "XLORA"})


class _ExcludedModule:
    """The answer for a path that the configuration leaves out by name; false."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: Any, key: str) -> bool | re.Match[str] | _ExcludedModule | None:
    """Return whether a configuration means the module at a path.

    Args:
        config: any configuration with ``target_modules``.
        key: the dotted path.

    Returns:
        Something true if it does (a match, where ``target_modules`` is an expression); an :class:`_ExcludedModule` if
        ``exclude_modules`` or ``modules_to_save`` names the path; something else that is false otherwise.
    """
    exclude = getattr(config, "exclude_modules", None)
    if exclude and matcher(exclude)(key) is not None:
        return _ExcludedModule()
    segments = key.split(".")
    for name in getattr(config, "modules_to_save", None) or ():
        width = name.count(".") + 1
        whole = (".".join(segments[i : i + width]) for i in range(len(segments) - width + 1))
        if any(re.fullmatch(name, part) for part in whole):
            return _ExcludedModule()
    targets = config.target_modules
    if targets is None and getattr(config, "target_parameters", None) is not None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, key)
    if key in targets:
        return True
    if matcher(targets)(key) is None:
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    index = layer_index(key, getattr(config, "layers_pattern", None))
    return index is not None and index in ({wanted} if isinstance(wanted, int) else set(wanted))


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the paths of a tuner's model that an adapter's configuration means (``matched``), and the others."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        found["matched" if tuner._check_target_module_exists(config, key) else "unmatched"].append(key)
    return found


def _find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """Return short suffixes that mean all of some paths and none of the others.

    Raises:
        ConfigError: no paths, a string, an empty path, or a path that is among the others.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError(f"target_modules: expected a list or set of paths, found {target_modules!r}")
    chosen, others = set(target_modules), set(other_module_names)
    if "" in chosen:
        raise ConfigError("target_modules: a path is empty")
    if chosen & others:
        raise ConfigError(f"target_modules: {sorted(chosen & others)[0]!r} is also among the other modules")
    suffixes = shortened(chosen, others | chosen)
    return {name for name in suffixes if not any(name.endswith(f".{other}") for other in suffixes)}


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Put the paths of all linear layers in the place of ``target_modules="all-linear"``; return the configuration."""
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        peft_config.target_modules = linear_paths(model, places(model), peft_config.task_type)
    return peft_config


def _check_lora_target_modules_mamba(peft_config: Any, model: nn.Module, target_name: str) -> None:
    """Refuse layers that a model's fused kernel reads without calling them.

    Raises:
        UnsupportedError: a low-rank method on such a layer of a Mamba model.
    """
    method = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    family = getattr(getattr(model, "config", None), "model_type", None)
    if method in _LOW_RANK and fused_reader(family, target_name):
        raise UnsupportedError(
            f"target_modules: {target_name!r} of a {family} model is read by its fused kernel and never called, so an "
            f"adapter of {method} would be skipped; leave it out"
        )


def _extend_unique(existing: list[str], new_names: Iterable[str]) -> None:
    """Append the names that a list does not have yet, in their order."""
    existing += [name for name in dict.fromkeys(new_names) if name not in set(existing)]
