"""The hooks that saving and loading an adapter call, as they are where no class overrides them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.tuners.functions import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _remove_adapter_name_from_state_dict_key,
)
from inlay.errors import UnsupportedError
from inlay.models.root import state_of

__all__ = ["Renaming", "SavingHooks"]


class Renaming:
    """Lets the hooks of a tuner's class say what a checkpoint holds (``checkpoint.translation``).

    Args:
        tuner: the class.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def collect(self, model: nn.Module, adapter: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ask ``_get_adapter_state_dict`` and ``_remove_adapter_name_from_key``."""
        records = state_of(model).records
        others = [name for name in records if name != adapter]
        own = {key: value for key, value in values.items() if set(key.split(".")).isdisjoint(others)}
        picked = self.tuner._get_adapter_state_dict(
            model=model,
            config=records[adapter].config,
            adapter_name=adapter,
            state_dict=own,
            unwanted_adapter_names=others,
        )
        return {self.tuner._remove_adapter_name_from_key(key, adapter): value for key, value in picked.items()}

    def rename(self, model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ask ``_remap_adapter_state_dict_for_load``."""
        renamed: dict[str, Tensor] = self.tuner._remap_adapter_state_dict_for_load(
            model=model, config=state_of(model).records[adapter].config, adapter_name=adapter, state_dict=tensors
        )
        return renamed


class SavingHooks:
    """Mixed into ``BaseTuner``."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return what a checkpoint calls a tensor of the model."""
        return _remove_adapter_name_from_state_dict_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Pick what an adapter saves out of a model's ``state_dict``, by the names that it has there."""
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        picked: dict[str, Tensor] = _filter_state_dict_by_key_prefixes(state_dict, prefixes)
        return picked | cls._get_learnable_bias_state_dict(model, state_dict, config)

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: Any
    ) -> dict[str, Tensor]:
        """Pick the base biases that train with an adapter."""
        mode = getattr(config, "bias", None) or "none"
        if mode == "all":
            return {key: value for key, value in state_dict.items() if key.rpartition(".")[2] == "bias"}
        if mode == "none":
            return {}
        layers = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        names = {f"{name}.base_layer.bias".lstrip(".") for name in layers}
        return {key: value for key, value in state_dict.items() if key in names}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give a checkpoint's tensors the names that they have in the model; unknown ones keep theirs."""
        names: dict[str, str] = {}
        for name in _filter_state_dict_by_key_prefixes(
            model.state_dict(), _get_tuner_state_dict_key_prefixes(model, adapter_name)
        ):
            key = cls._remove_adapter_name_from_key(name, adapter_name)
            names[key] = name
            if not name.startswith("base_model.model."):
                names[f"base_model.model.{key}"] = name
        return {names.get(key, key): value for key, value in state_dict.items()}

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Express an adapter that changed the base weights over the original ones.

        Raises:
            UnsupportedError: the method changes no base weights.
        """
        raise UnsupportedError(
            f"path_initial_model_for_weight_conversion: adapters of {cls.__name__} change no base weights"
        )
