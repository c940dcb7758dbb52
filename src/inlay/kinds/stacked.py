"""Bare parameters: a matrix, or a bank of matrices for experts, wherever it lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from inlay.core.affine import Site
from inlay.core.state import State
from inlay.errors import UnsupportedError
from inlay.kinds.linear import is_conv1d
from inlay.kinds.whole import Whole

__all__ = ["Stacked"]


class Stacked(Whole):
    """One named parameter of any module: (out, in), or (experts, out, in).

    A module with a true ``is_transposed`` (GPT-OSS) stores its banks as (experts, in, out). Where nothing is known of
    how the module uses the parameter, only weight space is open: the module runs with the rewritten parameter. Banks
    of experts whose routing is known (``kernels.experts_forms``) are adapted in token space.
    """

    name = "stacked"

    def __init__(self, parameter: str) -> None:
        self.weight_name = parameter  # type: ignore[misc]

    def claims(self, module: nn.Module) -> bool:
        return False  # a parameter is named by the config; no class stands for it

    def site(self, name: str, module: nn.Module) -> Site:
        """Return the parameter's shape; ``name`` is the dotted path of the parameter itself."""
        shape = tuple(module._parameters[self.weight_name].shape)  # type: ignore[union-attr]
        if len(shape) not in (2, 3):
            raise UnsupportedError(
                f"{name!r} has {len(shape)} axes {shape}; 2 (out, in) or 3 (experts, out, in) can be adapted"
            )
        if is_conv1d(type(module)):
            raise UnsupportedError(
                f"the parameter {name!r} belongs to a Conv1D, which stores it transposed; name the layer in "
                "target_modules instead"
            )
        transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
        out, channels = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        return Site(
            name,
            self.name,
            out,
            channels,
            experts=shape[:-2],
            transposed=transposed,
            parameter=self.weight_name,
        )

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return stored.transpose(-1, -2) if site.transposed else stored

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if site.transposed else weight

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        matrix = ("in", "out") if site.transposed else ("out", "in")
        return (*["experts"] * len(site.experts), *matrix)

    def routed(
        self,
        layer: nn.Module,
        names: tuple[str, ...],
        run: Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run each adapter on its samples' rows; experts get the tokens of all samples, one sample after the other."""
        from inlay.kernels.experts_forms import form_of

        form = form_of(layer.leaf_layer)  # type: ignore[arg-type]
        x = args[0] if args else next(iter(kwargs.values()))
        if form is not None and form.tokens and x.shape[0] % len(names) == 0:
            names = tuple(name for name in names for _ in range(x.shape[0] // len(names)))
        return super().routed(layer, names, run, args, kwargs)

    def adapt(self, module: nn.Module, site: Site, state: State) -> Any:
        from inlay.core.parameter import ParameterLayer

        return ParameterLayer(module, self, site, state)
