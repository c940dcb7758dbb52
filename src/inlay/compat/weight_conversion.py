"""Adapters of earlier model code under transformers 5, by PEFT's names; transformers' ``load_adapter`` asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from inlay.checkpoint.migrations import banks_in, nested, renamed, stacked
from inlay.checkpoint.tree import MODEL_PREFIX, bare_model
from inlay.compat.mappings import PEFT_TYPE_TO_PREFIX_MAPPING
from inlay.config import PeftType
from inlay.core.banks import Bank, layout_of, stacking, stem
from inlay.core.method import Method
from inlay.core.patterns import matcher
from inlay.core.registry import method_class
from inlay.core.retarget import retargeted
from inlay.errors import UnknownMethodError

__all__ = [
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Return transformers' conversions for the keys of an adapter, in place of those of the base model.

    Args:
        weight_conversions: those of the base model.
        adapter_name: what the adapter's tensors are called in memory.
        peft_config: the adapter's configuration, as it was saved; by default keys of any method are understood.

    Returns:
        Renamings and converters; empty without ``weight_conversions``.
    """
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    method = getattr(peft_config, "peft_type", None)
    known = PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes = {known[method]} if method in known else {known[one] for one in known}
    mapping: list[Any] = [WeightRenaming(r"^base_model\.model\.", "")]
    for prefix in sorted(prefixes):
        mapping.append(WeightRenaming(rf"(\b{prefix}[^\.]*)", rf"\1.{adapter_name}"))
    if "lora_" in prefixes:  # a magnitude is a module in memory and a bare tensor in files
        name = rf"lora_magnitude_vector\.{adapter_name}"
        mapping.append(WeightRenaming(rf"({name})$", r"\1.weight"))
    if method is None or _shares(method):  # tensors at the root, which all layers share
        mapping.append(WeightRenaming(r"^base_model\.", ""))
        mapping.append(WeightRenaming(r"^([^\.]+)$", rf"\1.{adapter_name}"))
    plain = [conversion for conversion in weight_conversions if not hasattr(conversion, "operations")]
    mapping += plain
    if "lora_" in prefixes:
        found = {id(c): what for c in weight_conversions if (what := stacking(c)) is not None}
        for conversion in weight_conversions:
            if id(conversion) in found:
                outer = _outside(found[id(conversion)], found.values(), peft_config)
                mapping += _converters(conversion, adapter_name, outer)
    return mapping


def _shares(peft_type: Any) -> bool:
    try:
        return method_class(peft_type).shared_slots is not Method.shared_slots
    except UnknownMethodError:
        return False


def _outside(mine: tuple[str, tuple[str, ...]], others: Iterable[tuple[str, tuple[str, ...]]], config: Any) -> int:
    """Return how many adapted parameters of the same module stand around one: those that come after it there.

    transformers' tables name the parameters of a module in their order. Without a configuration all are adapted.
    """
    owner = mine[0].rpartition(".")[0]
    siblings = [other for other in others if other[0].rpartition(".")[0] == owner]
    later = siblings[siblings.index(mine) + 1 :]
    return sum(_asked(other, config) for other in dict.fromkeys(later))


def _asked(bank: tuple[str, tuple[str, ...]], config: Any) -> bool:
    """Whether a configuration, old or converted, adapts a stacked parameter."""
    targets = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None)
    if (targets is None and parameters is None) or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True
    owner, _, leaf = bank[0].rpartition(".")
    if any(name.rpartition(".")[2] == leaf for name in parameters or ()):
        return True
    if isinstance(targets, str):
        # the table knows the end of a path only; any block may stand before it
        starts = ("", "model.layers.0.", "model.", "layers.0.")
        return any(matcher(targets)(f"{start}{owner}.0.{part}") for start in starts for part in bank[1])
    return any(name.rpartition(".")[2] == part for name in targets or () for part in bank[1])


def _converters(conversion: Any, adapter: str, outside: int) -> list[Any]:
    """Return what stacks the two factors of a bank's former layers."""
    from inlay.compat.conversion_steps import FlattenDims, PeftConcatenate, PermuteDims

    merge, *join = conversion.operations
    target = conversion.target_patterns[0].rpartition(".")[0] + ".base_layer" * outside
    made = []
    for factor in ("lora_A", "lora_B"):
        if factor == "lora_A":
            steps = [merge, *join, FlattenDims((0, 1))]
        elif join:
            steps = [merge, PeftConcatenate(join[0].dim)]
        else:  # (experts, out, r) -> (out, r * experts)
            steps = [merge, PermuteDims((1, 2, 0)), FlattenDims((1, 2))]
        sources = [f"{source.rpartition('.')[0]}.{factor}.*" for source in conversion.source_patterns]
        one = type(conversion)(sources, [f"{target}.{factor}.{adapter}.weight"], steps)
        one.scope_prefix, one.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        one.distributed_operation = conversion.distributed_operation
        one.quantization_operation = conversion.quantization_operation
        made.append(one)
    return made


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """Rewrite a LoRA configuration, in place, that names layers which are parts of parameters now.

    Args:
        peft_config: the configuration; of other methods it stays as it is.
        model: the base model.
        conversions: accepted for callers of PEFT; they are read from the model.

    Raises:
        TargetError: a parameter can be adapted as a whole only, and the configuration wants a part of it.
    """
    if peft_config.peft_type == PeftType.LORA:
        for name, value in retargeted(bare_model(model)[0], peft_config).items():
            setattr(peft_config, name, value)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA with the names and shapes that the model's present code gives them.

    Args:
        model: the base model, or one with the adapter in it.
        peft_config: the adapter's configuration.
        adapter_state_dict: tensors by the keys of a file; not changed.
        adapter_name: accepted for callers of PEFT; the keys of files have no adapter's name.

    Raises:
        CheckpointError: the factors of an expert do not fit together.
    """
    layout = layout_of(bare_model(model)[0])
    if peft_config.peft_type != PeftType.LORA or not layout.present_differs:
        return adapter_state_dict
    adapted = matcher(peft_config.target_parameters or ())
    found = banks_in(layout, adapter_state_dict)

    def place(bank: Bank) -> str:
        names = [
            other.parameter
            for other in layout.banks
            if other.owner == bank.owner and (other in found or adapted(other.path) is not None)
        ]
        return nested(bank, names)

    tensors = stacked(layout, adapter_state_dict, place)
    return {
        key if not stem(key)[1] or key.startswith("base_model.") else f"{MODEL_PREFIX}{key}": value
        for key, value in renamed(layout, tensors, _Fitting(bare_model(model)[0])).items()
    }


class _Fitting:
    """The keys whose path leads to a module of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {name for name, _ in model.named_modules()}

    def __contains__(self, key: object) -> bool:
        path, role = stem(str(key))
        return not role or path in self.paths
