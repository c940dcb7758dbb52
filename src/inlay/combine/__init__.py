"""Combining adapters into new ones, and making low-rank factors of what others learned."""

from inlay.combine.svd import energy_rank, factorise
from inlay.combine.weighted import add_weighted

__all__ = ["add_weighted", "energy_rank", "factorise"]
