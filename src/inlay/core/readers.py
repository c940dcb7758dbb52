"""Modules that read the weights of their children and never call them would skip adapters in silence.

``nn.TransformerEncoderLayer`` hands the weights of all its layers to one fused function in eval mode, and
``nn.TransformerEncoder`` packs padded batches for it. Both have a switch, which is turned off while something below
is adapted. The old value stays on the module itself, so a copy or a pickle can be ejected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from inlay.core.follow import base_modules, follower_of

__all__ = ["fused_reader", "may_be_fused", "restore_readers", "silence_readers"]

# Model families whose mixers hand these layers' weights to one fused kernel, where it is installed; there is no switch.
_FUSED = {
    family: frozenset({"conv1d", "out_proj"})
    for family in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
}

_FUSED_NAMES = frozenset().union(*_FUSED.values())

# class -> (attribute, value that makes it call its layers)
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_KEPT = "_inlay_switch"


def _readers(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    classes = tuple(_SWITCHES)
    for module in modules:
        if not isinstance(module, classes):
            continue
        for cls, (attribute, calling) in _SWITCHES.items():
            if isinstance(module, cls) and attribute in module.__dict__:
                yield module, attribute, calling


def _adapted(module: nn.Module) -> bool:
    followers = map(follower_of, base_modules(module))
    return any(follower is not None and not follower.is_bare for follower in followers)


def may_be_fused(path: str) -> bool:
    """Whether :func:`fused_reader` is true of the path in some model family."""
    return path.rpartition(".")[2] in _FUSED_NAMES


def fused_reader(family: str | None, path: str) -> bool:
    """Whether a model family reads the weight of the layer at a path instead of calling the layer."""
    return path.rpartition(".")[2] in _FUSED.get(family or "", ())


def silence_readers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Turn the switches of some modules off wherever something below is adapted; returns the way back."""
    changed = []
    for module, attribute, calling in _readers(modules):
        if _KEPT not in module.__dict__ and _adapted(module):
            module.__dict__[_KEPT] = module.__dict__[attribute]
            module.__dict__[attribute] = calling
            changed.append((module, attribute))

    def back() -> None:
        for module, attribute in changed:
            module.__dict__[attribute] = module.__dict__.pop(_KEPT)

    return back


def restore_readers(model: nn.Module) -> None:
    """Turn the switches back wherever nothing below is adapted any more."""
    for module, attribute, _ in _readers(base_modules(model)):
        if _KEPT in module.__dict__ and not _adapted(module):
            module.__dict__[attribute] = module.__dict__.pop(_KEPT)
