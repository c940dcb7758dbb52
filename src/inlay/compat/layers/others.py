"""What PEFT's layer classes of other methods than LoRA have beside weights and numbers by adapter name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.compat.layers.viewing import Own
from inlay.core.entry import AdapterTensors

__all__ = ["FURTHER", "MEMBERS", "BufferDict"]


class BufferDict(AdapterTensors):
    """Buffers by adapter name; a dict of tensors that moves with its module.

    Args:
        buffers: the first ones.
        persistent: whether they are part of a ``state_dict``.
    """

    def __init__(self, buffers: Any = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor)
        if not self.persistent:
            self._non_persistent_buffers_set.add(name)

    def update(self, buffers: Any) -> None:
        """Add buffers from a mapping or from pairs."""
        for name, tensor in dict(buffers).items():
            self[name] = tensor

    def pop(self, name: str) -> Tensor:
        """Remove a buffer and return it."""
        tensor = self[name]
        del self[name]
        return tensor

    def clear(self) -> None:
        """Remove all buffers."""
        for name in list(self):
            del self[name]


def _numbers(layer: Any, option: str) -> dict[str, Any]:
    """Return a number of each adapter of a layer."""
    return {entry.name: entry.options[option] for entry in layer._each() if option in entry.options}


class IA3Members:
    """Of (IA)^3."""

    @property
    def is_feedforward(self: Any) -> bool:
        """Whether the factors act on the layer's input."""
        return any(_numbers(self, "on_input").values())


class FourierFTMembers:
    """Of FourierFT."""

    kwargs: Any = Own(dict)

    @property
    def fourierft_scaling(self: Any) -> dict[str, float]:
        """Scale by adapter name."""
        return _numbers(self, "scaling")

    @property
    def fourierft_random_loc_seed(self: Any) -> dict[str, int]:
        """Seed that the frequencies are drawn from, by adapter name."""
        held = [entry for entry in self._each() if "fourierft_n_frequency" in entry.options]
        return {entry.name: entry.method.config.random_loc_seed for entry in held}

    @property
    def indices(self: Any) -> dict[str, Tensor]:
        """Places (row, column) of the trained frequencies, (2, n), by adapter name."""
        import torch

        places = self.fourierft_places
        return {
            name: torch.stack((places[name] // self.site.fan_in, places[name] % self.site.fan_in)) for name in places
        }


MEMBERS: dict[str, type[Any]] = {
    "tuners.ia3.layer.IA3Layer": IA3Members,
    "tuners.fourierft.layer.FourierFTLayer": FourierFTMembers,
}
FURTHER: dict[str, Any] = {"tuners._buffer_dict.BufferDict": BufferDict}
