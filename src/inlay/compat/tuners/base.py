"""``BaseTuner``: what stands at ``base_model``, with the hooks that PEFT's users override.

Where a class overrides none of the hooks of injection, the engine puts adapters in, all at once. As soon as one is
overridden, adapters go in module by module through the hooks, in PEFT's order; still all or nothing.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.compat.constants import EMBEDDING_LAYER_NAMES
from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.tuners.hooks import InjectionHooks
from inlay.compat.tuners.injection import Injection
from inlay.compat.tuners.overriding import INJECTION_HOOKS, KEY_HOOKS, PendingConfigs, overrides
from inlay.compat.tuners.rollback import undone_if_it_fails
from inlay.compat.tuners.saving import Renaming, SavingHooks
from inlay.core.call import opened
from inlay.core.policy import default_policy
from inlay.core.state import State, check_adapter_name
from inlay.errors import InlayWarning, UnsupportedError
from inlay.models import operate
from inlay.models.root import Configs, mark
from inlay.models.tuner import AdapterModel

__all__ = ["BaseTuner", "TunerClass"]


class TunerClass(ABCMeta):
    """Class of the tuners: one that says ``_claims(tuner)`` has further tuners as instances."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        claims = cls.__dict__.get("_claims")
        return claims is not None and isinstance(instance, AdapterModel) and bool(claims.__get__(None, cls)(instance))


