"""The wrapper around an adapted model: forwarding, and everything that can be done with adapters in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import nn

from inlay.config.types import method_name
from inlay.core.call import call_of, opened
from inlay.core.follow import base_modules
from inlay.core.policy import Policy
from inlay.core.state import State
from inlay.errors import StateError, UnsupportedError
from inlay.models import operate
from inlay.models.again import replaced, unwrapped
from inlay.models.backprop import is_checkpointing, let_gradients_in, switch_checkpointing_on
from inlay.models.calls import batch_size, routed, rows_per_prompt
from inlay.models.tuner import AdapterModel

__all__ = ["Wrapper"]

T = TypeVar("T", bound="Wrapper")


class Wrapper(nn.Module):
    """A model with adapters; what users see is its subclass :class:`inlay.PeftModel`."""

    base_model: AdapterModel
    keeps_class: ClassVar[bool] = False  # whether loading returns this class whatever the task is
    tuner: ClassVar[type[AdapterModel] | None] = None  # of ``base_model``; by default the first adapter's method's
    # keywords of ``forward`` and ``generate`` that are for the wrapper and not for the model
    special_peft_forward_args: ClassVar[frozenset[str]] = frozenset({"adapter_names"})

    @classmethod
    def around(cls: type[T], model: nn.Module, policy: Policy, tuner: type[AdapterModel] = AdapterModel) -> T:
        """Return a wrapper around ``model`` as it is, without adding an adapter."""
        self = cls.__new__(cls)
        self._hold(model, policy, tuner)
        return self

    def _hold(self, model: nn.Module, policy: Policy, tuner: type[AdapterModel]) -> list[nn.Module]:
        model = unwrapped(model, isinstance(model, (Wrapper, AdapterModel)), policy)
        modules = base_modules(model)
        nn.Module.__init__(self)
        self.base_model = tuner.around(model, policy, modules)
        self.training = model.training
        return modules

    def _begin(
        self, model: nn.Module, policy: Policy, tuner: type[AdapterModel], config: Any, name: str, **options: Any
    ) -> None:
        """Take in a model and add the adapter that the wrapper is made for."""
        modules = self._hold(model, policy, tuner)
        model = self.get_base_model()
        checkpointing = is_checkpointing(model, modules)  # before there are more of them
        with replaced(model, name, self.state.policy):
            self.base_model.add(config, name, **options)
        if checkpointing:
            self.prepare_model_for_gradient_checkpointing(model)

    # -- forwarding -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """Return the bare model, which has the adapters in it."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; ``adapter_names`` chooses an adapter for each sample (``__base__`` for none)."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self.base_model(*args, **kwargs)
        with self._routed(names, batch_size(args, kwargs)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the bare model does; ``adapter_names`` chooses an adapter for each prompt."""
        base: Any = self.get_base_model()
        own = self.__dict__.get("generation_config")
        if own is not None:  # assigned to the wrapper, meant for the model
            base.generation_config = own
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self.base_model._by_task(base.generate, args, kwargs)
        with self._routed(names, batch_size(args, kwargs), rows_per_prompt(base, args, kwargs)):
            return self.base_model._by_task(base.generate, args, kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model's forward takes what trainers add for its loss; transformers' Trainer asks this."""
        model: Any = self.get_base_model()
        own = getattr(model, "accepts_loss_kwargs", None)
        if own is not None:
            return bool(own)
        parameters = inspect.signature(model.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    @contextmanager
    def _routed(self, names: Iterable[str], rows: int | None, expand: int = 1) -> Iterator[None]:
        with routed(self.state, names, rows=rows, expand=expand):
            yield

    @property
    def state(self) -> State:
        """The state that all adapted layers of the model share."""
        return self.base_model.state

    # -- adapters ---------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations by adapter name; assigning to a name changes what is saved for it."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they apply. Can be assigned."""
        return self.base_model.active_adapters

    @active_adapters.setter
    def active_adapters(self, names: str | Iterable[str]) -> None:
        self.base_model.active_adapters = names

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if it is not exactly one. Can be assigned."""
        return self.base_model.active_adapter

    @active_adapter.setter
    def active_adapter(self, names: str | Iterable[str]) -> None:
        self.base_model.active_adapter = names

    @property
    def active_peft_config(self) -> Any:
        """The configuration of the active adapter, the first if there are several.

        Raises:
            StateError: no adapter is active.
        """
        if not self.state.active:
            raise StateError("no adapter is active")
        return self.state.record(self.state.active[0]).config

    @property
    def peft_type(self) -> Any:
        """The method of the first adapter."""
        return next((record.config.peft_type for record in self.state.records.values()), None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward would now use any adapter."""
        call = call_of(self.state)
        return self.state.enabled and bool(self.state.active) and not (call is not None and call.disabled)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; it is neither active nor trainable before ``set_adapter``, unless it is the only one.

        Raises:
            AdapterNameError: the name is unsafe or taken.
            UnsupportedError: the method does not fit a layer, or the adapters there.
            TargetError: a pattern matches nothing.
            In each case the model is as before.
        """
        self.check_method(peft_config)
        self.base_model.add(peft_config, adapter_name, autocast=autocast_adapter_dtype, low_memory=low_cpu_mem_usage)

    def check_method(self, config: Any) -> None:
        """Refuse a second method where the policy wants one only."""
        first = next(iter(self.state.records.values()), None)  # the others are of its method, for they were asked too
        if first is not None and first.config.peft_type != config.peft_type and not self.state.policy.any_methods:
            found, new = method_name(first.config.peft_type), method_name(config.peft_type)
            way = "get_peft_model(..., mixed=True) makes a model that can"
            raise UnsupportedError(f"this model has {found} adapters, so it cannot take one of {new}; {way}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several, in this order, and no other.

        Args:
            adapter_name: name or names.
            inference_mode: leave the activated ones frozen. Otherwise they train, unless they were loaded for
                inference, and all others do not.

        Raises:
            UnknownAdapterError: there is no such adapter.
            StateError: a name is given twice.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off, whether they are active or not.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first of the others takes its place, with a warning.

        Raises:
            UnknownAdapterError: there is no such adapter.
            MergeError: it is merged.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all adapters off inside the ``with`` block, for the forwards of this thread.

        Also hides what is merged, and holds for the backward pass of these forwards.
        """
        with opened(self.state, disabled=True):
            yield

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full, or None."""
        named = (record.config for record in self.state.records.values())
        return {name for config in named for name in getattr(config, "modules_to_save", None) or ()} or None

    # -- weights ------------------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, keep: str = "copy"
    ) -> None:
        """Write adapters into the base weights, by default the active ones; the layers stay adapted.

        Args:
            adapter_names: which, in this order.
            safe_merge: accepted for callers of PEFT; every merge is checked for finiteness before anything is written.
            keep: what unmerging needs: ``"copy"``, ``"packed"`` or ``"none"``; see :func:`inlay.core.merge.merge`,
                also for what is raised. Nothing was written then.
        """
        if keep != "copy":
            operate.merge_into(self.state, adapter_names, keep=keep)
        else:
            self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bitwise."""
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write adapters into the weights, take all adapters out, and return the bare model.

        Args:
            progressbar: show the progress, layer by layer.
            safe_merge, adapter_names: see :meth:`merge_adapter`.

        Raises:
            MergeError: the merge would lose something; the model is then as before.
        """
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Take all adapters out and return the bare model: its original modules, weights and ``requires_grad``."""
        return self.base_model.unload()

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module, only_if_on: bool = False) -> nn.Module:
        """Let gradients flow into the first checkpointed block although the embeddings below it are frozen.

        Args:
            model: the bare model.
            only_if_on: do nothing unless the model has gradient checkpointing switched on.
        """
        if not only_if_on or is_checkpointing(model):
            let_gradients_in(model)
        return model

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Switch gradient checkpointing on in the bare model, reentrant or not (its name since transformers 5)."""
        switch_checkpointing_on(self.get_base_model(), args, kwargs)
        self.prepare_model_for_gradient_checkpointing(self.get_base_model())

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Switch gradient checkpointing on in the bare model, reentrant or not."""
        self.activation_checkpointing_enable(*args, **kwargs)
