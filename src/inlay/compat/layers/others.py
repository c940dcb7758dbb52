"""What PEFT's layer classes of other methods than LoRA have beside weights and numbers by adapter name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.layers.lora import ConvMembers, LinearMembers
from inlay.compat.layers.mixins import refill
from inlay.compat.layers.viewing import Derived
from inlay.core.divisors import nearest_divisor
from inlay.core.entry import AdapterTensors
from inlay.core.inner import Inner

__all__ = ["FURTHER", "MEMBERS", "BufferDict", "replaced_rows"]


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


def _numbers(layer: Any, option: str) -> dict[str, Any]:
    """Return a number of each adapter of a layer."""
    return {entry.name: entry.options[option] for entry in layer._each() if option in entry.options}


class IA3Members:
    """Of (IA)^3."""

    def reset_ia3_parameters(self: Any, adapter_name: str) -> None:
        """Set an adapter's factors to 1."""
        refill(self, adapter_name, init_ia3_weights=True)

    @Derived
    def is_feedforward(self: Any) -> bool:
        """Whether the factors act on the layer's input."""
        return any(_numbers(self, "on_input").values())


class FourierFTMembers:
    """Of FourierFT."""

    def reset_fourier_parameters(self: Any, adapter_name: str) -> None:
        """Draw an adapter's spectrum anew, from a standard normal distribution."""
        refill(self, adapter_name, init_weights=False)

    @Derived
    def fourierft_scaling(self: Any) -> dict[str, float]:
        """Scale by adapter name."""
        return _numbers(self, "scaling")

    @Derived
    def fourierft_random_loc_seed(self: Any) -> dict[str, int]:
        """Seed that the frequencies are drawn from, by adapter name."""
        held = [entry for entry in self._each() if "fourierft_n_frequency" in entry.options]
        return {entry.name: entry.method.config.random_loc_seed for entry in held}

    @Derived
    def indices(self: Any) -> dict[str, Tensor]:
        """Places (row, column) of the trained frequencies, (2, n), by adapter name."""
        places = self.fourierft_places
        return {
            name: torch.stack((places[name] // self.site.fan_in, places[name] % self.site.fan_in)) for name in places
        }


class LycorisMembers:
    """Of LoHa, and of LoKr."""

    @property
    def _available_adapters(self: Any) -> set[str]:
        available: set[str] = self._get_available_adapters()
        return available

    def _get_delta_activations(self: Any, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return an adapter's share of the output."""
        entry = self.entries[adapter_name][0]
        inner = Inner(self, (), 0, args, kwargs)
        return inner.apply(x, entry.method.update(entry.site, self.params(entry)))


class LoHaMembers:
    """Of LoHa."""

    def reset_adapter_parameters(self: Any, adapter_name: str) -> None:
        """Give an adapter fresh values that change nothing."""
        refill(self, adapter_name, init_weights=True)

    def reset_adapter_parameters_random(self: Any, adapter_name: str) -> None:
        """Give an adapter fresh random values."""
        refill(self, adapter_name, init_weights=False)


class OFTMembers:
    """Of OFT."""

    def reset_oft_parameters(self: Any, adapter_name: str, init_weights: bool) -> None:
        """Give an adapter fresh values: the identity, or small random rotations."""
        refill(self, adapter_name, init_weights=init_weights)

    def adjust_oft_parameters(self, in_features: int, params: int) -> int:
        """Return the divisor of ``in_features`` closest to a wish, the smaller of two."""
        return nearest_divisor(in_features, params)

    @Derived
    def oft_dropout(self: Any) -> nn.ModuleDict:
        """What drops blocks, by adapter name; the method does so itself, so that these change nothing."""
        return nn.ModuleDict({name: nn.Identity() for name in _numbers(self, "oft_block_size")})


class VeraMembers:
    """Of VeRA."""

    def reset_vera_parameters(self: Any, adapter_name: str, d_initial: float = 0.1) -> None:
        """Set an adapter's outer factors to zero and the inner ones to ``d_initial``."""
        refill(self, adapter_name, init_weights=True, d_initial=d_initial)


def replaced_rows(layer: Any, entries: Iterable[Any]) -> BufferDict:
    """Return the rows of the base layer, (tokens, features), that entries of a layer replace, by adapter name."""
    table = layer.kind.from_matrix(layer.site, layer.base_affine().weight).detach()
    return BufferDict({entry.name: table[entry.options["token_indices"]] for entry in entries})


class TokensMembers:
    """Of trainable tokens as a method of its own."""

    _deferred = True  # PEFT's constructor leaves the tensors to update_layer

    @property
    def tied_adapter(self: Any) -> Any:
        """The layer whose rows this one uses, or None."""
        return next((entry.home for entry in self._each() if entry.home is not None), None)

    @Derived
    def trainable_tokens_delta(self: Any) -> Any:
        """Trained rows by adapter name, of the layer that this one shares them with, if it does."""
        tied = self.tied_adapter
        return nn.ParameterDict() if tied is None else tied.trainable_tokens_delta

    @Derived
    def trainable_tokens_original(self: Any) -> BufferDict:
        """Rows of the base layer that adapters replace, by adapter name."""
        return replaced_rows(self, (entry for entry in self._each() if "token_indices" in entry.options))

    def get_merged_weights(self: Any, active_adapters: list[str]) -> Tensor:
        """Return the table with the rows of some adapters in it."""
        folded = self.fold(self._entries_of(tuple(active_adapters)))
        weight: Tensor = self.kind.from_matrix(self.site, folded.weight)
        return weight

    def forward_adapters(self: Any, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with the rows of some adapters."""
        y: Tensor = self._run(self._entries_of(tuple(active_adapters)), (x, *args), kwargs)
        return y

    def _check_overlapping_tokens(self: Any, adapter_names: list[str]) -> None:
        """Refuse adapters that replace the same rows.

        Raises:
            UnsupportedError: names two of them and the rows.
        """
        self.check_active(adapter_names)


MEMBERS: dict[str, type[Any]] = {
    "tuners.ia3.layer.IA3Layer": IA3Members,
    "tuners.ia3.layer.Linear": LinearMembers,
    "tuners.ia3.layer._ConvNd": ConvMembers,
    "tuners.lycoris_utils.LycorisLayer": LycorisMembers,
    "tuners.loha.layer.LoHaLayer": LoHaMembers,
    "tuners.oft.layer.OFTLayer": OFTMembers,
    "tuners.oft.layer.Linear": LinearMembers,
    "tuners.vera.layer.VeraLayer": VeraMembers,
    "tuners.vera.layer.Linear": LinearMembers,
    "tuners.fourierft.layer.FourierFTLayer": FourierFTMembers,
    "tuners.trainable_tokens.layer.TrainableTokensLayer": TokensMembers,
}
FURTHER: dict[str, Any] = {"tuners._buffer_dict.BufferDict": BufferDict}
