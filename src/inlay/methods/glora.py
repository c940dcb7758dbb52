"""GLoRA: scale and shift weight and bias, and let the weight speak in the bias (Chavan et al. 2023, 2306.07967)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from inlay.config import PeftConfig, PeftType, SavedModulesField, TargetField, bias_setting, setting, settings
from inlay.core.affine import Affine, Dense, Site
from inlay.core.method import P
from inlay.core.reading import ReadsBase
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Normal, Slot

__all__ = ["GLoRA", "GloraConfig"]


@settings(positional="r target_modules bias modules_to_save config_A_B config_C config_D_E init_weights")
class GloraConfig(TargetField, SavedModulesField, PeftConfig):
    """Configuration of GLoRA. Layers without a bias have A and B only."""

    peft_type = PeftType.GLORA

    r: int = setting(
        default=8, doc="Rank of what is given as 'lora'.", gt=0, parameters="2 * r * (in + out) + r * in a layer"
    )
    bias: str = bias_setting("glora")
    config_A_B: Literal["lora", "vector", "constant", "none"] = setting(
        default="lora",
        doc="What scales the weight (A) and is added to it (B): matrices of low rank, a number for each output, one "
        "number, or nothing.",
        parameters="'vector': 2 * out; 'constant': 2; 'none': 0",
    )
    config_C: Literal["lora", "vector", "none"] = setting(
        default="lora",
        doc="The input (C) whose output is added to the bias: as a product of rank r, as it is, or none.",
        parameters="'vector': in; 'none': 0",
    )
    config_D_E: Literal["vector", "constant", "none"] = setting(
        default="constant",
        doc="What scales the bias (D) and is added to it (E): a number for each output, one number, or nothing.",
        parameters="'vector': 2 * out; 'constant': 2; 'none': 0",
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise from random values.")


@register_method
class GLoRA(ReadsBase):
    """``W + W * A + B`` with bias ``b + b * D + E + W C``; products with A and D are elementwise, W and b untouched."""

    config_class = GloraConfig
    prefix = "glora_"
    numbers = ("r",)
    config: GloraConfig

    def refuse(self, site: Site) -> str | None:
        if any(slot.trainable for slot in self.slots(site).values()):
            return None
        return "config_A_B is 'none' and what is left acts on a bias, which this layer does not have"

    def slots(self, site: Site) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        forms = {"A": self.config.config_A_B, "B": self.config.config_A_B}
        bias = {"C": self.config.config_C, "D": self.config.config_D_E, "E": self.config.config_D_E}
        forms |= bias if site.bias else dict.fromkeys(bias, "none")
        r, noise = self.config.r, Normal(0.02)
        for part, form in forms.items():
            rows, columns = ("fan_in", "1") if part == "C" else ("*experts out", "fan_in")
            key = f"glora_{part}.*.X"
            if form == "lora":
                first, second = KaimingUniform(fan=1 if part == "C" else site.fan_in), KaimingUniform(fan=r)
                found[f"{part}u"] = site.slot(f"{key}u", f"*experts r {columns}", first, r=r)
                found[f"{part}d"] = site.slot(f"{key}d", f"{rows} r", self.still_or(second), r=r)
            elif form == "vector":
                dims, fan = ("out", site.out) if part in "DE" else (f"{rows} 1", 1)
                found[part] = site.slot(key, dims, self.still_or(KaimingUniform(fan=fan)))
            elif form == "constant":
                found[part] = site.slot(key, "*experts 1 1" if site.experts else "1", self.still_or(noise))
            elif site.plain:  # PEFT has zeros for what is not there, and its checkpoints hold them
                dims = "out" if part in "DE" else f"{rows} {columns}"
                found[f"{part}0"] = site.constant(f"glora_{part}.*.zeros", dims, saved=True)
        return found

    @staticmethod
    def part(p: P, name: str) -> Tensor | None:
        """Return A, B, C, D or E, None where there is none."""
        down, up = p.get(f"{name}d"), p.get(f"{name}u")
        return p.get(name) if down is None or up is None else down @ up

    def change(self, site: Site, p: P, base: Affine) -> Dense:
        A, B, C, D, E = (self.part(p, name) for name in "ABCDE")
        W, b = base.weight, base.bias
        update = W.new_zeros(()) if A is None or B is None else W * A + B
        bias = None if b is None or D is None or E is None else b * D + E
        if C is not None:
            coupled = (W.to(C.dtype) @ C).squeeze(-1)
            bias = coupled if bias is None else bias + coupled
        return Dense(update.expand(W.shape), bias)
