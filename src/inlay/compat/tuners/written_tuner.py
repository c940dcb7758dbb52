"""A tuner that a user wrote and that itself holds tensors, as a part of a model's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from inlay.compat.tuners.written import DICTS, Written
from inlay.core.shared import shared_names

__all__ = ["WrittenTuner"]


class WrittenTuner(Written):
    """Follows a state for tensors that a user's tuner itself holds by adapter name, such as a bank for all layers."""

    base_attribute = "model"

    def _passed(self) -> set[str]:
        return {self.base_attribute, *shared_names(self.standing)}

    @property
    def site_path(self) -> str:
        return ""

    def move_below(self, before: str) -> None:
        """It stands above the model."""

    def _dicts(self) -> list[Any]:
        passed = self._passed()
        children = self.standing._modules.items()
        return [child for name, child in children if name not in passed and isinstance(child, DICTS)]

    def adapters_here(self) -> list[str]:
        return list(dict.fromkeys(name for held in self._dicts() for name in held))

    def parameters_of(self, adapter: str) -> Iterator[tuple[nn.Parameter, bool]]:
        for _, owner, at in self.saved_tensors(adapter):
            tensor = owner._parameters.get(at)
            if tensor is not None:
                yield tensor, True

    def drop_adapter(self, adapter: str) -> None:
        for held in self._dicts():
            if adapter in held:
                del held[adapter]

    def override(self, active: tuple[str, ...] | None = None, enabled: bool | None = None) -> None:
        """Its layers are switched, not its tensors."""

    def taken_out(self, restore: bool) -> nn.Module:
        model: nn.Module = self.standing.model
        return model
