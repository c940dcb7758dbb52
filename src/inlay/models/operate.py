"""What can be done with the adapters of a model, bare or wrapped; every operation happens whole or not at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.core.active import set_active, set_trainable, switch_training, switched_back
from inlay.core.collect import uncollected
from inlay.core.eject import delete, eject, ejectable
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import Plan, plan
from inlay.core.policy import Policy
from inlay.core.progress import shown
from inlay.core.state import State
from inlay.core.targets import places
from inlay.errors import ConfigTypeError, InlayWarning, NoTargetError, UnsupportedError
from inlay.models.root import mark, unmark

__all__ = ["activate", "add", "apply", "listed", "merge_into", "remove", "set_enabled", "take_out", "unmerge_all"]


@uncollected
def add(
    root: nn.Module,
    config: Any,
    name: str,
    *,
    state: State | None = None,
    policy: Policy | None = None,
    autocast: bool = True,
    low_memory: bool = False,
    initialise: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    held: dict[str, Tensor] | None = None,
    then: Callable[[State], object] | None = None,
) -> State:
    """Plan an adapter and put it in; what does not become active does not train.

    Args:
        root: the bare model.
        config: the adapter's configuration.
        name: its name.
        state: the state to enter, of a wrapper around a model that may have no adapters yet.
        policy: for a model that has neither adapters nor a wrapper.
        autocast: adapters of a half-precision model are created in float32.
        low_memory: create tensors on the meta device.
        initialise: False leaves the values undefined, for a load that overwrites them.
        state_dict: an adapter's tensors, whose keys name the layers to adapt instead of the configuration.
        held: the tensors that ``then`` fills the adapter with; they say what an old configuration means.
        then: run last; if it raises, the model is as before.
    """
    refuse_prompts(config)
    asked = config
    if state_dict is not None:
        asked = copy.deepcopy(config)
        asked.target_modules = targets_in(root, state_dict)
    if state is not None:
        root.__dict__["_state"] = state
    try:
        made = plan(root, asked, name, policy=policy, autocast_adapter_dtype=autocast, held=held)
        return apply(root, made, config=config, low_memory=low_memory, initialise=initialise, then=then, unchanged=True)
    except BaseException:
        if state is not None and not state.records:
            unmark(root)
        raise


def apply(
    root: nn.Module,
    made: Plan,
    *,
    config: Any = None,
    low_memory: bool = False,
    initialise: bool = True,
    seed: int | None = None,
    then: Callable[[State], object] | None = None,
    unchanged: bool = False,
) -> State:
    """Put a planned adapter in; see :func:`add`, and :func:`inlay.core.inject.inject` for ``unchanged``."""
    name = made.adapter

    def finish(state: State) -> None:
        record = state.records[name]
        if config is not None:
            record.config = config
        record.frozen = bool(record.config.inference_mode)
        if name in state.training and (record.frozen or name not in state.active):
            set_trainable(state, [name], False)
        if then is not None:
            then(state)

    alone = made.state is None or not made.state.records  # so that it becomes active
    trains = alone and not (made.config if config is None else config).inference_mode
    state = inject(
        made,
        low_memory=low_memory,
        initialise=initialise,
        seed=seed,
        trainable=trains,
        then=finish,
        unchanged=unchanged,
    )
    mark(root, state, name)
    return state


def refuse_prompts(config: Any) -> None:
    """Prompt methods have no layers to go into.

    Raises:
        UnsupportedError: ``config`` is one.
        ConfigTypeError: ``config`` is no configuration at all.
    """
    if not hasattr(config, "peft_type"):
        raise ConfigTypeError(f"expected an adapter configuration such as LoraConfig, found {type(config).__name__}")
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UnsupportedError(f"{config.peft_type.value} learns virtual tokens and has no layers to be injected into")


def targets_in(root: nn.Module, state_dict: dict[str, Tensor]) -> list[str]:
    """Return the paths of the layers that an adapter's tensors belong to.

    Raises:
        NoTargetError: no key begins with the path of a module.
    """
    known = {path for place in places(root) for path in (place.path, *place.aliases)}
    own = {name for name, _ in root.named_parameters()}
    found = {}
    for key in state_dict:
        key = key.removeprefix("base_model.model.")
        if key in own:
            continue  # a full copy or a bias, which other fields ask for
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            if path in known:
                found[path] = True
                break
    if not found:
        some = ", ".join(list(state_dict)[:3]) or "it is empty"
        raise NoTargetError(f"no key of the state dict begins with a module of {type(root).__name__} ({some})")
    return list(found)


def listed(names: str | Iterable[str], what: str = "adapter_names") -> list[str]:
    """Return adapter names as a list; a single string is one name.

    Raises:
        ConfigTypeError: something else than strings.
    """
    found = [names] if isinstance(names, str) else list(names)
    for name in found:
        if not isinstance(name, str):
            raise ConfigTypeError(f"{what}: expected adapter names, found {name!r}")
    return found


def activate(state: State, names: str | Iterable[str], inference_mode: bool = False) -> None:
    """Activate adapters in this order. The active ones train, unless they are frozen; all others do not.

    Raises:
        UnknownAdapterError: a name that the model does not have.
    """
    with state.placed(listed(names, "adapter_name")) as wanted:
        _activate(state, wanted, inference_mode)


def _activate(state: State, wanted: list[str], inference_mode: bool) -> None:
    set_active(state, wanted)
    if not state.policy.unfreeze_on_activation:
        return
    keeps = state.policy.keep_frozen
    frozen = {name for name in wanted if inference_mode or (keeps and state.records[name].frozen)}
    on = [name for name in wanted if name not in frozen]
    switch_training(state, [*state.training_beside(wanted), *frozen], on)


def remove(root: nn.Module, state: State, name: str) -> None:
    """Delete an adapter. If it was the only active one, the first of the others becomes active, with a warning.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: it is merged.
    """
    alone = state.active == (name,)
    delete(root, state, name)
    mark(root, state, name)
    if alone and state.records:
        first = next(iter(state.records))
        activate(state, first)
        warnings.warn(
            f"adapter {name!r} was active and was deleted; {first!r} is active now", InlayWarning, stacklevel=3
        )


def set_enabled(state: State, enabled: bool) -> None:
    """Switch all adapters on or off until further notice; who is active and who trains stays as it is."""
    for layer in state.layers():
        layer.override(enabled=enabled)
    state.enabled = enabled
    state.touch()


def merge_into(
    state: State, names: Sequence[str] | None = None, *, keep: str = "copy", progressbar: bool = False
) -> None:
    """Write adapters into the base weights; see :func:`inlay.core.merge.merge`.

    Raises:
        ConfigTypeError: ``names`` is a string.
        UnknownAdapterError: a name that the model does not have.
        MergeError: the merge would lose something; nothing was written.
    """
    if isinstance(names, str):
        raise ConfigTypeError(f"adapter_names: expected a list of names, found the string {names!r}")
    wanted = list(state.active if names is None else names)
    already = [name for name in wanted if name in merged_names(state)]
    done = merge(state, wanted, keep=keep, progress=lambda work: shown(work, "Merging", on=progressbar))
    idle = [name for name in already if name not in done]
    if idle:
        warnings.warn(f"{', '.join(map(repr, idle))} is merged already", InlayWarning, stacklevel=3)
    elif not wanted:
        warnings.warn("no adapter is active, so nothing was merged", InlayWarning, stacklevel=3)


def merged_names(state: State) -> list[str]:
    """Return the adapters that are merged into some layer, in the order of merging."""
    return list(dict.fromkeys(name for layer in state.layers() for name in layer.merged_names))


def unmerge_all(state: State) -> None:
    """Put the original weights back, bitwise; warns if nothing is merged."""
    if not unmerge(state):
        warnings.warn("no adapter is merged, so there is nothing to unmerge", InlayWarning, stacklevel=3)


def take_out(
    root: nn.Module, state: State, *, merged: bool, names: Sequence[str] | None = None, progressbar: bool = False
) -> nn.Module:
    """Take all adapters out of the model, merged into its weights or not, and return it.

    Raises:
        MergeError: the merge would lose something; the model is then as before.
    """
    found = None
    if merged and state.records:
        if isinstance(names, str):
            raise ConfigTypeError(f"adapter_names: expected a list of names, found the string {names!r}")
        found = ejectable(root)  # a merge without copies cannot be taken back
        with switched_back(state):
            if names is not None:  # the others are dropped, and the right full copies stay
                set_active(state, names)
            merge_into(state, names, keep="none", progressbar=progressbar)
        state.enabled = True
    elif not merged:
        unmerge(state)
    eject(root, state, restore=not merged, found=found)
    unmark(root)
    return root
