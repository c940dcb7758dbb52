"""EVA: A starts at the principal directions of the layer's inputs (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.slot import Init
from inlay.errors import UnsupportedError
from inlay.inits.incremental_pca import IncrementalPCA
from inlay.inits.start import Drawn, Start

__all__ = ["Eva", "Watched", "shared_out", "watch"]

_SEED = 42  # of the random projection inside the incremental PCA


class Eva(Start):
    """The ordinary start until ``initialize_lora_eva_weights`` has seen data; B stays zero, and so does the update."""

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        A, B = super().fills(site, r)
        return (A, B) if site.lookup else (A, Drawn(A))

    def discarded(self, site: Site) -> tuple[Init | None, Init | None]:
        return super().discarded(site) if site.lookup else (None, None)


@dataclass
class Watched:
    """What is known of one layer's inputs.

    Attributes:
        r: the layer's rank before ranks are shared out.
        most: the largest rank that it may get.
        like: the layer that reads the same inputs and stands for this one, if there is one.
        found: whether each component is where it was before the last batch.
    """

    r: int
    most: int
    like: str | None = None
    pca: IncrementalPCA | None = None
    found: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def settled(self, rank: int) -> bool:
        """Whether the first ``rank`` components are found."""
        return rank <= len(self.found) and bool(self.found[:rank].all())

    def take(self, rows: Tensor, tau: float) -> bool:
        """Take in rows (n, features); False if they are too few."""
        if len(rows) < self.most:
            return False
        self.pca = self.pca or IncrementalPCA(self.most, lowrank=True, lowrank_seed=_SEED)
        before = getattr(self.pca, "components_", None)
        self.pca.partial_fit(rows.float())
        if before is not None:
            self.found = torch.nn.functional.cosine_similarity(self.pca.components_, before) >= tau
        return True


def fingerprint(rows: Tensor) -> str:
    """Return what two layers have in common if they read the same numbers."""
    raw = rows.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes() + str(tuple(rows.shape)).encode(), digest_size=16).hexdigest()


def group(watched: dict[str, Watched], prints: Mapping[str, str]) -> None:
    """Let the first of the layers that read the same inputs stand for the others, with the largest of their ranks."""
    firsts: dict[str, str] = {}
    for name, one in watched.items():
        first = firsts.setdefault(prints[name], name)
        if first != name:
            one.like = first
            watched[first].most = max(watched[first].most, one.most)
    for one in watched.values():
        if one.like is not None:
            one.most = watched[one.like].most


def shared_out(watched: Mapping[str, Watched]) -> dict[str, int]:
    """Give the ranks of all layers together to the components that explain the largest share of a layer's variance."""
    ratios: dict[str, Tensor] = {}
    for name, one in watched.items():
        source = watched[one.like] if one.like is not None else one
        assert source.pca is not None
        ratios[name] = source.pca.explained_variance_ratio_[: one.most]
    owners = [name for name, values in ratios.items() for _ in values]
    order = torch.cat(list(ratios.values())).argsort(descending=True)
    ranks = dict.fromkeys(watched, 0)
    for index in order[: sum(one.r for one in watched.values())].tolist():
        ranks[owners[index]] += 1
    for name, one in watched.items():  # who stands for others has found most
        if one.like is not None and ranks[one.like] < ranks[name]:
            ranks[one.like], ranks[name] = ranks[name], ranks[one.like]
    return ranks


def watch(
    watched: dict[str, Watched],
    batches: Iterable[Any],
    run: Callable[[Any, Callable[[str, Tensor], None], set[str]], None],
    tau: float,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """See batches, again and again, until the components of all layers stand still; returns the layers' ranks.

    Args:
        watched: by layer; filled.
        batches: sample data.
        run: ``run(batch, see, names)`` calls ``see(name, rows)`` for each of the layers.
        show: is told how many layers are done.

    Raises:
        UnsupportedError: every batch has fewer rows than a layer may get ranks.
    """
    ranks = {name: one.most for name, one in watched.items()}
    own = [name for name, one in watched.items() if one.like is None]
    since = 0
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    done: dict[str, bool] = dict.fromkeys(own, False)
    for batch in cycle(batches):
        for name in own:
            done[name] = watched[name].settled(ranks[name])
        show(sum(done[one.like or name] for name, one in watched.items()), len(watched))
        if all(done.values()):
            break
        short: list[str] = []

        def see(name: str, rows: Tensor, short: list[str] = short) -> None:
            if not watched[name].take(rows, tau):
                short.append(name)

        wanted = {name for name in own if not done[name]}
        run(batch, see, wanted)
        since = since + 1 if len(short) == len(wanted) else 0
        if since >= max(count, 1):
            name = short[0]
            raise UnsupportedError(
                f"EVA: no batch has as many rows for {name!r} as it may get ranks ({watched[name].most}); use larger "
                "batches, a smaller r or a smaller rho, or use_label_mask=False if labels leave most tokens out"
            )
        if all(watched[name].pca is not None for name in own):
            ranks = shared_out(watched)
    return ranks
