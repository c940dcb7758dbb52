"""Merge adapters into the base weights, transactionally, and take them out again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inlay.core.affine import LowRank
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.merge_bound import known_finite, note_finite, proved_finite
from inlay.core.merge_rows import InPlace, low_rank_updates, matrix_in_place
from inlay.core.merge_rules import check_mergeable, check_order, check_shared, merged_finite
from inlay.core.packed import PackedKept, Packing, can_pack
from inlay.core.pages import copied
from inlay.core.state import State
from inlay.errors import ConfigError, MergeError, StateError, did_you_mean
from inlay.parallel.fsdp import settle

__all__ = ["merge", "merge_layers", "unmerge"]


_KEEPS = ("copy", "packed", "none")
# Wraps the list of work, to show how far it is; yields its items.
Progress = Callable[[Sequence[Any]], Iterable[Any]]


def merge(
    state: State, names: Sequence[str] | None = None, *, keep: str = "copy", progress: Progress | None = None
) -> list[str]:
    """Write adapters into the base weights of every layer that has them; all layers or none.

    Low-rank updates are added in the memory of the weight, a few rows at a time, and every number is rounded once.

    Args:
        state: the model's state.
        names: adapters in the order of merging; by default the active ones.
        keep: ``"copy"`` keeps the original weights on the CPU, so that unmerging is bitwise exact and an adapter
            can be switched off while merged. ``"packed"`` keeps only what recomputation cannot restore, a few
            hundredths of the weight's bytes for a usual adapter: merging, unmerging and each forward with the adapter
            off take longer then. Layers where it cannot be done (methods that do not only add low-rank updates, banks
            of experts, float64, other devices than the CPU, a layer with something merged) are copied.
            ``"none"`` keeps nothing and cannot be undone. Should writing itself then
            fail half-way (an interrupt), the layer at hand is completed and the layers that are merged stay so, as
            they say themselves; the output of the model is the same.
        progress: wraps the sequence of layers while they are written.

    Returns:
        The names that were merged into at least one layer.

    Raises:
        ConfigError: ``keep`` is something else.
        MergeError: a merged weight would not be finite, an update cannot be written into a weight, or the order of
            merging would change the output.
    """
    names = list(state.active if names is None else names)
    for name in names:
        state.record(name)
    done: list[tuple[Any, list[str], list[str]]] = []  # layer, merged now, merged before
    try:
        for layer in state.layers():
            wanted = [name for name in names if layer.merges_itself and layer.has(name)]
            wanted = [name for name in wanted if name not in layer.merged_names]
            if wanted:
                done.append((layer, wanted, list(layer.merged_names)))
                layer.merge(safe_merge=True, adapter_names=wanted)
        rest = [layer for layer in state.layers() if isinstance(layer, AdaptedLayer) and not layer.merges_itself]
        merged = merge_layers(rest, names, keep=keep, progress=progress)
    except BaseException:
        for layer, _, before in reversed(done):
            if list(layer.merged_names) != before:
                layer.unmerge()
                if before:  # unmerging takes out all
                    layer.merge(adapter_names=before)
        raise
    return [name for name in names if name in merged or any(name in wanted for _, wanted, _ in done)]


def merge_layers(
    layers: Iterable[AdaptedLayer], names: Sequence[str], *, keep: str = "copy", progress: Progress | None = None
) -> list[str]:
    """Merge adapters into some layers; see :func:`merge`."""
    if keep not in _KEEPS:
        raise ConfigError(f"keep: expected 'copy', 'packed' or 'none', found {keep!r}.{did_you_mean(keep, _KEEPS)}")
    settle()
    work: list[_Work] = []
    for layer in layers:
        wanted = [name for name in names if name in layer.entries and name not in layer._merged]
        chain = tuple(entry for name in wanted for entry in layer.entries[name])
        if chain:
            check_mergeable(layer, wanted, chain)
            check_order(layer, wanted, keep)
            work.append(_Work(layer, chain))
    check_shared([(item.layer, item.chain) for item in work])
    for item in work:
        item.prove()
    if keep == "none":  # nothing will be there to go back to, so every layer is judged before the first is written
        for item in work:
            if not item.proved:
                merged_finite(item.layer, item.chain)
    steps: list[_Step] = []
    tied: dict[int, AdaptedLayer] = {}
    try:
        for item in work if progress is None else progress(work):
            # layers that share a weight share the update too, and the first has written it
            partner = tied.setdefault(id(item.weight), item.layer)
            steps.append(_step(item, keep, None if partner is item.layer else partner))
            steps[-1].carry_out()
    except BaseException as error:
        if keep != "none":
            for step in reversed(steps):
                step.undo()
        elif steps:
            _finish(steps, work, error)
        raise
    for step in steps:
        if isinstance(step.writer, Packing):
            step.writer.seal()
    return [name for name in names if any(entry.name == name for item in work for entry in item.chain)]


@dataclass
class _Work:
    """What is to be merged into one layer.

    Attributes:
        proved: whether bounds alone prove that the merged weight is finite.
        matrix: the weight in its own memory, and
        updates: what is added there, where that can be done.
    """

    layer: AdaptedLayer
    chain: tuple[Entry, ...]
    proved: bool = False
    matrix: Tensor | None = None
    updates: Sequence[LowRank] = ()

    @property
    def weight(self) -> Any:
        """The stored weight."""
        return getattr(self.layer.leaf_layer, self.layer.kind.weight_name)

    def prove(self) -> None:
        """Find out how the update can be written, and whether bounds tell that the result is finite."""
        updates = low_rank_updates(self.layer, self.chain)
        if updates is None:
            return
        self.matrix = matrix_in_place(self.layer)
        if self.matrix is None:  # a storage's or several processes': the factors are not held until it is written
            self.proved = proved_finite(self.layer.present_affine(whole=True).weight, updates)
            return
        self.updates = updates
        self.proved = proved_finite(self.weight, updates)


@dataclass
class _Step:
    """One layer's merge, ready to be written.

    Attributes:
        writer: adds the update in the memory of the weight, where that can be done.
        after: otherwise the whole merged tensors; and what is merged and kept then.
        before: what puts the layer back.
    """

    layer: AdaptedLayer
    writer: InPlace | Packing | None
    after: tuple[dict[str, Tensor], tuple[str, ...], Any]
    before: tuple[dict[str, Tensor], tuple[str, ...], Any]

    def carry_out(self) -> None:
        """Write; doing it again after an interruption completes it."""
        if self.writer is not None:
            self.writer.write()
            note_finite(getattr(self.layer.leaf_layer, self.layer.kind.weight_name))
        self.layer.write(*self.after)

    def undo(self) -> None:
        """Put the layer back as it was."""
        if isinstance(self.writer, Packing):
            self.writer.undo()
        self.layer.write(*self.before)


def _step(item: _Work, keep: str, partner: AdaptedLayer | None) -> _Step:
    """Prepare one layer's merge; ``partner`` has written the weight already."""
    layer, chain = item.layer, item.chain
    leaf, weight = layer.leaf_layer, layer.kind.weight_name
    writer: InPlace | Packing | None = None
    new: dict[str, Tensor] = {}
    if partner is None:
        writer = _in_place(item, keep == "packed" and not layer._merged) if item.proved else None
        if writer is None:
            new = layer.merged_tensors(chain) if item.proved else merged_finite(layer, chain)
    written = [weight] if writer is not None else list(new)
    kept: Any = {}
    before: dict[str, Tensor] = {}
    if isinstance(writer, Packing):
        kept = PackedKept(leaf, layer.kind, layer.site, writer)
    elif keep != "none":
        before = {name: _copy(getattr(leaf, name)) for name in written}
        held = dict(layer._kept)  # packed ones become copies: they can be restored from the weight as it is only
        if not layer._merged or held:
            kept = before | held
            if partner is not None:
                kept = {weight: partner._kept[partner.kind.weight_name]} | held
    merged = (*layer._merged, *dict.fromkeys(entry.name for entry in chain))
    return _Step(layer, writer, (new, merged, kept), (before, layer._merged, layer._kept))


