"""An adapter's tensors as a dict, and back into a model: everything is checked before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from inlay.checkpoint.direct import exact_pairs
from inlay.checkpoint.embeddings import embedding_targets, embeddings_to_save
from inlay.checkpoint.keys import foreign_biases, key_index
from inlay.checkpoint.migrations import migrated
from inlay.checkpoint.older import biases_of_any_name, lost_biases, present_layout, without_wrappers
from inlay.checkpoint.resolve import Resolution, listed, resolve
from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.translation import collected, renamed
from inlay.checkpoint.tree import TRANSPARENT, Tree
from inlay.checkpoint.write import copy_all, write
from inlay.core.initial import derive_loaded
from inlay.core.method import Method
from inlay.core.state import State
from inlay.errors import CheckpointError, CheckpointMismatchError, InlayWarning, StateError, did_you_mean

__all__ = ["get_peft_model_state_dict", "load_tensors", "saved_tensors", "set_peft_model_state_dict"]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return one adapter's tensors by the keys of its checkpoint, which do not contain the adapter's name.

    Args:
        model: a ``PeftModel``, or a model with injected adapters, whose keys have no ``base_model.model.`` before
            them. Compiled and data-parallel wrappers around it are seen through.
        state_dict: values to take instead of the model's own, by the names of ``model.state_dict()`` (with or
            without ``_orig_mod`` and the like), such as a gathered dict from FSDP or accelerate. Not changed.
        adapter_name: which adapter.
        unwrap_compiled: accepted for callers of PEFT; a compiled model is always seen through.
        save_embedding_layers: whether the embeddings' own weights are added; ``"auto"`` when they are adapted, or
            resized against the base model's config file (looked for on this machine only).

    Returns:
        Whole tensors without gradient, on their own devices, sharing memory with the model where it holds them whole.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: no adapter of that name.
        CheckpointError: a tensor is on the meta device or a shard that cannot be gathered here, ``state_dict`` lacks
            one, or two tensors would have one key.
    """
    return saved_tensors(Tree(model), adapter_name, state_dict, save_embedding_layers=save_embedding_layers)


