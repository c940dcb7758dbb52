"""An adapted layer as a follower: what its adapters have there, and what stands there without them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay.core.entry import find_tensor
from inlay.core.follow import Follower, base_modules
from inlay.core.hanging import dismount
from inlay.parallel.hooks import lower

if TYPE_CHECKING:
    from inlay.core.affine import Site
    from inlay.core.entry import Entry
    from inlay.core.state import State

__all__ = ["EntryHolder", "put_in_eval_mode"]


class _Spared(threading.local):
    names: tuple[str, ...] | None = None  # adapters that are looked at; None means all


_spared = _Spared()


def put_in_eval_mode(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Do what ``model.eval()`` does, passing by what other adapters than ``names`` have at layers in eval mode.

    A model may have thousands of adapters, and each has modules at every layer. What hangs below a layer has the
    layer's mode, unless somebody set it apart. An adapter that came just now and drops nothing need not be named.
    """
    names = tuple(names)
    if any(module.training for module in base_modules(model)):
        before, _spared.names = _spared.names, names
        try:
            model.eval()
        finally:
            _spared.names = before
        return
    for follower in state.layers():
        if not isinstance(follower, EntryHolder):
            follower.standing.eval()
            continue
        for module in follower._modules_of(names):
            if module.training or module._modules:
                module.eval()


class EntryHolder(Follower):
    """Has ``entries`` by adapter name over a ``base_layer``."""

    if TYPE_CHECKING:
        entries: dict[str, tuple[Entry, ...]]
        base_layer: nn.Module
        site: Site
        shares: tuple[str, ...]

        def restore(self) -> None: ...

    base_attribute = "base_layer"

    def _each(self, names: Iterable[str] | None = None) -> Iterator[Entry]:
        """Iterate over the entries of some adapters, by default of all."""
        for name in self.entries if names is None else names:
            yield from self.entries.get(name, ())

    def train(self, mode: bool = True) -> Any:
        names = _spared.names
        if names is None or self.training != mode:
            return super().train(mode)
        self._modules["base_layer"].train(mode)  # type: ignore[union-attr]
        for module in self._modules_of(names):
            module.train(mode)
        return self

    def _modules_of(self, names: Iterable[str]) -> Iterator[nn.Module]:
        """Iterate over the modules that adapters have here."""
        below = self._modules
        for entry in self._each(names):
            field = entry.method.dropout_field
            for path in entry.holders if field not in below else (*entry.holders, (field,)):
                holder: Any = below.get(path[0])
                for part in path[1:]:
                    holder = None if holder is None else holder._modules.get(part)
                module = None if holder is None else holder._modules.get(entry.name)
                if module is not None:
                    yield module

    @property
    def site_path(self) -> str:
        return self.site.owner

    def move_below(self, before: str) -> None:
        self.shares = tuple(before + path for path in self.shares)
        self.__dict__["site"] = self.site.below(before)
        for entry in self._each():
            entry.site = entry.site.below(before)

    def adapters_here(self) -> list[str]:
        return list(self.entries)

    @property
    def is_bare(self) -> bool:
        return not self.entries

    def has(self, adapter: str) -> bool:
        return adapter in self.entries

    def parameters_of(self, adapter: str) -> Iterator[tuple[nn.Parameter, bool]]:
        for entry in self._each([adapter]):
            yield from entry.parameters(self)

    def tensors_of(self, adapter: str) -> list[Tensor]:
        return [
            find_tensor(entry.home if entry.home is not None else self, adapter, containers, leaf)
            for entry in self._each([adapter])
            for _, containers, leaf in entry.places
        ]

    def drop_adapter(self, adapter: str) -> None:
        dismount(self, adapter)

    def taken_out(self, restore: bool) -> nn.Module:
        """Return the base layer, with what tensor parallelism hangs on it, and unmerged if ``restore``."""
        if restore:
            self.restore()
        below = self.base_layer
        lower(self, below)
        return below.taken_out(restore) if isinstance(below, EntryHolder) else below
