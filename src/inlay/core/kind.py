"""The contract of a layer kind: a layer as an affine map, and back.

A kind knows one family of layer classes. It knows no method and no storage: tensors are read and written through
``core.storage``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.affine import Affine, Site
from inlay.core.bare import Light, bare
from inlay.core.route import split_rows
from inlay.core.slot import Slot
from inlay.errors import NoBiasError

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer
    from inlay.core.state import State

__all__ = ["Holder", "Kind", "kind_of", "register_kind"]


class Holder(Light):
    """A module that only holds the tensors of one slot group; it has no forward of its own."""


class Kind:
    """One family of layer classes.

    Class attributes:
        name: the key of the fast-path table.
        activation: False where only ``rewrite`` makes sense (``nn.MultiheadAttention``, bare parameters).
        peft_skips_dropout: PEFT takes a dropout there and never applies it.
        all_linear: whether ``target_modules="all-linear"`` means layers of this kind.
        multiplies: all that the layers do with their weight (out, in) is to multiply features by it, so that low-rank
            updates run fused (``core.fused``), and by sample (``core.mixed``). A subclass with a ``run`` or a
            ``product`` of its own has to say so itself.
        takes_arguments: what adapters add depends on what is passed beside the input; see :meth:`called`.
        weight_name, bias_name: the parameters' names.
    """

    name: ClassVar[str]
    activation: ClassVar[bool] = True
    peft_skips_dropout: ClassVar[bool] = False
    all_linear: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    takes_arguments: ClassVar[bool] = False
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not {"run", "product"}.isdisjoint(vars(cls)) and "multiplies" not in vars(cls):
            cls.multiplies = False

    def claims(self, module: Any) -> bool:
        """Whether the module is of this kind."""
        raise NotImplementedError

    def site(self, name: str, module: Any) -> Site:
        """Return the module's frozen shape.

        Raises:
            UnsupportedError: the module has a form that cannot be adapted.
        """
        raise NotImplementedError

    def run(
        self,
        module: Any,
        site: Site,
        affine: Affine,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Run the module on ``x`` with another map, in ``dtype`` (by default the input's, or the weight's)."""
        return self.product(self.called(module, x, args, kwargs), site, affine, x, dtype)

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return what :meth:`run` does, given what stands for the module in this call; a kind has one of the two."""
        raise NotImplementedError

    # -- with defaults -------------------------------------------------------------------------------------------

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        """Turn a stored weight into (*experts, out, fan_in), as a view where there is one."""
        return stored

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return weight

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        """Name the axes of the stored weight: ``experts``, ``out``, ``in``, ``kernel``."""
        return (*["experts"] * len(site.experts), "out", "in", *["kernel"] * len(site.kernel))

    def read(self, module: Any, site: Site) -> Affine:
        """Return the module's map; plain weights are not copied."""
        bias = storage.read(module, self.bias_name) if site.bias else None
        return self.view(module, site, storage.read(module, self.weight_name), bias)

    def view(self, module: Any, site: Site, weight: Tensor, bias: Tensor | None) -> Affine:
        """Return the map that the module computes when it holds these tensors, in their stored shapes."""
        return Affine(self.to_matrix(site, weight), bias)

    def stored(self, module: Any, site: Site, affine: Affine) -> dict[str, Tensor]:
        """Return what to write so that the module computes ``affine``: stored tensors by parameter name.

        Raises:
            NoBiasError: the map has a bias, and the module has no place for one.
        """
        tensors = {self.weight_name: self.from_matrix(site, affine.weight)}
        if affine.bias is not None:
            if not site.bias:
                raise NoBiasError(
                    f"{site.name!r} ({type(module).__name__}) has no bias, so an update with a bias cannot be written "
                    "into it; it runs unmerged where the layer has a forward pass of its own"
                )
            tensors[self.bias_name] = affine.bias
        return tensors

    def called(self, module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what stands for the module in products with updates while it is called with these arguments."""
        return module

    def of(self, module: Any) -> Kind:
        """Return the kind for one module, where modules of one class are not all of one form; it claims them all."""
        return self

    def plain_tensors(self, module: Any) -> tuple[Tensor, Tensor | None] | None:
        """Return weight (out, in) and bias if calling the module does nothing but ``x @ weight.T + bias``; else None.

        Hooks are the caller's business.
        """
        return None

    def adapt(self, module: Any, site: Site, state: State) -> AdaptedLayer:
        """Return the adapted layer that is to stand where the module stands."""
        return _layer_class()(module, self, site, state)

    def weight_dtype(self, module: Any) -> torch.dtype | None:
        """Dtype of the weight, None where it is not floating."""
        return storage.floating_dtype(module, self.weight_name)

    def routed(
        self,
        layer: nn.Module,
        names: tuple[str, ...],
        run: Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run ``run(adapter, args, kwargs)`` on each adapter's samples and put the rows back in order."""
        return split_rows(str(self.name), names, run, args, kwargs)

    def leaf(self, site: Site, slot: Slot) -> nn.Module:
        """Return an empty module for a slot that asks for one that can be called (``slot.leaf``)."""
        return bare(Holder)


@cache
def _layer_class() -> type[AdaptedLayer]:
    from inlay.core.layer import AdaptedLayer

    return AdaptedLayer


_kinds: list[Kind] = []
_by_class: dict[type[nn.Module], Kind | None] = {}


def register_kind(kind: Kind) -> None:
    """Add a kind; later ones are asked first. An equal one that is there already gives way."""
    _kinds[:] = [kind, *(one for one in _kinds if type(one) is not type(kind) or vars(one) != vars(kind))]
    _by_class.clear()


def kind_of(module: Any) -> Kind | None:
    """Return the kind that claims the module, or None.

    The answer is cached by class: a kind must judge by class alone, and refuse odd instances in ``site``.
    """
    cls = type(module)
    if cls not in _by_class:
        import inlay.kinds  # noqa: F401  the built-in kinds register themselves

        _by_class[cls] = next((kind for kind in _kinds if kind.claims(module)), None)
    kind = _by_class[cls]
    return kind if kind is None else kind.of(module)
