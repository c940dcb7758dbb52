"""DoRA: magnitude and direction of every output row apart (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from torch import Tensor

from inlay.core.affine import Affine, Site
from inlay.core.method import Inner, P
from inlay.core.remember import remembered
from inlay.core.row_norms import norms_with
from inlay.core.slot import Constant, Slot
from inlay.methods.lora import LoRA

__all__ = ["DoRA"]


class DoRA(LoRA):
    """``m * (W + s B A) / ||W + s B A||``: norms by row, of the untouched weight, held constant in backward."""

    scales_rows = True
    detaches = True  # the norm

    @property
    def commutes(self) -> bool:
        return True  # it adds to what is below; its norm reads the untouched weight

    def refuse(self, site: Site) -> str | None:
        if site.groups > 1:
            return "DoRA's norm is taken of W + BA, which a grouped convolution cannot hold, because BA crosses groups"
        if site.fan_in == 1:
            return "DoRA trains the direction of every output row, and a row that is a single number has none"
        return super().refuse(site)

    def slots(self, site: Site) -> dict[str, Slot]:
        dims = "1 out *ones" if site.kernel else "*experts out"
        magnitude = site.slot(
            "lora_magnitude_vector.*.weight", dims, Constant(1.0), options={"disk": "lora_magnitude_vector"}
        )
        return {**super().slots(site), "magnitude": magnitude}

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        rebased = super().prepare(site, p, layer)
        norm = self.norm(site, p, layer if rebased is None else rebased)
        p.magnitude.copy_(norm.view(p.magnitude.shape))
        return rebased

    def norm(self, site: Site, p: P, base: Affine) -> Tensor:
        """Return the row norms of the adapted base weight, (*experts, out)."""

        def compute() -> Tensor:
            return norms_with(base.weight, self.delta(site, p).scaled(p.scaling))

        return compute() if p.training else remembered(compute, *self.made_of(p), base.weight, p.scaling)

    def gain(self, site: Site, p: P, base: Affine) -> Tensor:
        """Return what every output row is multiplied by, (*experts, out)."""
        norm = self.norm(site, p, base)
        return p.magnitude.view(norm.shape) / norm

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        gain = self.gain(site, p, base).unsqueeze(-1)
        return Affine(layer.weight + (gain - 1) * base.weight + gain * self.update(site, p).dense(), layer.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        return inner.plus(x, p, self.update(site, p), self.gain(site, p, inner.base_affine()))
