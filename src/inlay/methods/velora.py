"""VeLoRA: backward sees a few numbers of each input token (Miles et al. 2024, arXiv:2405.17991)."""

from __future__ import annotations

import torch

from inlay.core.affine import Delta, LowRank, Site
from inlay.core.compressed import Compressed
from inlay.core.fills import unit_vector
from inlay.core.method import P
from inlay.core.slot import Slot, zeros
from inlay.methods.lora import LoRA

__all__ = ["VeLoRA"]


class VeLoRA(LoRA):
    """``W + scaling * B A``, where A trains on ``v v^T x`` for each sub-token x of the input.

    A token's features are cut into ``num_groups`` sub-tokens; what is kept for backward is the product of each with one
    direction v. Of a convolution these are the channels at each place.
    """

    own_backward = True

    def refuse(self, site: Site) -> str | None:
        if site.lookup:
            return "velora_config compresses features for backward, and the input of an embedding are indices"
        return super().refuse(site)

    def slots(self, site: Site) -> dict[str, Slot]:
        options = self.config.velora_config
        assert options is not None
        size = -(-site.all_channels // options.num_groups)
        init = unit_vector if options.init_type == "random" else zeros
        return {**super().slots(site), "embed": site.constant("lora_velora_embed.*", "v", init, saved=True, v=size)}

    def update(self, site: Site, p: P) -> Delta:
        update = super().update(site, p)
        assert isinstance(update, LowRank)
        if not (p.training and torch.is_grad_enabled()):
            return update
        options = self.config.velora_config
        assert options is not None
        direction = None if options.init_type == "batch_average" else p.embed
        learns = options.init_type == "batch_average_once"
        return Compressed(update, options.num_groups, options.scale, direction, learns)
