"""Inlay, standing in for peft: this module is replaced by ``inlay.compat.peft`` as soon as it is imported."""

from importlib.metadata import version

from inlay.compat.install import stand_in

stand_in(version("peft"))
