"""LN tuning: train the norms themselves (Zhao et al. 2023, arXiv:2312.11420)."""

from __future__ import annotations

from torch import Tensor

from inlay.config import ExcludeField, PeftConfig, PeftType, TargetField, setting, settings
from inlay.core.affine import Affine, Dense, Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Slot, zeros

__all__ = ["LNTuning", "LNTuningConfig"]


@settings(positional="target_modules exclude_modules modules_to_save")
class LNTuningConfig(TargetField, ExcludeField, PeftConfig):
    """Configuration of LN tuning."""

    peft_type = PeftType.LN_TUNING

    modules_to_save: list[str] | str | None = setting(
        default=None,
        doc="Modules that are copied, trained in full and saved with the adapter, such as a new classification head.",
        parameters="adds every parameter of those modules",
    )

    def check_fields(self) -> None:
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]


@register_method
class LNTuning(Method):
    """``W -> W'``, ``b -> b'``: a trained copy; ``W' - W`` is what is added, so that adapters add up."""

    config_class = LNTuningConfig
    linear = ("weight", "bias")
    prefix = "ln_tuning_"
    commutes = True
    config: LNTuningConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        # The copy starts as the base's values (prepare), zeros only stand in until then.
        slots = {"weight": Slot("ln_tuning_layers.*.weight", site.stored_shape, site.stored_dims, zeros)}
        if site.bias:
            shape = site.axes or (site.out,)
            slots["bias"] = Slot("ln_tuning_layers.*.bias", shape, ("out",) * len(shape), zeros)
        return slots

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        p.weight.copy_(site.to_stored(layer.weight))
        if layer.bias is not None:
            p.bias.copy_(layer.bias.view(p.bias.shape))
        return None

    def resting(self, site: Site, p: P, base: Affine) -> dict[str, Tensor]:
        bias = {} if base.bias is None else {"bias": base.bias.view(p.bias.shape)}
        return {"weight": site.to_stored(base.weight), **bias}

    def trained(self, site: Site, p: P) -> Affine:
        """Return the trained map."""
        bias = p.get("bias")
        return Affine(site.from_stored(p.weight), None if bias is None else bias.flatten())

    def change(self, site: Site, p: P, base: Affine) -> Dense:
        """Return what was trained as an update of the base."""
        trained = self.trained(site, p)
        bias = None if trained.bias is None or base.bias is None else trained.bias - base.bias
        return Dense(trained.weight - base.weight, bias)

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        # Over the base itself the copy is taken as it is, without the rounding of a difference.
        return self.trained(site, p) if layer is base else layer.add(self.change(site, p, base))

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if inner.is_base:
            return inner.run(x, self.trained(site, p))
        y = inner(x)
        return (y + inner.apply(x, self.change(site, p, inner.base_affine()))).to(y.dtype)
