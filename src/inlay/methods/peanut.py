"""PEANuT: an update that a small network makes of the layer's own weight (Zhong et al. 2024, arXiv:2410.01870)."""

from __future__ import annotations

from inlay.config import BlockTargetFields, PeftConfig, PeftType, setting, settings
from inlay.core.activations import ACTIVATIONS
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.method import P
from inlay.core.reading import ReadsBase
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Slot, zeros

__all__ = ["PEANuT", "PeanutConfig"]


@settings(
    positional="r depth act_fn scaling target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern init_weights"
)
class PeanutConfig(BlockTargetFields, PeftConfig):
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
    numbers = ("r", "scaling", "depth", "act_fn")
    config: PeanutConfig

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
