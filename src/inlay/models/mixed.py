"""Adapters of different methods on one model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from inlay.core.policy import default_policy
from inlay.errors import MergeError
from inlay.models import operate
from inlay.models.peft_model import PeftModel
from inlay.models.tuner import AdapterModel

__all__ = ["MixedModel", "PeftMixedModel"]


class MixedModel(AdapterModel):
    """``base_model`` of a :class:`PeftMixedModel`."""


class PeftMixedModel(PeftModel):
    """A model whose adapters may be of any methods, on the same layers and active at once; saves and loads too.

    Adapters on one layer apply in the order of activation, each to what the ones before it made of the layer.
    """

    keeps_class: ClassVar[bool] = True
    tuner: ClassVar[type[AdapterModel] | None] = MixedModel

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default") -> None:
        self._begin(model, default_policy(), MixedModel, peft_config, adapter_name)

    def check_method(self, config: Any) -> None:
        """Every method is welcome."""

    @property
    def config(self) -> Any:
        """The bare model's configuration; for a model without one, a dict that says so."""
        return getattr(self.get_base_model(), "config", {"model_type": "custom"})

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters; always a list. Can be assigned."""
        return self.active_adapters

    @active_adapter.setter
    def active_adapter(self, names: str | Iterable[str]) -> None:
        self.active_adapters = names

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete one adapter or several; see :meth:`inlay.PeftModel.delete_adapter`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.state.record(name)
            if name in operate.merged_names(self.state):
                raise MergeError(f"adapter {name!r} is merged; unmerge it before deleting it")
        for name in names:
            super().delete_adapter(name)