def _in_place(item: _Work, packed: bool) -> InPlace | Packing | None:
    if item.matrix is None:
        return None
    return (Packing if packed and can_pack(item.matrix) else InPlace)(item.matrix, item.updates)


def _finish(steps: list[_Step], work: list[_Work], error: BaseException) -> None:
    """Complete the layer that was being written, as there is nothing to go back to; its books then say what is so."""
    layer = steps[-1].layer
    try:
        steps[-1].carry_out()
    except Exception as again:
        raise MergeError(
            f"{layer.site.name!r}: writing the merged weight failed half-way ({again}), and with keep='none' nothing "
            "was kept to go back to; load the base weights again"
        ) from error
    held = {id(item.weight): item.layer for item in work[: len(steps)]}
    for item in work[len(steps) :]:
        partner = held.get(id(item.weight))
        if partner is not None:
            item.proved = True
            _step(item, "none", partner).carry_out()


def unmerge(state: State) -> bool:
    """Put the original weights back, bitwise.

    Returns:
        Whether anything was merged.

    Raises:
        StateError: some layer was merged with ``keep="none"``; nothing is changed then.
    """
    layers = [layer for layer in state.layers() if layer.merged_names]
    for layer in layers:
        if not layer.merges_itself and not layer._kept:
            raise StateError(
                f"{layer.site.name!r}: the original weight was not kept when adapters were merged (keep='none'), so it "
                "cannot be put back exactly"
            )
    settle()
    for layer in layers:
        if layer.merges_itself:
            layer.unmerge()
            continue
        packed = isinstance(layer._kept, PackedKept)
        finite = [] if packed else [name for name, tensor in layer._kept.items() if known_finite(tensor)]
        layer.restore()
        for name in finite:
            note_finite(getattr(layer.leaf_layer, name))
    return bool(layers)


def _copy(tensor: Tensor) -> Tensor:
    copy = copied(tensor)
    if known_finite(tensor):
        note_finite(copy)
    return copy