def saved_tensors(
    tree: Tree,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Do what :func:`get_peft_model_state_dict` does, with a model as it is now."""
    index = key_index(tree, adapter)
    for target in embeddings_to_save(tree, adapter, save_embedding_layers):
        index.add(target)
    for target in biases_of_any_name(tree, index, adapter):
        if tree.owner_name(target.tensor) in tree.state.base_values:  # a load changed it
            index.add(target)
    given = None if state_dict is None else _Given(state_dict)
    result = {
        key: target.whole(target.tensor if given is None else given.value(target))
        for key, target in index.saved().items()
    }
    for key, (source, transposed) in index.derived.items():
        value = result[index.rendered(source.key)]
        result[index.rendered(key)] = value.mT if transposed else value
    record = tree.state.record(adapter)
    return collected(tree, index, adapter, record.method.pack(record.config, result), state_dict)


class _Given:
    """Values by memory name, whatever wrappers the names went through."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.plain = {_plain(name): value for name, value in values.items()}

    def value(self, target: Target) -> Tensor:
        for names, name in ((self.values, target.memory), (self.plain, _plain(target.memory))):
            for candidate in (name, name.removeprefix("base_model.model."), f"base_model.model.{name}"):
                if candidate in names:
                    return names[candidate]
        held = target.tensor
        # What never trains may be absent: exports of trainable parameters leave it out.
        if not held.requires_grad and not held.is_meta and held.shape in (target.shape, target.room):
            return held
        raise CheckpointError(
            f"state_dict: expected {target.memory!r}, found no such name.{did_you_mean(target.memory, self.values)}"
        )


def _plain(name: str) -> str:
    """Return a memory name without the segments of wrappers (``module`` only in front: it is a common name)."""
    parts = name.split(".")
    while parts and parts[0] in TRANSPARENT.values():
        parts = parts[1:]
    skipped = set(TRANSPARENT.values()) - {"module"}
    return ".".join(part for part in parts if part not in skipped)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Write a checkpoint's tensors into one adapter, which may have another name than when it was saved.

    Everything is checked first: if this raises, the model is as it was. Values take the device and dtype of the
    model's tensors.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        peft_model_state_dict: tensors by key, with or without ``base_model.model.`` before them. Not changed.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: accepted for callers of PEFT: tensors on the meta device are always replaced, others
            always written in place.

    Returns:
        A named tuple with ``missing_keys`` (names in this model, the adapter's included) and ``unexpected_keys``.

    Raises:
        CheckpointMismatchError: a shape differs; under the policy ``inlay`` also a missing or unexpected key; under
            both a missing tensor of ``modules_to_save``, or a missing shared one that the config says was saved.
        CheckpointError: the file has a retired format.
        StateError: the model has no adapters, or this one is merged.
        UnknownAdapterError: no adapter of that name.
    """
    return load_tensors(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes)


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: str = "default",
    *,
    strict: bool | None = None,
    ignore_mismatched_sizes: bool = False,
    source: str | None = None,
    version: str | None = None,
    release: Callable[[], object] | None = None,
    fresh: State | None = None,
) -> Any:
    """What :func:`set_peft_model_state_dict` does, with a strictness of its own.

    Args:
        strict: whether missing and unexpected keys raise; by default what the model's policy says.
        source: the file's name, for messages.
        version: the release of PEFT that the file says it is of; without it, square banks of matrices are taken as
            they are.
        release: called now and then while values are written, to let go of memory that ``tensors`` were read into.
        fresh: the state that the adapter came into just now, so that its sites say where its layers stand.
    """
    pairs = None if fresh is None else exact_pairs(fresh, adapter, tensors)
    if pairs is not None:
        copy_all(pairs, release)
        return _IncompatibleKeys([], [])
    tree = Tree(model)
    index = key_index(tree, adapter)
    for layer in tree.state.layers():
        if adapter in layer.merged_names:
            raise StateError(f"adapter {adapter!r} is merged into {layer.site_path!r}; unmerge it before loading it")
    where = f"{source}: " if source else ""
    try:
        given = without_wrappers(index, renamed(tree, index, adapter, tensors))
        record = tree.state.record(adapter)
        if type(record.method).unpack is not Method.unpack:
            given = record.method.unpack(record.config, dict(given))
        tensors = migrated(tree, index, given, adapter)
        further = embedding_targets(tree)
        if not (tree.state.policy.strict_load if strict is None else strict):
            further += foreign_biases(tree, index)
        further += biases_of_any_name(tree, index, adapter)
        found = resolve(index, tensors, adapter, further)
        present_layout(tree, index, found, adapter, version, given)
    except CheckpointError as error:
        raise type(error)(f"{where}{error}") from None
    strict = tree.state.policy.strict_load if strict is None else strict
    _judge(tree, index, found, strict, ignore_mismatched_sizes, where, adapter)
    write(tree, {target: value for target, (_, value) in found.found.items()}, release)
    derive_loaded(tree.state, adapter)
    tree.state.touch()
    absent = [*found.missing, *found.misshaped]
    return _IncompatibleKeys([target.memory for target in absent], list(found.unexpected))


def _judge(
    tree: Tree, index: KeyIndex, found: Resolution, strict: bool, ignore_sizes: bool, where: str, adapter: str
) -> None:
    """Raise or warn for what does not fit."""
    lost = lost_biases(tree, found, adapter)
    left_out = Resolution(misshaped=found.misshaped) if ignore_sizes else Resolution()
    raised = Resolution(
        missing=[
            target for target in found.missing if (strict and target not in lost) or target.part in ("shared", "copy")
        ],
        unexpected=found.unexpected if strict else [],
        misshaped={} if ignore_sizes else found.misshaped,
    )
    problem = raised.problem(index)
    if problem is not None:
        raise CheckpointMismatchError(f"{where}the checkpoint does not fit adapter {adapter!r}: {problem}")
    if lost and strict:
        warnings.warn(
            f"{where}the checkpoint has no biases, as releases 0.7 to 0.20 of PEFT wrote it for a configuration that "
            "trains those of adapted layers; the model's own are used",
            InlayWarning,
            stacklevel=4,
        )
    warned = left_out.problem(index)
    if warned is not None:
        warnings.warn(f"{where}left out, because ignore_mismatched_sizes is set: {warned}", InlayWarning, stacklevel=4)
    again = [target for target in index.targets.values() if target.part == "shared" and not target.saved]
    if found.regenerated:
        warnings.warn(
            f"{where}{listed(map(repr, found.regenerated))} is in the checkpoint and is not read, because the "
            "configuration says to make it again from its seed",
            InlayWarning,
            stacklevel=4,
        )
    elif again and not tree.state.policy.strict_load:
        warnings.warn(
            f"{where}{listed(repr(target.key) for target in again)} is made again from the configuration's seed; "
            "another version of torch may draw other values",
            InlayWarning,
            stacklevel=4,
        )
