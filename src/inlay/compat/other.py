"""Small functions of PEFT's module ``utils.other`` that walk, copy or describe a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import set_active, set_trainable
from inlay.core.patterns import pattern_key
from inlay.core.state import find_state
from inlay.errors import CheckpointError, StateError, did_you_mean

__all__ = [
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_no_split_modules",
    "_get_submodules",
    "_get_submodules_with_grandparent",
    "_is_valid_match",
    "_set_adapter",
    "_set_layer_requires_grad",
    "check_file_exists_on_hf_hub",
    "fsdp_auto_wrap_policy",
    "get_gptqmodel_quant_linear",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "is_gptqmodel_awq_layer",
    "is_gptqmodel_quant_linear",
    "match_target_against_key",
    "mlu_available",
    "str_to_bool",
    "transpose",
]

mlu_available = bool(getattr(getattr(torch, "mlu", None), "is_available", bool)())

_TRUE = frozenset({"y", "yes", "t", "true", "on", "1"})
_FALSE = frozenset({"n", "no", "f", "false", "off", "0"})


def infer_device() -> str:
    """Return the kind of accelerator that is there, ``cpu`` where there is none."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if mlu_available:
        return "mlu"
    for name in ("xpu", "npu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return name
    return "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return the weight as (out, in) if it is stored as (in, out); a parameter stays a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def str_to_bool(value: str) -> int:
    """Return 1 for y, yes, t, true, on and 1, and 0 for their opposites.

    Raises:
        ValueError: anything else.
    """
    word = value.lower()
    if word in _TRUE or word in _FALSE:
        return int(word in _TRUE)
    raise ValueError(f"expected a yes or a no (such as 'true' or '0'), found {value!r}")


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return what is equal for tensors that share their memory: device, address or number, and bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Return whether a repository on the Hub has a file, None where the Hub cannot be asked."""
    try:
        from huggingface_hub import file_exists

        return bool(file_exists(repo_id, filename, **kwargs))
    except Exception:  # offline, no such repository, no permission: in each case the answer is unknown
        return None


# -- names ----------------------------------------------------------------------------------------------------------


def _is_valid_match(key: str, target_key: str) -> bool:
    """Return whether a dotted name is ``target_key`` or ends with it as whole parts."""
    return key == target_key or key.endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Match a regular expression against a whole name."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Return the first key of a rank or alpha pattern that means a name, or the name itself."""
    found = pattern_key(pattern_keys, key_to_match, prefixes=False)
    return key_to_match if found is None else found


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of a module, the module, and the last part of its name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module | None, nn.Module, str]:
    """Return the parent of a module, the parent's parent, the module, and the last part of its name."""
    parent, module, name = _get_submodules(model, key)
    above = key.rpartition(".")[0]
    grandparent = model.get_submodule(above.rpartition(".")[0]) if above else None
    return parent, grandparent, module, name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Return the input embedding's name, or ``default`` where the model does not say."""
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return default
    embedding = get()
    return next((name for name, module in model.named_modules() if module is embedding), default)


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """Return the names of the modules whose weight is the input embedding's."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    get = getattr(inner, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    weight = getattr(embedding, "weight", None)
    if weight is None:
        return []
    return [
        name
        for name, module in inner.named_modules(remove_duplicate=False)
        if module is not embedding and "weight" in module._parameters and module._parameters["weight"] is weight
    ]


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Return the class names of blocks that must stay on one device, as models of transformers list them."""
    found: set[str] = set()
    for module in model.modules():
        found.update(getattr(module, "_no_split_modules", None) or ())
    return found


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Return the number of samples.

    Raises:
        ValueError: neither is given.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("expected input_ids or inputs_embeds, found neither")
    return int(given.shape[0])


# -- adapters of a model --------------------------------------------------------------------------------------------


def _set_layer_requires_grad(layer: Any, requires_grad: bool) -> None:
    """Switch gradients of a module's or parameter's tensors; those that cannot have any are left alone."""
    tensors: Iterable[Tensor] = [layer] if isinstance(layer, Tensor) else layer.parameters()
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.requires_grad_(requires_grad)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Switch the gradients of an adapter's parameters off."""
    state = find_state(model)
    if state is not None and adapter_name in state.records:
        set_trainable(state, [adapter_name], False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activate adapters in a model, full copies of modules included."""
    state = find_state(model)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters")
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    set_active(state, names, trainable=not inference_mode)


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Return a policy for FSDP that puts what trains into units of its own, and each block as well.

    Blocks are named by the environment variable ``FSDP_TRANSFORMER_CLS_TO_WRAP`` (names between commas), by default
    by the model itself.

    Raises:
        CheckpointError: a block of that name is not in the model.
    """
    import os

    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(_get_no_split_modules(model))))
    known = {type(module).__name__: type(module) for module in model.modules()}
    blocks = set()
    for name in filter(None, named.split(",")):
        if name not in known:
            raise CheckpointError(
                f"FSDP_TRANSFORMER_CLS_TO_WRAP: there is no block of class {name!r} in the model."
                f"{did_you_mean(name, known)}"
            )
        blocks.add(known[name])

    def trains(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and isinstance(weight, Tensor) and weight.requires_grad

    policies = [
        partial(lambda_auto_wrap_policy, lambda_fn=trains),
        partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
    ]
    return partial(_or_policy, policies=policies)


# -- quantised layers -----------------------------------------------------------------------------------------------


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """Return how a model of transformers was quantised, if it was by ``method``."""
    config = getattr(model, "config", None)
    found = getattr(config, "quantization_config", None)
    return found if found is not None and getattr(model, "quantization_method", None) == method else None


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether a module is a quantised linear layer of GPTQModel."""
    return module is not None and any(
        cls.__module__.partition(".")[0] == "gptqmodel" and cls.__name__.endswith("QuantLinear")
        for cls in type(module).__mro__
    )


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer of GPTQModel that is quantised by AWQ."""
    return is_gptqmodel_quant_linear(module) and "awq" in type(module).__name__.lower()


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type[nn.Module] | None:
    """Return the class that GPTQModel uses for a configuration, None without one or without GPTQModel."""
    if gptq_quantization_config is None:
        return None
    try:
        from gptqmodel.utils.importer import hf_select_quant_linear
    except ImportError:
        return None
    config = gptq_quantization_config
    found: type[nn.Module] = hf_select_quant_linear(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        device_map=device_map,
        checkpoint_format=getattr(config, "checkpoint_format", "gptq"),
        meta=getattr(config, "meta", None),
        backend=getattr(config, "backend", "auto"),
    )
    return found
