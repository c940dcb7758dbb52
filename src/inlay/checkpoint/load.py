"""Restoring every adapter of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.checkpoint.files import load_adapter_files
from inlay.checkpoint.manifest import Manifest, read_manifest, restore
from inlay.checkpoint.mapped import release_of
from inlay.checkpoint.state_dict import load_tensors
from inlay.checkpoint.tree import Tree, bare_model
from inlay.core.active import set_trainable
from inlay.core.collect import uncollected
from inlay.core.eject import delete, eject
from inlay.core.holder import put_in_eval_mode
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import Policy
from inlay.core.state import State, find_state
from inlay.errors import UnknownAdapterError, did_you_mean

__all__ = ["chosen_adapters", "load_all"]


@uncollected
def load_all(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapters: str | Iterable[str] = "all",
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    policy: Policy | None = None,
    **hub_keywords: Any,
) -> Manifest:
    """Add the adapters of a folder to a model, with the names, order, active set and scales that they were saved with.

    Args:
        model: a bare model, with or without adapters, or a ``PeftModel`` (which adds them by its ``load_adapter``).
        directory: what ``save_pretrained`` wrote; a local folder or a Hub repository.
        adapters: ``"all"``, or the names of those to add.
        is_trainable: leave the adapters trainable; otherwise they are frozen and the model is put in eval mode.
        autocast_adapter_dtype: adapters of a half-precision base are kept in float32.
        policy: for a bare model without adapters: how strict to be.
        hub_keywords: revision, token, ... of ``huggingface_hub.hf_hub_download``.

    Returns:
        The folder's manifest.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the model; the model is then as it was.
        UnknownAdapterError: a name that the folder does not have.
        AdapterNameError: the model already has an adapter of that name.
    """
    manifest = read_manifest(directory, **hub_keywords)
    names = chosen_adapters(manifest, adapters, directory)
    bare, _ = bare_model(model)
    wrapper: Any = None if bare is model else model
    before = find_state(bare)
    active = () if before is None else before.active
    added: list[str] = []
    try:
        for name in names:
            subfolder = manifest.folders[name] or None
            if wrapper is not None:
                wrapper.load_adapter(
                    directory,
                    name,
                    is_trainable=is_trainable,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    **({} if subfolder is None else {"subfolder": subfolder}),
                    **hub_keywords,
                )
            else:
                config, tensors = load_adapter_files(directory, subfolder, **hub_keywords)
                config.inference_mode = not is_trainable
                made = plan(
                    bare, config, name, policy=policy, autocast_adapter_dtype=autocast_adapter_dtype, held=tensors
                )
                source = os.path.join(os.fspath(directory), subfolder or "")

                def fill(
                    state: State,
                    name: str = name,
                    tensors: Any = tensors,
                    source: str = source,
                    version: str | None = config.peft_version,
                ) -> None:
                    load_tensors(
                        bare, tensors, name, source=source, version=version, release=release_of(tensors), fresh=state
                    )

                # Under a lenient policy a file may lack tensors, which then keep their initial values.
                strict = made.policy.strict_load
                inject(made, low_memory=strict, initialise=not strict, then=fill)
            added.append(name)
        tree = Tree(model)
        restore(tree, manifest)
    except BaseException:
        _take_back(bare, wrapper, added, active)
        raise
    if not is_trainable and wrapper is None:
        for name in names:
            tree.state.records[name].frozen = True
        set_trainable(tree.state, names, False)
        if tree.state.policy.eval_on_load:
            put_in_eval_mode(bare, tree.state, names)
    return manifest


def chosen_adapters(manifest: Manifest, adapters: str | Iterable[str], directory: str | os.PathLike[str]) -> list[str]:
    """Return the names that ``adapters`` means, in the order of the folder.

    Raises:
        UnknownAdapterError: a name that the folder does not have.
    """
    if adapters == "all":
        return list(manifest.folders)
    wanted = {adapters} if isinstance(adapters, str) else set(adapters)
    for name in wanted - manifest.folders.keys():
        raise UnknownAdapterError(
            f"{os.fspath(directory)!r} has no adapter {name!r}; it has: {', '.join(map(repr, manifest.folders))}."
            f"{did_you_mean(name, manifest.folders)}"
        )
    return [name for name in manifest.folders if name in wanted]


def _take_back(bare: nn.Module, wrapper: Any, added: list[str], active: tuple[str, ...]) -> None:
    """Remove the adapters that a load added before it failed."""
    if wrapper is not None:
        for name in reversed(added):
            wrapper.delete_adapter(name)
        return
    state = find_state(bare)
    if state is None or not added:
        return
    if len(added) == len(state.records):
        eject(bare, state)
        return
    for name in reversed(added):
        delete(bare, state, name)
    state.active = active
    state.touch()
