"""A method of one's own: each output of a layer is scaled by ``1 + s_i``, all layers with few tensors and no matrix.

    python examples/own_method/rowscale.py

Installed as a package, nothing needs to import it, if its ``pyproject.toml`` says::

    [project.entry-points."inlay.methods"]
    ROWSCALE = "rowscale"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import inlay
from inlay.config import PeftConfig, TargetField, bias_setting, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.inner import Inner
from inlay.core.method import Method, P
from inlay.core.slot import Slot


@settings
class RowScaleConfig(TargetField, PeftConfig):
    """Configuration of RowScale."""

    peft_type = "ROWSCALE"

    strength: float = setting(default=1.0, doc="What the trained numbers are multiplied by.", gt=0.0)
    bias: str = bias_setting("rowscale")


@inlay.register
class RowScale(Method):
    """``diag(1 + strength * s) (W x + b)``; s starts at zero, so that nothing changes."""

    config_class = RowScaleConfig
    prefix = "rowscale_"

    def slots(self, site: Site) -> dict[str, Slot]:
        return {"s": site.slot("rowscale_s.*", "*experts out")}

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        rows = 1 + self.config.strength * p.s
        return Affine(layer.weight * rows.unsqueeze(-1), None if layer.bias is None else layer.bias * rows)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:  # without it, the rewritten layer would run
        y = inner(x)
        return (y * site.along_output(1 + self.config.strength * p.s)).to(y.dtype)


if __name__ == "__main__":
    from inlay.testing import check

    print(check(RowScale))
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(8, 4)), RowScaleConfig(target_modules=["0"]))
    print(model(torch.ones(1, 8)))
