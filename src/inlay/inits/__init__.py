"""How LoRA's factors start: one file for each way, and the table that ``methods.lora`` asks by name."""

from inlay.inits.start import Factors, Given, Start, begin, start_of

__all__ = ["Factors", "Given", "Start", "begin", "start_of"]
