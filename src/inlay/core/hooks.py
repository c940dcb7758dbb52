"""What else a method may say beside its mathematics, each with an empty default: of planning, training and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inlay.core.affine import Affine, Site

if TYPE_CHECKING:
    from inlay.core.lifecycle import Stepped
    from inlay.core.method import P

__all__ = ["Hooks"]


class Hooks:
    """Base of :class:`inlay.core.method.Method`."""

    def survey(self, sites: list[Site]) -> None:
        """Look at the sites of all layers that will be adapted, before anything else is asked of any of them."""

    def look(self, site: Site, layer: Affine) -> None:
        """Learn from the untouched weight, in float32 or wider, what slots there are; asked for before all else."""

    def borrows(self, sites: list[Site]) -> dict[str, dict[str, str]]:
        """Return which tensors sites have in common that are named after each of them in a checkpoint.

        Returns:
            name of a site -> role -> name of an earlier site whose tensor it is. Slots of such a role are modules of
            their own (``lily_A.*.weight``).
        """
        return {}

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        """Set the constants (unsaved slots) that follow from the untouched weight; asked for on every loading too.

        Comes before ``prepare``. ``layer`` is in float32, or wider.
        """

    def derive_shared(self, p: P, layers: Iterable[tuple[Site, Affine]]) -> None:
        """Set shared tensors that follow from the untouched weights of all sites.

        Args:
            p: has those shared tensors that no checkpoint is going to fill.
            layers: sites with their maps, each read when its turn comes.
        """

    @property
    def linear(self) -> tuple[str, ...]:
        """Roles that the update is linear in while all else stays: adapters are combined by them.

        The update is that of their difference from :meth:`resting`.
        """
        return ()

    def resting(self, site: Site, p: P, base: Affine) -> dict[str, Tensor]:
        """Return the values of :attr:`linear` roles that change nothing, where these are not zeros."""
        return {}

    def penalty(self, layers: Sequence[tuple[Site, P]]) -> Tensor | None:
        """Return what is added to the loss while the adapter trains, given its sites and what it has there."""
        return None

    def step(self, adapter: Stepped, global_step: int) -> None:
        """Do what belongs to the end of a training step, while gradients are still there.

        Args:
            adapter: configuration, layers, and what the method keeps between steps.
            global_step: how many steps were finished before.
        """

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint holds, by its keys, given the adapter's tensors by the keys that slots say.

        ``config`` is what is saved, which training may have written to.
        """
        return tensors

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo :meth:`pack`; tensors that it did not make stay as they are."""
        return tensors
