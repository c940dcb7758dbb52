"""Terms of the loss that PEFT leaves to the training loop, under the names that it has for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.core.lifecycle import terms_of, total
from inlay.core.state import State

__all__ = ["LossTerms", "monteclora_term"]


def monteclora_term(state: State, names: str | list[str] | None = None) -> Tensor | None:
    """Return the mean over layers of MonteCLoRA's divergences; None where no adapter among ``names`` trains with it."""
    terms = terms_of(state, "monteclora_terms", [names] if isinstance(names, str) else names)
    mean = total(terms)
    return None if mean is None else mean / len(terms)


class LossTerms:
    """The part of a wrapped model that gives single terms."""

    def _get_monteclora_loss(self: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return MonteCLoRA's term for some adapters, by default the active ones; 0.0 where there is none."""
        term = monteclora_term(self.state, adapter_names)
        return 0.0 if term is None else term

    def _get_kasa_loss(self: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return KaSA's term for some adapters, by default the active ones; 0.0 where there is none."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        term = total(terms_of(self.state, "kasa_terms", names))
        return 0.0 if term is None else term
