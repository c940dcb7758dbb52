"""PEANuT: an update that a small network makes of the layer's own weight (Zhong et al. 2024, arXiv:2410.01870)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inlay.config import LayerFields, PeftConfig, PeftType, TargetFields, setting, settings
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.method import P
from inlay.core.reading import ReadsBase
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Slot, zeros

__all__ = ["PEANuT", "PeanutConfig"]

# transformers' names of activations; those that have parameters of their own are not among them
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(["gelu", "gelu_python"], functional.gelu),
    **dict.fromkeys(
        ["gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"],
        partial(functional.gelu, approximate="tanh"),
    ),
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "hardswish": functional.hardswish,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "prelu": partial(functional.leaky_relu, negative_slope=0.25),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    **dict.fromkeys(["silu", "swish"], functional.silu),
    "tanh": torch.tanh,
}


@settings(
    positional="r depth act_fn scaling target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern init_weights"
)
class PeanutConfig(TargetFields, LayerFields, PeftConfig):
    """Configuration of PEANuT."""

    peft_type = PeftType.PEANUT

    r: int = setting(
        default=32, doc="Width of the network.", gt=0, parameters="2 * r * out + 2 * depth * r * r a layer"
    )
    depth: int = setting(
        default=0,
        doc="Hidden layers on the way in, and as many on the way out.",
        ge=0,
        parameters="2 * r * r for each",
    )
    act_fn: str = setting(
        default="relu", doc="Function between its layers, as transformers names it.", choices=tuple(ACTIVATIONS)
    )
    scaling: float = setting(default=1.0, doc="Scale of the update.")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise all layers are random.")


@register_method
class PEANuT(ReadsBase):
    """``s B f(D_n ... f(E_1 f(A W)))`` is added to W, with shortcuts from each layer in to its counterpart out.

    W is the untouched weight. The update has rank r at most, and only its two factors are made.
    """

    config_class = PeanutConfig
    prefix = "peanut_"
    config: PeanutConfig

    def options(self, site: Site) -> dict[str, Any]:
        config = self.config
        return {"r": config.r, "scaling": config.scaling, "depth": config.depth, "act_fn": config.act_fn}

    def slots(self, site: Site) -> dict[str, Slot]:
        r, start = self.config.r, KaimingUniform(fan=self.config.r)
        forms = {"A": ("A.*", "*experts r out", KaimingUniform(fan=site.out))}
        for way in ("encoders", "decoders"):
            forms |= {f"{way}{i}": (f"{way}.*.{i}", "*experts w w", start) for i in range(self.config.depth)}
        forms["B"] = ("B.*", "*experts out r", start)
        slots = {}
        for role, (key, dims, draw) in forms.items():
            init = zeros if role == "B" and self.config.init_weights else draw
            drawn = {"discarded": draw}
            slots[role] = site.slot(f"peanut_{key}.weight", dims, init, options=drawn, r=r, w=r)
        return slots

    def change(self, site: Site, p: P, base: Affine) -> LowRank:
        f = ACTIVATIONS[p.act_fn]
        h = f(p.A @ base.weight.to(p.A.dtype))  # (*experts, r, fan_in)
        shortcuts = []
        for i in range(p.depth):
            shortcuts.append(h)
            h = f(getattr(p, f"encoders{i}") @ h)
        for i in range(p.depth):
            h = f(getattr(p, f"decoders{i}") @ h) + shortcuts.pop()
        return LowRank(p.B, h)
