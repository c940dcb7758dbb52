"""Thousands of adapters by name, a few of them in the model: files, host memory, and a fixed number of slots."""

from inlay.residency.store import AdapterStore

__all__ = ["AdapterStore"]