class BaseTuner(InjectionHooks, SavingHooks, AdapterModel, metaclass=TunerClass):
    """A model with adapters in it, and how they come in; a method that users bring is a subclass.

    Args:
        model: the bare model, which is changed in place.
        peft_config: the first adapter's configuration, or ``{adapter_name: configuration}``.
        adapter_name: its name.
        low_cpu_mem_usage: create the adapter's tensors on the meta device.
        state_dict: an adapter's tensors, whose keys say which modules are adapted.

    Class attributes:
        prefix: what the names of the method's tensors begin with.
        tuner_layer_cls: the class of the method's layers.
        target_module_mapping: model family -> its default ``target_modules``.
        uses_shared_state: whether the tuner itself holds tensors, so that a bare model cannot do without it.
    """

    uses_shared_state: ClassVar[bool] = False

    _saying: ClassVar[tuple[str, ...]] = KEY_HOOKS

    _claims = staticmethod(lambda tuner: True)

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if "_state" not in self.__dict__:
            self._hold(model, default_policy())
        configs = dict(peft_config) if isinstance(peft_config, dict) else {adapter_name: peft_config}
        with undone_if_it_fails(self):
            self._waiting.update({name: one for name, one in configs.items() if name not in self.state.records})
            self.__dict__["_constructed"] = True
            config = configs[adapter_name]
            self._pre_injection_hook(self.model, config, adapter_name)
            self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            self._post_injection_hook(self.model, config, adapter_name)

    # -- how adapters come in -----------------------------------------------------------------------------------------

    @classmethod
    def injects(cls, config: Any) -> bool:
        """Whether the hooks are called, because one is overridden or the configuration brings layers of its own."""
        return overrides(cls, (*INJECTION_HOOKS, *cls._saying)) or bool(getattr(config, "_custom_modules", None))

    def _put_in(self, config: Any, name: str, **options: Any) -> State:
        if not self.injects(config):
            return super()._put_in(config, name, **options)
        check_adapter_name(name, self.state.records)
        if self.uses_shared_state and self.__dict__.get("_guest"):
            raise UnsupportedError(
                f"{type(self).__name__} itself holds tensors of its adapters (uses_shared_state), so it must stand "
                "around the model: use get_peft_model, without mixed=True"
            )
        low_memory = bool(options.get("low_memory"))
        with undone_if_it_fails(self):
            self._waiting[name] = config
            if "_constructed" not in self.__dict__ and not self.state.records:
                more: dict[str, Any] = {"low_cpu_mem_usage": True} if low_memory else {}
                if options.get("state_dict") is not None:
                    more["state_dict"] = options["state_dict"]
                type(self).__init__(self, self.model, {name: config}, name, **more)
            else:
                given = {} if options.get("state_dict") is None else {"state_dict": options["state_dict"]}
                self.inject_adapter(self.model, name, low_cpu_mem_usage=low_memory, **given)
            autocast = bool(options.get("autocast", True))
            self._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast)
            then = options.get("then")
            if then is not None:
                then(self.state)
        return self.state

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put in the adapter of a name that ``peft_config`` has.

        Args:
            model: the bare model.
            adapter_name: the name.
            autocast_adapter_dtype: an adapter of a half-precision model is created in float32 (without hooks).
            low_cpu_mem_usage: create its tensors on the meta device.
            state_dict: an adapter's tensors, whose keys say which modules are adapted.
        """
        config = self.peft_config[adapter_name]
        if not self.injects(config):
            self._waiting.pop(adapter_name, None)
            options = {"autocast": autocast_adapter_dtype, "low_memory": low_cpu_mem_usage, "state_dict": state_dict}
            self.__dict__["_state"] = AdapterModel._put_in(self, config, adapter_name, **options)
            return
        with undone_if_it_fails(self):
            model.__dict__["_state"] = self.state
            Injection(self, model, adapter_name, low_cpu_mem_usage, state_dict).run()
            self._waiting.pop(adapter_name, None)
            mark(model, self.state)

    @classmethod
    def within(cls, model: nn.Module, state: State) -> AdapterModel:
        made = super().within(model, state)
        made.__dict__["_guest"] = True
        return made

    @classmethod
    def _matches_itself(cls) -> bool:
        """Whether a class has a rule of its own for which modules are meant."""
        return overrides(cls, ("_check_target_module_exists",))

    def _translation(self) -> Renaming | None:
        """Return what lets this class's hooks say what a checkpoint holds, None where they are Inlay's."""
        cls = type(self)
        return Renaming(cls) if overrides(cls, cls._saying) else None

    @property
    def _waiting(self) -> dict[str, Any]:
        waiting: dict[str, Any] = self.__dict__.setdefault("_waiting_configs", {})
        return waiting

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations by adapter name.

        Assigning a new name prepares ``inject_adapter``, on a tuner that was constructed and under PEFT's policy.
        """
        if "_constructed" not in self.__dict__ and self.state.policy.strict_targets and not self._waiting:
            return super().peft_config
        held = self.model.__dict__.get("peft_config") or self.__dict__.get("_configs")
        if not isinstance(held, PendingConfigs) or held._records is not self.state.records:
            held = PendingConfigs(self.state, self._waiting)
            self.__dict__["_configs"] = held
            if isinstance(self.model.__dict__.get("peft_config"), Configs):
                self.model.__dict__["peft_config"] = held
        held.refresh()
        return held

    # -- what can be done with adapters -------------------------------------------------------------------------------

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        operate.set_enabled(self.state, enabled)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        self._enable_adapter_layers(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, in every thread and until they are enabled again."""
        self._enable_adapter_layers(enabled=False)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Choose adapters by sample (``adapter_names``) for the forwards inside a ``with`` block."""
        names = kwargs.get("adapter_names")
        return nullcontext() if names is None else opened(self.state, names=names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer of an adapter adds a matrix that LoRA could approximate."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        held: list[Any] = [layer for layer in layers if adapter_name in layer._all_available_adapter_names()]
        return bool(held) and all(layer.supports_lora_conversion(adapter_name) for layer in held)

    def _check_merge_allowed(self) -> None:
        """Refuse a merge, or warn of what it would do to layers that share their weight."""
        tied = self._get_tied_target_modules(self.model)
        if tied:
            warnings.warn(
                f"{', '.join(map(repr, tied))} is adapted, and another layer shares its weight (tie_word_embeddings), "
                "which a merge changes too; load the model with tie_word_embeddings=False to merge into one of them",
                InlayWarning,
                stacklevel=3,
            )

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Return the paths of adapted embeddings and heads, where the model ties them."""
        if not self.get_model_config(model).get("tie_word_embeddings"):
            return []
        return [name for name in self.targeted_module_names if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge_allowed()
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Take the adapters out, merged into the weights or not, and return the bare model."""
        if merge:
            self._check_merge_allowed()
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return super().unload()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def unload(self) -> nn.Module:
        return self._unload_and_optionally_merge(merge=False)
