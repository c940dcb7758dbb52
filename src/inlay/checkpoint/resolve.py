"""What a file's keys mean for a model: exact names first, then the names that older files use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.tree import MODEL_PREFIX
from inlay.errors import CheckpointError, nearest

__all__ = ["Resolution", "listed", "resolve"]

SHOWN = 5  # keys that an error message lists

# A segment of a key -> why no model can use it.
RETIRED = {
    "oft_r": "it is an OFT checkpoint of peft 0.15 or older, whose parameters are other ones; train the adapter anew"
}


@dataclass
class Resolution:
    """A file against a model; nothing is written yet.

    Attributes:
        found: the file's key and tensor for each target.
        missing: targets that the file lacks.
        unexpected: keys of the file that mean nothing here.
        regenerated: keys of tensors that the config says to make again; they are not read.
        misshaped: found, but with another shape.
    """

    found: dict[Target, tuple[str, Tensor]] = field(default_factory=dict)
    missing: list[Target] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    regenerated: list[str] = field(default_factory=list)
    misshaped: dict[Target, tuple[str, Tensor]] = field(default_factory=dict)

    def problem(self, index: KeyIndex) -> str | None:
        """Return what does not fit, in words, or None."""
        if not (self.unexpected or self.missing or self.misshaped):
            return None
        parts = []
        known = [index.rendered(key) for key, target in index.targets.items() if target.saved]
        if self.unexpected:
            near = {key: nearest(key, known, 1) for key in self.unexpected[:SHOWN]}
            parts.append(
                f"{len(self.unexpected)} keys of the checkpoint mean nothing in this model: "
                + listed(
                    [f"{key!r}" + (f" (near: {near[key][0]!r})" if near.get(key) else "") for key in self.unexpected]
                )
            )
        if self.missing:
            parts.append(
                f"{len(self.missing)} keys are missing in the checkpoint: "
                + listed([repr(index.rendered(target.key)) for target in self.missing])
            )
        if self.misshaped:
            parts.append(
                f"{len(self.misshaped)} tensors have another shape: "
                + listed(
                    [
                        f"{key!r} is {tuple(value.shape)}, expected {tuple(target.shape)}"
                        for target, (key, value) in self.misshaped.items()
                    ]
                )
            )
        return "; ".join(parts)


def listed(items: Iterable[str]) -> str:
    """Join the first few items and count the rest."""
    items = list(items)
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def resolve(
    index: KeyIndex, tensors: Mapping[str, Tensor], adapter: str, optional: Iterable[Target] = ()
) -> Resolution:
    """Match a file's keys with a model's tensors.

    Args:
        index: the adapter's tensors.
        tensors: what the file holds; not changed.
        adapter: the adapter's name, which very old files have inside their keys.
        optional: further tensors that a file may hold (embeddings).

    Raises:
        CheckpointError: the file has a format that nobody reads any more.
    """
    extra = {target.key: target for target in optional if target.key not in index.targets}
    names = {**index.targets, **extra}
    full = {} if index.wrapped and tensors.keys() <= names.keys() else _convention(names, tensors, index.wrapped)
    result = Resolution()
    left: dict[str, str] = {}
    for key, value in tensors.items():
        name = full.get(key, key)
        target = names.get(name)
        if target is not None:
            _take(result, target, key, value)
        elif name not in index.redundant:
            left[key] = name
    for key in left:
        for segment in key.split("."):
            if segment in RETIRED:
                raise CheckpointError(f"{key!r}: {RETIRED[segment]}")
    _older_names(result, list(names.values()), left, tensors, adapter)
    result.missing = [
        target
        for target in index.targets.values()
        if target.saved and target not in result.found and target not in result.misshaped
    ]
    return result


def _take(result: Resolution, target: Target, key: str, value: Tensor) -> None:
    if not target.saved:
        result.regenerated.append(key)
    elif value.shape != target.shape:
        result.misshaped[target] = (key, value)
    else:
        result.found[target] = (key, value)


def _convention(names: Mapping[str, Target], tensors: Mapping[str, Tensor], wrapped: bool) -> dict[str, str]:
    """Return each key as a wrapped model writes it.

    A file is of a wrapped or of a bare model as a whole: what fits more keys is right, and in a tie the model's own
    form.
    """
    as_is = {key: key for key in tensors}
    prefixed = {key: key if key in names and names[key].part == "shared" else f"{MODEL_PREFIX}{key}" for key in tensors}
    forms = [as_is, prefixed] if wrapped else [prefixed, as_is]
    known = set(names)
    for target in names.values():
        known.update(target.aliases)
    return max(forms, key=lambda form: sum(key in known for key in form.values()))


def _older_names(
    result: Resolution, targets: list[Target], left: dict[str, str], tensors: Mapping[str, Tensor], adapter: str
) -> None:
    """Match what has no present name: aliases, and keys with an adapter's name inside."""
    if not left:
        return
    aliases = {alias: target for target in targets for alias in target.aliases}
    templates = {(above, below): target for target in targets for above, below in target.templates}
    hits: dict[str, list[tuple[str, Target]]] = {}
    for key, full in left.items():
        target = aliases.get(full)
        if target is not None:
            hits[key] = [("", target)]
            continue
        parts = tuple(full.split("."))
        hits[key] = [
            (parts[i], templates[parts[:i], parts[i + 1 :]])
            for i in range(len(parts))
            if (parts[:i], parts[i + 1 :]) in templates
        ]
    inside = {name for found in hits.values() for name, _ in found if name}
    chosen = adapter if adapter in inside else inside.pop() if len(inside) == 1 else None
    for key, found in hits.items():
        target = next((target for name, target in found if name in ("", chosen)), None)
        if target is None:
            result.unexpected.append(key)
            continue
        taken = result.found.get(target) or result.misshaped.get(target)
        if taken is None:
            _take(result, target, key, tensors[key])
        elif taken[1] is not tensors[key] and not _same(taken[1], tensors[key]):
            result.unexpected.append(key)  # two values for one tensor


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.to("cpu"), second.to("cpu"))
