"""Combining adapters into new ones, and making low-rank factors of what others learned."""

from inlay.combine.change import change_of, lora_factors, no_lora_at
from inlay.combine.intruders import reduce_intruder_dimension
from inlay.combine.weighted import add_weighted

__all__ = ["add_weighted", "change_of", "lora_factors", "no_lora_at", "reduce_intruder_dimension"]
