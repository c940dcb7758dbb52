"""What files of earlier releases of PEFT say in another way, and what they lack.

- Keys with segments of wrappers that were around the model: ``torch.compile``, FSDP, data parallelism.
- Biases: the releases 0.3 to 0.20 took every tensor with "bias" in its name for ``bias="all"``, and 0.7 to 0.20 wrote
  no biases at all for ``bias="lora_only"``.
- Banks of matrices (``target_parameters``): up to 0.19.0 the update was that of the transposed matrix.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from torch import Tensor

from inlay.checkpoint.keys import base_target, slot_holder
from inlay.checkpoint.resolve import Resolution
from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.tree import MODEL_PREFIX, TRANSPARENT, Tree
from inlay.core.entry import Entry
from inlay.core.parameter import ParameterLayer

__all__ = ["biases_of_any_name", "lost_biases", "present_layout", "release", "without_wrappers"]

# Segments of wrappers that stand anywhere; "module" is a common name and is taken for one at the front only.
_ANYWHERE = frozenset(TRANSPARENT.values()) - {"module"}


def release(version: str | None) -> tuple[int, ...]:
    """Return the numbers of a version (``0.18.0.dev0@abc`` -> (0, 18, 0)); empty where there are none."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def without_wrappers(index: KeyIndex, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a file's tensors without the segments that wrappers add to keys, where no module has such a name.

    Two keys that would become one stay as they are.
    """
    known = set(index.targets)
    known.update(alias for target in index.targets.values() for alias in target.aliases)
    if tensors.keys() <= known:
        return tensors
    segments = {segment for key in known for segment in key.split(".")}
    result: dict[str, Tensor] = {}
    for key, value in tensors.items():
        plain = key if key in known else _plain(key, segments, known)
        result[key if plain != key and (plain in tensors or plain in result) else plain] = value
    return result


def _plain(key: str, segments: set[str], known: Container[str]) -> str:
    parts = [part for part in key.split(".") if part not in _ANYWHERE or part in segments]
    if "module" in segments:  # a module of the model may be meant
        return ".".join(parts)
    while parts[:1] == ["module"]:
        parts = parts[1:]
    depth = MODEL_PREFIX.count(".")
    while parts[:depth] == MODEL_PREFIX.split(".")[:depth] and parts[depth : depth + 1] == ["module"]:
        parts = [*parts[:depth], *parts[depth + 1 :]]
    return ".".join(parts)


def biases_of_any_name(tree: Tree, index: KeyIndex, adapter: str) -> list[Target]:
    """Return what ``bias="all"`` meant besides biases: parameters of the base with "bias" in their names."""
    if tree.state.record(adapter).method.bias_mode() != "all":
        return []
    return [
        base_target(node, attribute, "embedding")
        for node in tree.nodes
        for attribute, held in node.module._parameters.items()
        if held is not None
        and "bias" in f"{node.original}.{attribute}"
        and index.holding(node.module, attribute) is None
    ]


def lost_biases(tree: Tree, found: Resolution, adapter: str) -> list[Target]:
    """Return the biases of adapted layers where a file has none of them, as the releases 0.7 to 0.20 wrote it."""
    if tree.state.record(adapter).method.bias_mode() == "all" or any(t.part == "bias" for t in found.found):
        return []
    return [target for target in found.missing if target.part == "bias"]


def present_layout(
    tree: Tree,
    index: KeyIndex,
    found: Resolution,
    adapter: str,
    version: str | None,
    given: Mapping[str, Tensor],
) -> None:
    """Turn the factors of banks of matrices whose update a file has transposed, in place.

    With ``dW`` (out, in) of every expert, old files have ``A (r, out)`` and ``B (in, r)`` for ``dW = (B A)^T``; present
    ones ``A (r, in)`` and ``B (out, r)`` for ``dW = B A``. Shapes say which it is, and for square matrices the release.

    Args:
        tree, index, adapter: the model and its adapter.
        found: the file's tensors; changed.
        version: the release that wrote the file, or None if it is not known.
        given: the file's tensors before any were made anew.
    """
    for layer in tree.state.layers():
        if not isinstance(layer, ParameterLayer):
            continue
        for entry in layer.entries.get(adapter, ()):
            pair = _factors(index, layer, entry)
            if pair is None:
                continue
            values = [found.found.get(target) or found.misshaped.get(target) for target in pair]
            if any(value is None or not any(value[1] is held for held in given.values()) for value in values):
                continue
            (key_A, A), (key_B, B) = values  # type: ignore[misc]
            experts = entry.site.experts[0]
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] % experts or B.shape[1] % experts:
                continue
            turned = _as_down(B, experts), _as_up(A, experts)
            fits = [(A.shape, B.shape), (turned[0].shape, turned[1].shape)]
            wanted = (pair[0].shape, pair[1].shape)
            if fits[1] != wanted or (fits[0] == wanted and not _was_turned(version, entry.site.transposed)):
                continue
            for target, key, value in zip(pair, (key_B, key_A), turned, strict=True):
                found.misshaped.pop(target, None)
                found.found[target] = (key, value)


def _was_turned(version: str | None, transposed: bool) -> bool:
    if not release(version):
        return False
    at = (*release(version), 0, 0)[:3]
    # 0.19.0 looked at is_transposed, the wrong way round; those before did not look.
    return at == (0, 19, 0) if transposed else at <= (0, 19, 0)


def _factors(index: KeyIndex, layer: ParameterLayer, entry: Entry) -> tuple[Target, Target] | None:
    if len(entry.site.experts) != 1 or entry.home is not None:
        return None
    targets = {}
    for role, containers, leaf in entry.places:
        target = index.holding(*slot_holder(layer, entry.name, containers, leaf))
        if target is not None:
            targets[role] = target
    return (targets["A"], targets["B"]) if targets.keys() == {"A", "B"} else None


def _as_up(A: Tensor, experts: int) -> Tensor:
    """Return (experts * r, n) as the transposed (n, r * experts), the expert running fastest."""
    return A.unflatten(0, (experts, -1)).permute(2, 1, 0).flatten(1)


def _as_down(B: Tensor, experts: int) -> Tensor:
    """Return (n, r * experts) as the transposed (experts * r, n)."""
    return B.unflatten(1, (-1, experts)).permute(2, 1, 0).flatten(0, 1)
