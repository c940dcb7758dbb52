"""What stands between the wrapper and the bare model: ``peft_model.base_model``, with the model at ``.model``.

One class for every method. A subclass may be registered for a method (``core.registry.register_tuner``), and may put
adapters in its own way (:meth:`AdapterModel.injects`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.active import set_trainable
from inlay.core.call import opened
from inlay.core.layer import AdaptedLayer
from inlay.core.lifecycle import penalty_of, step_of
from inlay.core.mount import ModuleCopies
from inlay.core.policy import Policy, default_policy
from inlay.core.registry import method_class, registered_tuner
from inlay.core.shared import register_shared
from inlay.core.state import State, find_state
from inlay.errors import UnsupportedError
from inlay.models import operate
from inlay.models.root import Configs, mark
from inlay.models.terms import LossTerms

__all__ = ["AdapterModel", "tuner_class"]


class AdapterModel(LossTerms, nn.Module):
    """A bare model with adapters in it; attributes that it does not have are the model's.

    Args:
        model: the bare model, which is changed in place.
        config: the first adapter's configuration, or ``{adapter_name: configuration}``.
        adapter_name: its name.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, for a load to fill.
        state_dict: an adapter's tensors, whose keys name the layers to adapt instead of the configuration.

    Raises:
        what :func:`inlay.plan` raises; the model is then unchanged.
    """

    prefix: ClassVar[str] = ""
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._hold(model, default_policy())
        if isinstance(config, dict):
            config = config[adapter_name]
        self.add(config, adapter_name, low_memory=low_cpu_mem_usage, state_dict=state_dict)

    @classmethod
    def around(cls, model: nn.Module, policy: Policy, modules: list[nn.Module] | None = None) -> AdapterModel:
        """Return a tuner around ``model`` as it is; ``modules`` are its base modules, where they are known."""
        self = cls.__new__(cls)
        self._hold(model, policy, modules)
        return self

    def _hold(self, model: nn.Module, policy: Policy, modules: list[nn.Module] | None = None) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.training = model.training
        found = find_state(model, modules)
        self.__dict__["_state"] = found or State(policy=policy)
        self.state.hold_shared(self)
        if found is not None:
            register_shared(model, found)

    @classmethod
    def within(cls, model: nn.Module, state: State) -> AdapterModel:
        """Return a tuner for a model that has another holder, or none."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model = model
        self.training = model.training
        self.__dict__["_state"] = state
        return self

    @property
    def state(self) -> State:
        """The state that all adapted layers share."""
        return self.__dict__["_state"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state.hold_shared(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. What methods add to the loss is added where the output has one and gradients are wanted."""
        output = self._by_task(self.model, args, kwargs)
        if self.state.penalised and torch.is_grad_enabled() and isinstance(getattr(output, "loss", None), Tensor):
            term = penalty_of(self.state, within=True)
            if term is not None:
                output.loss = output.loss + term.to(output.loss.device)
        return output

    def _by_task(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model; ``task_ids`` is for methods that choose by task.

        Raises:
            UnsupportedError: there is none, and the model does not know the keyword either.
        """
        tasks = kwargs.get("task_ids")
        if tasks is None:
            return run(*args, **{name: value for name, value in kwargs.items() if name != "task_ids"})
        if not any(record.method.reads_tasks for record in self.state.records.values()):
            if "task_ids" not in inspect.signature(self.model.forward).parameters:
                raise UnsupportedError("task_ids: no adapter of this model chooses by task")
            return run(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "task_ids"}
        with opened(self.state, tasks=torch.as_tensor(tasks)):
            return run(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """Let methods do what belongs to the end of a training step; see :func:`inlay.step`."""
        step_of(self.state, global_step)

    # -- adapters -----------------------------------------------------------------------------------------------

    def add(
        self,
        config: Any,
        name: str,
        *,
        autocast: bool = True,
        low_memory: bool = False,
        initialise: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        held: dict[str, Tensor] | None = None,
        then: Callable[[State], object] | None = None,
    ) -> None:
        """Put an adapter in; see :func:`inlay.models.operate.add`."""
        operate.refuse_prompts(config)
        own = tuner_class(config.peft_type)
        first = next(iter(self.state.records.values()), None)
        mine = self.injects(config) and (first is None or first.config.peft_type == config.peft_type)
        put_in = self._put_in
        if not mine and not issubclass(type(self), own):  # another method's
            put_in = own.within(self.model, self.state)._put_in if own.injects(config) else self._by_engine
        self.__dict__["_state"] = put_in(
            config,
            name,
            autocast=autocast,
            low_memory=low_memory,
            initialise=initialise,
            state_dict=state_dict,
            held=held,
            then=then,
        )

    @classmethod
    def injects(cls, config: Any) -> bool:
        """Whether this class puts an adapter in its own way, instead of leaving that to the engine."""
        return False

    def _put_in(self, config: Any, name: str, **options: Any) -> State:
        """Put an adapter in and return the state that it is in; a subclass may do so in its own way."""
        return self._by_engine(config, name, **options)

    def _by_engine(self, config: Any, name: str, **options: Any) -> State:
        return operate.add(self.model, config, name, state=self.state, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see :meth:`inlay.PeftModel.delete_adapter`."""
        operate.remove(self.model, self.state, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Combine LoRA or (IA)^3 adapters into a new, inactive one; see :func:`inlay.combine.add_weighted`."""
        from inlay.combine import add_weighted

        options = (svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        self.add_computed(
            lambda model, state: add_weighted(model, state, adapters, weights, adapter_name, combination_type, *options)
        )

    def add_computed(self, make: Callable[[nn.Module, State], object]) -> None:
        """Let ``make`` put an adapter into the bare model that it computes from others."""
        make(self.model, self.state)
        mark(self.model, self.state)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; see :meth:`inlay.PeftModel.set_adapter`."""
        operate.activate(self.state, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off, whether they are active or not."""
        set_trainable(self.state, operate.listed(adapter_names), requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        operate.set_enabled(self.state, True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, in every thread and until they are enabled again."""
        operate.set_enabled(self.state, False)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations by adapter name; assigning to a name changes what is saved for it."""
        held = self.model.__dict__.get("peft_config")
        return held if isinstance(held, Configs) else Configs(self.state.records)

    @property
    def active_adapters(self) -> list[str]:
        return self.state.shown()

    @active_adapters.setter
    def active_adapters(self, names: str | Iterable[str]) -> None:
        operate.activate(self.state, names)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @active_adapter.setter
    def active_adapter(self, names: str | Iterable[str]) -> None:
        operate.activate(self.state, names)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted layers in the bare model."""
        followers = (layer for layer in self.state.layers() if not isinstance(layer, ModuleCopies))
        return [one.site_path for one in followers if not isinstance(one, AdaptedLayer) or one.site.parameter is None]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters that are adapted without their module."""
        layers = (layer for layer in self.state.layers() if isinstance(layer, AdaptedLayer))
        return [layer.site.name for layer in layers if layer.site.parameter is not None]

    # -- weights --------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights; see :meth:`inlay.PeftModel.merge_adapter`."""
        operate.merge_into(self.state, adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bitwise."""
        operate.unmerge_all(self.state)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write adapters into the weights and return the bare model; see :meth:`inlay.PeftModel.merge_and_unload`."""
        return operate.take_out(self.model, self.state, merged=True, names=adapter_names, progressbar=progressbar)

    def unload(self) -> nn.Module:
        """Take all adapters out and return the bare model with its original modules and weights."""
        return operate.take_out(self.model, self.state, merged=False)


def tuner_class(peft_type: Any) -> type[AdapterModel]:
    """Return the class of ``base_model`` for a method: one that was registered for it, or :class:`AdapterModel`.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    method_class(peft_type)
    return registered_tuner(peft_type) or AdapterModel
