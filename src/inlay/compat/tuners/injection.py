"""Putting an adapter in through the hooks of a tuner, module by module, in PEFT's order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.compat.constants import DUMMY_TARGET_MODULES, MIN_TARGET_MODULES_FOR_OPTIMIZATION
from inlay.compat.integrations import init_empty_weights
from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.constructed import adopt
from inlay.compat.tuners.extras import add_extras
from inlay.compat.tuners.matching import (
    _ExcludedModule,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
)
from inlay.compat.tuners.walking import holders_of, stands_below, tuner_layers
from inlay.compat.tuners.written import WrittenLayer
from inlay.compat.tuners.written_tuner import WrittenTuner
from inlay.core.active import adapter_parameters
from inlay.core.follow import follower_of
from inlay.core.inject import freeze
from inlay.core.layer import AdaptedLayer
from inlay.core.patterns import pattern_key
from inlay.core.registry import method_class
from inlay.core.shared import register_shared, shared_names
from inlay.core.state import Record, State
from inlay.core.targets import base_parameters
from inlay.errors import InlayWarning, NoTargetError, TargetError, UnsupportedError, did_you_mean
from inlay.models.operate import targets_in

if TYPE_CHECKING:
    from inlay.compat.tuners.base import BaseTuner

__all__ = ["Injection", "running"]

_running: list[Injection] = []


def running() -> Injection | None:
    """Return the injection that calls hooks now, innermost first."""
    return _running[-1] if _running else None


class Injection:
    """One adapter on its way into a model.

    Args:
        tuner: whose hooks are called.
        model: the bare model.
        adapter: the adapter's name; its configuration stands in ``tuner.peft_config``.
        low_memory: create tensors on the meta device.
        state_dict: an adapter's tensors, whose keys say which modules are meant.
    """

    def __init__(
        self,
        tuner: BaseTuner,
        model: nn.Module,
        adapter: str,
        low_memory: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        self.tuner = tuner
        self.model = model
        self.adapter = adapter
        self.low_memory = low_memory
        self.state_dict = state_dict
        self.state: State = tuner.state
        self.config: Any = tuner.peft_config[adapter]
        self.key = ""  # the path that is worked on
        self.tying = False  # whether it is one of those that use the adapter of a layer with the same weight
        self.matched: list[str] = []

    def run(self) -> None:
        """Call the hooks.

        Raises:
            NoTargetError: no module is meant.
            what hooks raise. The model is not put back here.
        """
        tuner, state = self.tuner, self.state
        first = not state.records
        record = Record(self.config, method_class(self.config.peft_type)(self.config), torch.initial_seed())
        record.frozen = bool(self.config.inference_mode)
        state.records[self.adapter] = record
        state.training.add(self.adapter)
        if first:
            state.active = (self.adapter,)
        tuner._check_new_adapter_config(self.config)
        tuner._check_tied_modules(self.model, self.config)
        config = tuner._prepare_adapter_config(self.config, tuner.get_model_config(self.model))
        tuner._prepare_model(config, self.model)
        if self.state_dict is not None and getattr(config, "target_parameters", None):
            raise UnsupportedError(
                "target_parameters: keys of a state dict do not tell parameters apart, so an adapter that targets them "
                "cannot be put in by its state dict; leave state_dict out"
            )
        self._shorten(config)
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        record.method = method_class(config.peft_type).variant(config)(copy.deepcopy(config))
        record.method.prefix_patterns = state.policy.prefix_patterns
        self.method = record.method
        _running.append(self)
        try:
            self._create(config)
        finally:
            _running.pop()
        record.translation = tuner._translation()
        self._enter_written()
        tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)
        freeze(self.model, state, base_parameters(self.model), [])
        tuner._mark_only_adapters_as_trainable(self.model)
        add_extras(self.model, config, self.adapter, state, self.method, self.low_memory)
        if not first:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
        if self.adapter not in state.active or record.frozen:
            for parameter in adapter_parameters(state, [self.adapter]):
                parameter.requires_grad_(False)
        register_shared(self.model, state)
        state.touch()

    def _shorten(self, config: Any) -> None:
        """Write out ``all-linear``, and shorten long lists of paths to suffixes."""
        _maybe_include_all_linear_layers(config, self.model)
        targets = getattr(config, "target_modules", None)
        if isinstance(targets, str) or targets is None or hasattr(config, "feedforward_modules"):
            return
        if len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
            suffixes = tuple(f".{name}" for name in targets)
            paths = [key for key, _ in self.model.named_modules()]
            others = [key for key in paths if key not in targets and not key.endswith(suffixes)]
            short = _find_minimal_target_modules(targets, others)
            if len(short) < len(targets):
                config.target_modules = short

    # -- matching -----------------------------------------------------------------------------------------------------

    def _paths(self) -> Iterator[str]:
        """Iterate over the paths of modules that are not inside of what earlier adapters put in."""
        below: str | None = None
        for key, module in list(self.model.named_modules()):
            if not key or (below is not None and key.startswith(below)):
                continue
            if follower_of(module) is not None or isinstance(module, BaseTunerLayer):
                below = f"{key}."
            yield key

    def _create(self, config: Any) -> None:
        tuner = self.tuner
        if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
            return
        asked = None if self.state_dict is None else set(targets_in(self.model, self.state_dict))
        excluded, tied, by_config = [], [], []
        holders = holders_of(self.model)
        for key in self._paths():
            self.key = key
            meant = tuner._check_target_module_exists(config, key) if asked is None else key in asked
            if (asked is None or meant) and tuner._check_tied_module_exists(config, key):
                tied.append(key)
            elif meant:
                self._make(config, key, holders)
            elif isinstance(meant, _ExcludedModule):
                excluded.append(key)
            if asked is not None and tuner._check_target_module_exists(config, key):
                by_config.append(key)
        parameters: list[str] = []
        if getattr(config, "target_parameters", None):
            parameters = tuner._inject_parameters(config, self.model, self.adapter, self.low_memory)
        self.tying = True
        for key in tied:
            self._make(config, key, holders)
        if asked is not None:
            _compare(self.matched, by_config)
        self._judge(config, excluded, parameters)

    def _make(self, config: Any, key: str, holders: dict[int, list[tuple[nn.Module, str]]]) -> None:
        self.matched.append(key)
        self.key = key
        above, _, name = key.rpartition(".")
        parent = self.model.get_submodule(above)
        target = parent._modules[name]
        assert target is not None
        self.tuner._check_target_module_compatiblity(config, self.model, name)
        with self.empty():
            self.tuner._create_and_replace(config, self.adapter, target, name, parent, current_key=key)
        new = parent._modules.get(name)
        for other, attribute in holders.get(id(target), ()):  # a module that stands at several places
            if new is not target and other._modules.get(attribute) is target and not stands_below(other, new):
                setattr(other, attribute, new)

    def empty(self) -> AbstractContextManager[Any]:
        """Make parameters on the meta device, if that was asked for."""
        return init_empty_weights() if self.low_memory else nullcontext()

    def _judge(self, config: Any, excluded: list[str], parameters: list[str]) -> None:
        """Raise if nothing was meant, and warn of what means nothing."""
        targets = getattr(config, "target_modules", None)
        model = type(self.model).__name__
        if not self.matched and not parameters:
            names = [targets] if isinstance(targets, str) else sorted(targets or [])
            known = [key for key, _ in self.model.named_modules() if key]
            short = {key.rpartition(".")[2] for key in known}
            why = " that exclude_modules and modules_to_save leave" if excluded else ""
            near = did_you_mean(names[0], short) if names and not excluded else ""
            raise NoTargetError(f"target_modules={targets!r} matches nothing in {model}{why}.{near}")
        if getattr(config, "exclude_modules", None) and not excluded:
            warnings.warn(
                f"exclude_modules={config.exclude_modules!r} excludes nothing in {model}", InlayWarning, stacklevel=6
            )
        if targets and not self.matched:
            warnings.warn(f"target_modules={targets!r} matches nothing in {model}", RuntimeWarning, stacklevel=6)
        if getattr(config, "target_parameters", None) and not parameters:
            asked = config.target_parameters
            warnings.warn(f"target_parameters={asked!r} matches nothing in {model}", RuntimeWarning, stacklevel=6)
        judged = self.state_dict is None and not self.tuner._matches_itself()
        if self.state.policy.strict_targets and judged and not isinstance(targets, str):
            for name in targets or ():
                if not any(key == name or key.endswith(f".{name}") for key in self.matched):
                    raise TargetError(f"target_modules: {name!r} matches nothing in {model}")
        for field in ("rank_pattern", "alpha_pattern"):
            keys = getattr(config, field, None) or {}
            idle = sorted(key for key in keys if not any(pattern_key([key], path, False) for path in self.matched))
            if idle:
                warnings.warn(f"{field}: {idle} means none of the adapted modules", RuntimeWarning, stacklevel=6)

    # -- the model's state --------------------------------------------------------------------------------------------

    def _enter_written(self) -> None:
        """Make layers that hooks created a part of the model's state."""
        rename = type(self.tuner)._remove_adapter_name_from_key
        for path, module in tuner_layers(self.model):
            if isinstance(module, AdaptedLayer):
                adopt(module, self.state, path)
            elif follower_of(module) is None and hasattr(module, "follow_state"):
                WrittenLayer(module, path, self.state, rename)
        tuner = self.tuner
        held = {**tuner._modules, **tuner._parameters, **tuner._buffers}.keys() - {"model", *shared_names(tuner)}
        if held and "_part" not in tuner.__dict__:
            tuner.__dict__["_part"] = WrittenTuner(tuner, self.state, rename)


def _compare(by_keys: Iterable[str], by_config: Iterable[str]) -> None:
    """Warn where a state dict and a configuration mean different modules."""
    keys, config = set(by_keys), set(by_config)
    parts = [
        f"only {what} names {', '.join(map(repr, sorted(names)))}"
        for what, names in (("the configuration", config - keys), ("the state dict", keys - config))
        if names
    ]
    if parts:
        warnings.warn(
            f"the state dict says which modules are adapted, and the configuration says otherwise: {'; '.join(parts)}",
            RuntimeWarning,
            stacklevel=6,
        )
