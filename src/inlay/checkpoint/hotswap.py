"""Another adapter in the place of one that a model has: its tensors and numbers are written over, nothing is rebuilt.

So a model that was compiled after :func:`prepare_model_for_compiled_hotswap` need not be compiled again: its tensors
have room for every rank up to the one named there, and its scales are tensors, whose values compiled code reads anew.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.files import load_adapter_files
from inlay.checkpoint.rank import RANK_FIELDS, Sized, entries_of, own_entries, renewed
from inlay.checkpoint.replace import replace_adapter
from inlay.checkpoint.tree import Tree, bare_model, unwrapped
from inlay.config import PeftType
from inlay.config.variants import NO_VARIANT
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State, find_states
from inlay.errors import CheckpointMismatchError, ConfigError, InlayWarning, TargetError, UnsupportedError

__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

# Methods whose adapters can be swapped -> the config fields that must be equal.
CONFIG_KEYS_TO_CHECK: dict[Any, list[str]] = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]
}


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put an adapter from a folder or the Hub in the place of one that a model has, which keeps its name.

    Args:
        model: a ``PeftModel`` or a model with injected adapters, compiled or not.
        model_name_or_path: where the new adapter is.
        adapter_name: the adapter to replace.
        torch_device: where its tensors are read to, before they go to the model's own devices; by default the CPU.
        kwargs: ``subfolder``, ``key_mapping`` and what ``huggingface_hub.hf_hub_download`` takes.

    Raises:
        ConfigError: the configurations do not fit; see :func:`check_hotswap_configs_compatible`.
        what :func:`hotswap_adapter_from_state_dict` raises. In each case the model is as before.
    """
    old_token = kwargs.pop("use_auth_token", None)  # what huggingface_hub called it
    if old_token is not None:
        kwargs.setdefault("token", old_token)
    config, tensors = load_adapter_files(
        model_name_or_path,
        kwargs.pop("subfolder", None),
        device=torch_device,
        key_mapping=kwargs.pop("key_mapping", None),
        **kwargs,
    )
    tree = Tree(model)
    check_hotswap_configs_compatible(_record_config(tree.state, adapter_name), config)
    replace_adapter(tree, adapter_name, config, tensors, f"{os.fspath(model_name_or_path)}: ")


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Put an adapter, given as tensors, in the place of one that a model has.

    Tensors are written in place; where the new rank is smaller, the rest is filled with zeros. What the new adapter
    lacks is taken out of effect: low-rank factors become zero, anything else is as on a fresh adapter.

    Args:
        model: a ``PeftModel`` or a model with injected adapters, compiled or not.
        state_dict: the new adapter's tensors by key, with or without the adapter's name in it. Not changed.
        adapter_name: the adapter to replace.
        config: the new adapter's configuration: rank, alpha and their patterns are taken from it.
        parameter_prefix: accepted for callers of PEFT: which tensors are the adapter's is known.

    Raises:
        CheckpointMismatchError: no such adapter, keys that mean nothing in the model, or shapes that do not fit.
        ConfigError: another method.
        MergeError: the adapter is merged.
        In each case the model is as before.
    """
    tree = Tree(model)
    _check_methods(_record_config(tree.state, adapter_name), config)
    replace_adapter(tree, adapter_name, config, state_dict)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Compare the configurations of two adapters, one of which is to take the other's place.

    Raises:
        ConfigError: they are of different methods, or of one whose adapters cannot be swapped, or differ in a field
            that swapping does not change.
    """
    _check_methods(config0, config1)
    ranks = () if config0.kasa_config is None else ("r", "rank_pattern")  # so much was taken out of the weights
    for field in (*CONFIG_KEYS_TO_CHECK[config0.peft_type], *NO_VARIANT, *ranks):
        ours, theirs = getattr(config0, field), getattr(config1, field)
        if ours != theirs:
            raise ConfigError(f"hot swap: {field} must be the same for both adapters, found {ours!r} and {theirs!r}")


def _check_methods(config0: Any, config1: Any) -> None:
    first, second = (getattr(config, "peft_type", None) for config in (config0, config1))
    known = ", ".join(str(getattr(method, "value", method)) for method in CONFIG_KEYS_TO_CHECK)
    if first != second or first not in CONFIG_KEYS_TO_CHECK:
        found = " and ".join(str(getattr(method, "value", method)) for method in (first, second))
        raise ConfigError(f"hot swap: expected two adapters of one method out of {known}, found {found}")


def _record_config(state: State, adapter: str) -> Any:
    if adapter not in state.records:
        known = ", ".join(map(repr, state.records)) or "none"
        raise CheckpointMismatchError(f"hot swap: no adapter {adapter!r} to replace; there are: {known}")
    return state.records[adapter].config


