"""QA-LoRA: A reads the sums of groups of inputs (Xu et al. 2023, arXiv:2309.14717)."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from inlay.core.affine import Site
from inlay.core.method import P
from inlay.core.slot import After, KaimingUniform, Slot
from inlay.methods.lora import LoRA

__all__ = ["QALoRA"]


class QALoRA(LoRA):
    """``W + scaling * B A (P_g (x) 1_g')``: the update is constant on groups of g consecutive columns of the weight.

    So a weight that is quantised by groups of g can take it up in its zero points alone. As in PEFT the mean of a group
    is multiplied by the number of groups.
    """

    def refuse(self, site: Site) -> str | None:
        g = self.config.qalora_group_size
        if site.fan_in % g:
            return f"qalora_group_size={g} does not divide the {site.fan_in} columns of the weight"
        return super().refuse(site)

    def slots(self, site: Site) -> dict[str, Slot]:
        slots = super().slots(site)
        A = slots["A"]
        shape = (A.shape[0], math.prod(A.shape[1:]) // self.config.qalora_group_size)
        ordinary = isinstance(A.init, KaimingUniform) and A.leaf is not None  # PEFT makes A a second time
        first = After(A.init, A.shape, A.init) if ordinary else A.init
        discarded = None if A.discarded is None else After(A.discarded, A.shape)
        slots["A"] = replace(A, shape=shape, dims=("r", "groups"), init=first, leaf=None, discarded=discarded)
        return slots

    def spread(self, site: Site) -> float:
        g = self.config.qalora_group_size
        return super().spread(site) * g * (site.fan_in / g / g) ** 2

    def pair(self, site: Site, p: P) -> tuple[Tensor, Tensor]:
        A, B = super().pair(site, p)
        g = self.config.qalora_group_size
        return (A * (site.fan_in // g / g)).repeat_interleave(g, -1), B
