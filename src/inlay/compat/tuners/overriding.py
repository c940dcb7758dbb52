"""What tells whether a user's tuner has hooks of its own, and configurations that wait for their injection."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from inlay.core.state import State
from inlay.models.root import Configs

__all__ = ["INJECTION_HOOKS", "KEY_HOOKS", "PendingConfigs", "overrides"]

# Overriding any of these makes injection call all of them.
INJECTION_HOOKS = (
    "__init__",
    "_check_new_adapter_config",
    "_check_target_module_compatiblity",
    "_check_target_module_exists",
    "_check_tied_module_exists",
    "_check_tied_modules",
    "_create_and_replace",
    "_create_and_replace_parameter",
    "_create_new_module",
    "_inject_parameters",
    "_mark_only_adapters_as_trainable",
    "_post_injection_hook",
    "_pre_injection_hook",
    "_prepare_adapter_config",
    "_prepare_model",
    "_replace_module",
    "get_model_config",
    "inject_adapter",
)
# Overriding any of these makes saving and loading call them.
KEY_HOOKS = ("_get_adapter_state_dict", "_get_learnable_bias_state_dict", "_remap_adapter_state_dict_for_load")


@lru_cache(maxsize=512)
def overrides(cls: type[Any], names: tuple[str, ...]) -> bool:
    """Whether a user's class has a member of its own in the place of one of Inlay's."""
    for name in names:
        found = next((one for one in cls.__mro__ if name in one.__dict__), None)
        if found is not None and not found.__module__.startswith("inlay."):
            return True
    return False


class PendingConfigs(Configs):
    """Configurations by adapter name, those too whose adapter is not in the model yet."""

    def __init__(self, state: State, pending: dict[str, Any]) -> None:
        super().__init__(state.records)
        self._waiting = pending
        dict.update(self, pending)

    def __setitem__(self, name: str, config: Any) -> None:
        records = self.__dict__.get("_records")  # absent while a copy is being rebuilt
        if records is None or name in records:
            super().__setitem__(name, config)
        else:
            self._waiting[name] = config
            dict.__setitem__(self, name, config)

    def refresh(self, name: str | None = None) -> None:
        super().refresh(name)
        dict.update(self, self._waiting)
