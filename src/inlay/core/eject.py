"""Taking adapters out again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from inlay.core.follow import Follower
from inlay.core.hanging import drop_shared
from inlay.core.layer import AdaptedLayer
from inlay.core.readers import restore_readers
from inlay.core.shared import register_shared, unregister_shared
from inlay.core.state import Record, State
from inlay.core.targets import Place, Survey, base_parameters, standing
from inlay.errors import MergeError
from inlay.parallel.fsdp import refuse_shell, settle
from inlay.parallel.tensors import scatter

__all__ = ["delete", "eject", "ejectable", "restore_grad", "take_out_empty"]


def delete(model: nn.Module, state: State, name: str) -> None:
    """Remove one adapter; layers that end without any are taken out too, and base biases that it trained are put back.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: it is merged.
    """
    record = state.record(name)
    layers = list(state.layers())
    for layer in layers:
        merged = layer.merged_names
        if not merged:
            continue
        if name in merged:
            raise MergeError(f"adapter {name!r} is merged into {layer.site_path!r}; unmerge it before deleting it")
        if record.rebased:
            raise MergeError(
                f"deleting {name!r} gives {layer.site_path!r} back the weight that it had before, and "
                f"{', '.join(map(repr, merged))} is merged into it; unmerge first"
            )
    record.reach = None  # which would keep its tensors alive
    bare = False
    for layer in layers:
        layer.drop_adapter(name)
        bare = bare or layer.is_bare
    if bare:
        take_out_empty(model, state)
        restore_readers(model)
    if len(state.records) == 1:
        _end_replication(model, state)
    after = list(state.records)[list(state.records).index(name) + 1 :] if record.rebased else []
    del state.records[name]
    state.training.discard(name)
    if record.shared:
        drop_shared(state, record.shared, name)
        register_shared(model, state)
    if record.biases:
        _put_back(model, state, record.biases)
    if record.rebased:
        _give_back(model, state, record, [state.records[other] for other in after])
    state.active = tuple(active for active in state.active if active != name)
    state.touch()


@torch.no_grad()
def _put_back(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Give base parameters the values that they had, and freeze them as the rest of the base is."""
    named = base_parameters(model)
    for name in names:
        value = state.base_values.pop(name, None)
        if value is not None and name in named:
            named[name].copy_(scatter(value, named[name]))
            named[name].requires_grad_(False)


@torch.no_grad()
def _give_back(model: nn.Module, state: State, record: Record, after: list[Record]) -> None:
    """Give base tensors back what a deleted adapter's start took out of them; ``after`` are those that came later."""
    named = base_parameters(model)
    for name, value in record.rebased.items():
        later = next((other for other in after if name in other.rebased), None)
        if name not in named:
            continue
        if later is None:
            named[name].copy_(scatter(value, named[name]))
        else:  # it took its own share out of what was left, which was this much less
            share = scatter(value, named[name]).float() - scatter(later.rebased[name], named[name]).float()
            named[name].copy_(named[name].float() + share)
            later.rebased[name] = value
        if not any(name in other.rebased for other in state.records.values()):
            state.base_values.pop(name, None)


def take_out_empty(model: nn.Module, state: State) -> None:
    """Put the original module back where no adapter is left."""
    for place, follower in standing(model):
        if follower.adapters_here():
            continue
        _refuse_shell(place, follower)
        place.put(follower.taken_out(restore=False))
        state.leave(follower)


def _refuse_shell(place: Place, follower: Follower) -> None:
    if isinstance(follower, AdaptedLayer):
        refuse_shell(place.path, follower)


def ejectable(model: nn.Module) -> Survey:
    """Return what the model consists of, if everything that adapters put into it can be taken out.

    Raises:
        UnsupportedError: FSDP has wrapped layers one by one; names one.
    """
    found = Survey(model)
    for place, follower in found.standing:
        _refuse_shell(place, follower)
    return found


def eject(model: nn.Module, state: State, *, restore: bool = True, found: Survey | None = None) -> nn.Module:
    """Take every adapter out: the original modules stand where they stood.

    Args:
        restore: also give back what training changed in the base (biases); False keeps it, as after a merge.
        found: what :func:`ejectable` returned, if no module was put elsewhere since.
    """
    found = ejectable(model) if found is None else found
    settle()
    # what stands over full copies may leave a trained one in the place of the original
    same = state.replication is None and all(isinstance(follower, AdaptedLayer) for _, follower in found.standing)
    parameters = found.parameters if same else None
    for place, follower in found.standing:
        place.put(follower.taken_out(restore))
    restore_readers(model)
    _end_replication(model, state)
    restore_grad(base_parameters(model) if parameters is None else parameters, state.base_grad)
    if restore and state.base_values:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.base_values.items():
                named[name].copy_(scatter(value, named[name]))
    state.records.clear()
    state.active = ()
    unregister_shared(model, state)
    state.shared._modules.clear()
    state.base_values.clear()
    for follower in [*state.layers()]:
        state.leave(follower)
    state.training.clear()
    state.touch()
    return model


def _end_replication(model: nn.Module, state: State) -> None:
    if state.replication is not None:
        state.replication.restore(model)
        state.replication = None


def restore_grad(parameters: dict[str, nn.Parameter], before: dict[str, bool]) -> None:
    """Give the base parameters the ``requires_grad`` that they had."""
    for name, parameter in parameters.items():
        flag = before.get(name)
        if flag is not None:
            parameter.requires_grad_(flag)
