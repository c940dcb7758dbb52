"""Trainable tokens: train a few rows of an embedding, or of the output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.config import PeftConfig, PeftType, TargetField, setting, settings
from inlay.core.affine import Affine, Columns, Site
from inlay.core.fills import Given
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot

__all__ = ["TrainableTokens", "TrainableTokensConfig"]


@settings(positional="token_indices target_modules init_weights")
class TrainableTokensConfig(TargetField, PeftConfig):
    """Configuration of trainable tokens. Without ``target_modules`` it is the model's input embedding."""

    peft_type = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = setting(
        doc="Numbers of the tokens whose rows train.", factory=list, ge=0, parameters="a row for each token"
    )
    init_weights: bool = setting(default=True, doc="Start from the rows of the base; otherwise from random ones.")

    def check_fields(self) -> None:
        twice = sorted({i for i in self.token_indices if self.token_indices.count(i) > 1})
        if twice:
            raise self.wrong("token_indices", f"expected each token once, found {twice[:5]} twice.")


@register_method
class TrainableTokens(Method):
    """Some rows of the table are replaced by trained ones, and so are the same outputs of a head.

    Attributes:
        under: prefix of the slot names, with its dot (``token_adapter.`` inside another method).
    """

    config_class = TrainableTokensConfig
    linear = ("rows",)
    prefix = "trainable_tokens_"
    ties = True
    config: TrainableTokensConfig

    def __init__(self, config: TrainableTokensConfig, under: str = "") -> None:
        super().__init__(config)
        self.under = under

    def implied(self, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        if self.config.target_modules is not None:
            return {}
        finder: Any = getattr(model, "get_input_embeddings", None)
        table = finder() if finder is not None else None
        path = next((name for name, module in model.named_modules() if module is table), "embed_tokens")
        return {"target_modules": {path}}

    def options(self, site: Site) -> dict[str, Any]:
        return {"token_indices": list(self.config.token_indices)}

    def refuse(self, site: Site) -> str | None:
        if site.kernel or site.elementwise or site.experts:
            return "tokens are the rows of an embedding or of an output head, which this layer is not"
        if not self.config.token_indices:
            return "token_indices is empty, so no row would train"
        rows = site.fan_in if site.lookup else site.out
        if max(self.config.token_indices) >= rows:
            return f"token {max(self.config.token_indices)} is beyond its {rows} rows"
        return None

    def note(self, site: Site) -> str | None:
        if site.padding in self.config.token_indices:
            return f"token {site.padding} is the padding token of this layer, whose row torch never trains"
        return None

    def conflict(self, site: Site, below: Method) -> str | None:
        if isinstance(below, TrainableTokens):
            both = sorted({*self.config.token_indices} & {*below.config.token_indices})
            if both:
                return f"both replace the rows of the tokens {both[:5]}, and only one can have them"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        index, dims = Given(tuple(self.config.token_indices)), site.out if site.lookup else site.fan_in
        sizes: dict[str, Any] = {"n": len(index.numbers), "d": dims}
        place = f"{self.under}trainable_tokens"
        start = self.still_or(Normal(1.0))  # zeros stand in until prepare
        return {
            "rows": site.slot(f"{place}_delta.*", "n d", start, **sizes),
            "index": site.constant(f"{place}_index.*", "n", index, dtype=torch.int64, **sizes),
        }

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        if self.config.init_weights:
            table = layer.weight.mT if site.lookup else layer.weight
            p.rows.copy_(table[p.index])
        return None

    def resting(self, site: Site, p: P, base: Affine) -> dict[str, Tensor]:
        return {"rows": (base.weight.mT if site.lookup else base.weight)[p.index]}

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        weight = layer.weight
        if site.lookup:
            return Affine(weight.index_copy(-1, p.index, p.rows.mT.to(weight.dtype)), layer.bias)
        return Affine(weight.index_copy(-2, p.index, p.rows.to(weight.dtype)), layer.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        if not site.lookup:
            bias = (inner.base_affine() if inner.is_base else inner.affine()).bias
            rows = inner.run(x, Affine(p.rows, None if bias is None else bias[p.index]))
            return y.index_copy(-1, p.index, rows.to(y.dtype))
        if site.pooled:
            before = inner.affine().weight.index_select(-1, p.index).mT
            return (y + inner.apply(x, Columns(p.index, p.rows - before.to(p.rows.dtype), site.fan_in))).to(y.dtype)
        replaced = inner.decide(torch.isin, x, p.index).unsqueeze(-1)
        return y.masked_fill(replaced, 0.0) + inner.apply(x, Columns(p.index, p.rows, site.fan_in)).to(y.dtype)