# -- before compiling -------------------------------------------------------------------------------------------------


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Make a model ready to be compiled once and have its LoRA adapters swapped after that.

    Call it when the first adapter is in the model and before ``torch.compile``. Outputs stay as they are: tensors are
    filled up with zeros, and scales become tensors of no dimension.

    Args:
        model: a ``PeftModel`` or a model with injected adapters.
        target_rank: the largest rank of any adapter that is to come; None leaves the sizes alone.
        config: configurations, one or by adapter name, that are to say ``r=target_rank`` from now on. What is saved
            has the adapter's own rank.
        check_compiled: ``error``, ``warn`` or ``ignore`` a model that is compiled already.

    Raises:
        UnsupportedError: the model is compiled, an adapter has a larger rank, or a layer cannot have this rank.
        TargetError: the model has no LoRA adapter.
        ConfigError: a wrong argument.
        In each case the model is as before.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled: expected 'error', 'warn' or 'ignore', found {check_compiled!r}")
    if target_rank is not None and (isinstance(target_rank, bool) or not isinstance(target_rank, int)):
        raise ConfigError(f"target_rank: expected a whole number, found {target_rank!r}")
    if check_compiled != "ignore" and _is_compiled(model):
        message = "the model is compiled already, and would have to be compiled again; prepare it before torch.compile"
        if check_compiled == "error":
            raise UnsupportedError(message)
        warnings.warn(message, InlayWarning, stacklevel=2)
    found = [(state, name) for state in find_states(bare_model(model)[0]) for name in _swappable(state)]
    entries = [pair for state, name in found for pair in entries_of(state, name)]
    if not entries:
        raise TargetError(
            "the model has no LoRA adapter; load the first one before calling prepare_model_for_compiled_hotswap"
        )
    sized = [] if target_rank is None else [s for state, name in found for s in _enlarged(state, name, target_rank)]
    for one in sized:
        one.write(one.slot.resized(one.tensor, one.room))
    for layer, entry in entries:
        _tensor_scale(layer, entry)
    for state in {id(state): state for state, _ in found}.values():
        state.touch()
    if config is not None and target_rank is not None:
        _tell(config, target_rank, [state.records[name] for state, name in found])


def _is_compiled(model: nn.Module) -> bool:
    root, passed = unwrapped(model)
    return "_orig_mod" in passed or any(getattr(module, "_compiled_call_impl", None) for module in root.modules())


def _swappable(state: State) -> list[str]:
    return [name for name, record in state.records.items() if record.config.peft_type in CONFIG_KEYS_TO_CHECK]


def _enlarged(state: State, adapter: str, rank: int) -> list[Sized]:
    """Return an adapter's tensors with the room that a rank needs, everything checked."""
    record = state.records[adapter]
    config = copy.deepcopy(record.method.config)
    config.r, config.rank_pattern = rank, {}
    found = []
    for layer, entry in own_entries(state, adapter):
        wide = renewed(entry.method, config)
        reason = wide.refuse(entry.site)
        if reason is not None:
            raise UnsupportedError(f"{entry.site.name!r}: target_rank={rank}: {reason}")
        slots, large = entry.method.slots(entry.site), wide.slots(entry.site)
        for role, slot in slots.items():
            if "r" not in slot.dims:
                continue
            one = Sized(layer, entry, role, slot, large[role].shape)
            if any(have > wanted for have, wanted in zip(one.tensor.shape, one.room, strict=True)):
                raise UnsupportedError(
                    f"{entry.site.name!r}: adapter {adapter!r} has a larger rank than target_rank={rank}: its "
                    f"{slot.key!r} is {tuple(one.tensor.shape)}, and there would be room for {one.room}"
                )
            one.check()
            found.append(one)
    return found


def _tensor_scale(layer: AdaptedLayer, entry: Entry) -> None:
    """Let a scale be a tensor beside the layer's weight, of no less precision than the products that it multiplies."""
    scaling = entry.options["scaling"]
    if isinstance(scaling, Tensor):
        return
    weight = getattr(layer.leaf_layer, layer.kind.weight_name)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = torch.device("cpu") if weight.is_meta else weight.device
    entry.options["scaling"] = torch.tensor(float(scaling), dtype=dtype, device=device)


def _tell(config: Any, rank: int, records: list[Any]) -> None:
    """Write the rank that there is room for into configurations."""
    for one in config.values() if isinstance(config, Mapping) else [config]:
        for record in records:
            if record.config is one:
                own = record.method.config
                record.saved = {field: copy.deepcopy(getattr(own, field)) for field in RANK_FIELDS}
        one.r = rank
        for pattern in one.rank_pattern or ():
            one.rank_pattern[pattern] = rank
