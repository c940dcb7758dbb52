"""BD-LoRA: block-diagonal factors, so that split layers exchange nothing (Wang et al. 2025, arXiv:2510.23346).

A layer that is split by outputs gets a block-diagonal B, one that is split by inputs a block-diagonal A.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.method import P
from inlay.core.slot import After, KaimingUniform, Slot, zeros
from inlay.methods.lora import LoRA

__all__ = ["BDLoRA"]


class BDLoRA(LoRA):
    """``W + scaling * B A`` with A or B block-diagonal, by the layer's name.

    A block of A reads its own share of the inputs, a block of B writes its own share of the outputs. Blocks are stored
    below one another, (r, in / n) and (out, r / n); those of a bank of experts or of a grouped convolution are blocks
    of each expert and of each group.
    """

    def blocked(self, site: Site) -> tuple[bool, bool]:
        """Return whether A and whether B is block-diagonal."""
        options, last = self.config.use_bdlora, site.name.rpartition(".")[2]
        assert options is not None
        lists = (options.target_modules_bd_a, options.target_modules_bd_b)
        first, second = (any(part in last for part in names or ()) for names in lists)
        return first, second

    def refuse(self, site: Site) -> str | None:
        options, (down, up) = self.config.use_bdlora, self.blocked(site)
        assert options is not None
        n, last = options.nblocks, site.name.rpartition(".")[2]
        if down and up:
            return f"both target_modules_bd_a and target_modules_bd_b have a part of {last!r}"
        if not down and not up:
            if not options.match_strict:
                return super().refuse(site)
            return f"neither target_modules_bd_a nor target_modules_bd_b has a part of {last!r} (match_strict=True)"
        r, ends = self.options(site)["r"], site.all_channels if down else site.out // site.groups
        if self.config.use_qalora and down:
            ends = site.all_channels // self.config.qalora_group_size if not site.kernel else 0
        if r % (n * site.groups) or ends % n or not ends:
            return f"nblocks={n} does not divide the rank {r} and the {ends} features of a block-diagonal factor"
        return super().refuse(site)

    def slots(self, site: Site) -> dict[str, Slot]:
        slots, (down, up) = super().slots(site), self.blocked(site)
        assert self.config.use_bdlora is not None
        n = self.config.use_bdlora.nblocks
        A, B = slots["A"], slots["B"]
        if down or up:
            slots["A"] = A = replace(A, blocks=A.blocks * n)
        if down:
            shape = (A.shape[0], A.shape[1] // n, *A.shape[2:])
            # PEFT makes it a second time, with another gain
            first = After(A.init, A.shape, KaimingUniform(a=0.0)) if isinstance(A.init, KaimingUniform) else A.init
            discarded = None if A.discarded is None else After(A.discarded, A.shape)
            dims = (A.dims[0], "block", *A.dims[2:])
            slots["A"] = replace(A, shape=shape, dims=dims, init=first, leaf=None, discarded=discarded)
            slots["B"] = replace(B, blocks=B.blocks * n)
        elif up:
            shape = (B.shape[0], B.shape[1] // n, *B.shape[2:])
            discarded = None if B.discarded is None else After(B.discarded, B.shape)
            first = After(B.init, B.shape, zeros) if B.init is not zeros and not site.lookup else B.init
            slots["B"] = replace(B, shape=shape, init=first, leaf=None, discarded=discarded)
        return slots

    def pair(self, site: Site, p: P) -> tuple[Tensor, Tensor]:
        A, B = super().pair(site, p)
        down, up = self.blocked(site)
        assert self.config.use_bdlora is not None
        n = self.config.use_bdlora.nblocks
        return (_diagonal(A, n, site.groups) if down else A), (_diagonal(B, n, site.groups) if up else B)


def _diagonal(stacked: Tensor, n: int, groups: int) -> Tensor:
    """Put blocks that lie below one another, (..., groups * n * rows, columns), beside one another in each group."""
    blocks = stacked.unflatten(-2, (groups, n, -1)).unsqueeze(-2)
    eye = torch.diag_embed(stacked.new_ones(n)).view(n, 1, n, 1)  # spread over processes where the factor is
    return (blocks * eye).flatten(-2).flatten(-4, -2)
