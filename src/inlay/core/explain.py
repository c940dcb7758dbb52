"""Which way each adapted layer runs, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from inlay.core.fused import chain_reason, product_reason
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.parameter import ParameterLayer
from inlay.core.report import table
from inlay.core.state import find_states
from inlay.errors import StateError
from inlay.kernels.switch import fast_paths_on

__all__ = ["Explanation", "LayerPath", "explain"]


@dataclass(frozen=True)
class LayerPath:
    """How one layer runs in the next forward.

    Attributes:
        name: dotted path of the layer, or of the parameter.
        kind: its layer kind.
        adapters: names of those that run there, the lowest first.
        path: ``"base"`` (no adapter runs), ``"fused"`` (base product and updates in one step), ``"fused update"`` (the
            base layer is called, and the updates are added in one step), ``"token space"`` (an expert bank's rows),
            ``"weight"`` (the module runs with rewritten weights), ``"copy"`` (a full copy runs), ``"generic"``.
        reason: why no faster path is taken; None where this is the fastest.
    """

    name: str
    kind: str
    adapters: tuple[str, ...]
    path: str
    reason: str | None = None


class Explanation(tuple[LayerPath, ...]):
    """The paths of all layers, in the model's order; prints as a table of those that share path and reason."""

    __slots__ = ()

    @property
    def slow(self) -> tuple[LayerPath, ...]:
        """Those that could run faster, were it not for their reason."""
        return tuple(path for path in self if path.reason is not None)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for one in self:
            key = (one.path, one.kind, ", ".join(one.adapters), one.reason or "")
            groups.setdefault(key, []).append(one.name)
        rows: list[tuple[str, ...]] = [
            (path, kind, str(len(names)), names[0], who, why) for (path, kind, who, why), names in groups.items()
        ]
        return "\n".join(table(("path", "kind", "layers", "first", "adapters", "reason"), rows, frozenset({2})))


def explain(model: nn.Module) -> Explanation:
    """Say which path each adapted layer takes as the model stands, and what keeps it from a faster one.

    It does not run the model, so it cannot know what depends on an input: a tensor that is not plain, a functorch
    transform, a batch whose samples choose their adapters. Compiled code is the compiler's.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.

    Raises:
        StateError: the model has no adapters.
    """
    states = find_states(model)
    if not states:
        raise StateError(f"this {type(model).__name__} has no adapters whose paths could be explained")
    paths: list[LayerPath] = []
    readers: dict[str, str | None] = {}
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            path = _layer(module)
            if path.path == "weight" and not module.kind.activation:
                readers[f"{path.name}."] = path.reason
            owner = next((owner for owner in readers if path.name.startswith(owner)), None)
            if owner is not None and path.path != "base":  # its weight is read by the layer above, which calls nothing
                path = replace(path, path="weight", reason=readers[owner])
            paths.append(path)
        elif isinstance(module, ModuleCopies):
            names = [name for name in module.active if module.has(name)] if module.enabled else []
            paths.append(LayerPath(module.site_path, "module", tuple(names[-1:]), "copy" if names else "base"))
    return Explanation(paths)


@torch.no_grad()
def _layer(layer: AdaptedLayer) -> LayerPath:
    chain = layer.chain()
    where: tuple[str, str, tuple[str, ...]] = (
        layer.site.name,
        layer.kind.name,
        tuple(dict.fromkeys(e.name for e in chain)),
    )
    if not layer.enabled and layer.merged:
        return LayerPath(*where, "weight", "adapters are off while some are merged, so the kept weight runs")
    if not chain:
        return LayerPath(*where, "base")
    if isinstance(layer, ParameterLayer):
        from inlay.core.nest import why_generic

        reason = why_generic(layer)
        return LayerPath(*where, "token space") if reason is None else LayerPath(*where, "weight", reason)
    if not layer.kind.activation:
        owner: Any = type(layer.leaf_layer).__name__
        return LayerPath(*where, "weight", f"{owner} reads its weights in a forward of its own")
    if not fast_paths_on():
        return LayerPath(*where, "generic", "fast paths are switched off")
    scaled = len(chain) == 1 and chain[0].method.scales_rows and layer.kind.multiplies and not layer.merged
    reason = None if scaled else chain_reason(layer, chain)
    if reason is not None:
        return LayerPath(*where, "generic", reason)
    reason = product_reason(layer)
    return LayerPath(*where, "fused") if reason is None else LayerPath(*where, "fused update", reason)
