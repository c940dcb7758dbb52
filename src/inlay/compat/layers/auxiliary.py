"""Wrappers that train a module beside the adapters: full copies (``modules_to_save``) and single token rows.

The engine's ``ModuleCopies`` are ``ModulesToSaveWrapper``s, and its layers with token rows beside another method are
``TrainableTokensWrapper``s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from inlay.compat.layers.tokens import TrainableTokensWrapper, refuse_container, token_entries
from inlay.compat.layers.viewing import LayerView, listed, require_grad
from inlay.core.follow import Follower
from inlay.core.mount import ModuleCopies
from inlay.core.policy import PEFT
from inlay.core.route import split_rows
from inlay.core.state import BASE, State
from inlay.errors import (
    AdapterNameError,
    RoutingError,
)

__all__ = ["AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper"]


class AuxiliaryTrainingWrapper(nn.Module, metaclass=LayerView):
    """Base of wrappers that users write: an original module, and something per adapter that runs in its place.

    A subclass gives ``init_modules``, ``_forward_wrapped``, ``_forward_wrapped_mixed_batch``,
    ``_forward_wrapped_passthrough``, ``adapter_state_dict`` and ``adapter_state_dict_load_map``, and what it changes of
    the rest.
    """

    adapter_layer_names: Any = ()
    other_param_names: Any = ()
    merged_adapters: Any = ()

    @staticmethod
    def _claims(module: Follower) -> bool:
        return isinstance(module, ModuleCopies) or bool(token_entries(module))

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: Any = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)
        self.check_module()

    # -- what a subclass gives ----------------------------------------------------------------------------------------

    @abstractmethod
    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create what holds the adapters' parts, before the first of them comes."""
        raise NotImplementedError(f"{type(self).__name__}.init_modules")

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter."""
        raise NotImplementedError(f"{type(self).__name__}._forward_wrapped")

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        """Run one adapter on the samples that ask for it."""
        raise NotImplementedError(f"{type(self).__name__}._forward_wrapped_mixed_batch")

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original."""
        raise NotImplementedError(f"{type(self).__name__}._forward_wrapped_passthrough")

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Pick an adapter's tensors out of this module's ``state_dict``, under the names of a checkpoint."""
        raise NotImplementedError(f"{type(self).__name__}.adapter_state_dict")

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the names of an adapter's tensors in a checkpoint, with those that they have below this module."""
        raise NotImplementedError(f"{type(self).__name__}.adapter_state_dict_load_map")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return what is to stand here without adapters."""
        raise NotImplementedError(f"{type(self).__name__}.unload_and_optionally_merge_module")

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return which of some adapters is to be activated here, or None."""
        raise NotImplementedError(f"{type(self).__name__}.check_set_adapter")

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Drop an adapter's part."""
        raise NotImplementedError(f"{type(self).__name__}.delete_adapter")

    def _get_available_adapters(self) -> set[str]:
        """Return the names of the adapters that have a part here."""
        raise NotImplementedError(f"{type(self).__name__}._get_available_adapters")

    def _error_message_name(self) -> str:
        return "a training wrapper"

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        """Whether the active adapter's part answers for an attribute."""
        return False

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        """Return an attribute of the active adapter's part."""
        raise AttributeError(name)

    # -- what it has --------------------------------------------------------------------------------------------------

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Take in a further adapter."""
        self._adapters.add(adapter_name)

    def check_module(self) -> None:
        """Refuse an original module that cannot be wrapped."""
        refuse_container(self._error_message_name(), self.original_module)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> Any:
        """What was activated last: a name or a list of names."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return listed(self._active_adapter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules")
            if modules is None or "original_module" not in modules:
                raise
        if self.disable_adapters or not self.active_adapters:
            return getattr(self.original_module, name)
        if self._hasattr_wrapped(name, modules):
            return self._getattr_wrapped(name, modules)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapter run, or the original."""
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; gradients are left to the subclass.

        Raises:
            AdapterNameError: one of a list is not here.
        """
        if not isinstance(adapter_names, str):
            for name in adapter_names:
                if name not in self._adapters:
                    raise AdapterNameError(f"no adapter {name!r} here; there are: {sorted(self._adapters)}")
            adapter_names = list(adapter_names)
        self._active_adapter = adapter_names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off."""
        for path in self.adapter_layer_names:
            held: Any = self
            for part in path.split("."):
                held = getattr(held, part)
            for name in listed(adapter_names):
                if name in held:
                    require_grad(held[name], requires_grad)

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """Refuse adapters by sample that do not fit the batch.

        Raises:
            RoutingError: there is not one for each sample.
        """
        names = kwargs.get("adapter_names")
        if names is not None and args and len(args[0]) != len(names):
            raise RoutingError(f"adapter_names has {len(names)} names for a batch of {len(args[0])} samples")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_forward_args(*args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters or any(name not in self._adapters for name in self.active_adapters):
            return self._forward_wrapped_passthrough(*args, **kwargs)
        if names is None:
            return self._forward_wrapped(*args, **kwargs)
        return self._mixed_batch_forward(*args, adapter_names=names, **kwargs)

    def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        """Run each adapter on the samples that ask for it.

        Raises:
            RoutingError: the original is no layer that treats samples apart.
        """
        layers = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if not isinstance(self.original_module, layers):
            raise _MixedBatchError(
                f"adapters by sample are possible over {', '.join(cls.__name__ for cls in layers)}, found "
                f"{type(self.original_module).__name__}"
            )

        def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name == BASE:
                return self.original_module(*args, **kwargs)
            return self._forward_wrapped_mixed_batch(args[0], name, *args[1:], **kwargs)

        owner = type(self.original_module).__name__
        return split_rows(owner, tuple(adapter_names), run, (input, *args), kwargs)


class _MixedBatchError(RoutingError, TypeError):
    """PEFT raises a TypeError there."""


class ModulesToSaveWrapper(ModuleCopies, metaclass=LayerView):
    """A full copy of a module per adapter, constructed by itself.

    Args:
        module_to_save: the module to copy; it is frozen.
        adapter_name: the first adapter, which is active.
        tied_module: a layer whose weight the copy shares, the other way round (an embedding for an output head).
    """

    adapter_layer_names = ("modules_to_save",)

    _claims = staticmethod(lambda module: isinstance(module, ModuleCopies))

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        refuse_container("modules_to_save", module_to_save)
        super().__init__("", module_to_save, State(policy=PEFT, active=(adapter_name,)))
        self.update(adapter_name, tied_module=tied_module)


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)


AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)
