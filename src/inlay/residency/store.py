"""Many adapters by name, of which a fixed number is in the model at a time."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inlay.checkpoint.tree import bare_model
from inlay.core.state import BASE, State
from inlay.errors import AdapterNameError, ConfigError, StateError, UnknownAdapterError, did_you_mean
from inlay.residency.building import add_slots, remove_slots
from inlay.residency.host import Arena, Folder, packed
from inlay.residency.slots import Fitted, Slots

__all__ = ["AdapterStore"]


class AdapterStore:
    """Adapters that are registered by name, and slots in the model that those in use are copied into.

    ::

        store = inlay.AdapterStore(model, LoraConfig(r=64, target_modules="all-linear"), max_resident=16)
        for name, folder in customers.items():
            store.register(name, folder)
        model.set_adapter("customer 17")
        model(batch, adapter_names=["customer 17", "customer 4711", "__base__"])

    A registered adapter costs one small object, whatever the model's size. Its name can be used wherever the name of
    an adapter in the model can: using it copies its tensors into a free slot, or into the one that was not used for
    the longest time. The model has the same modules all the time, so switching and evicting compile nothing anew.

    Adapters that are active, pinned, or in use by a running forward are not evicted, and neither are those that were
    changed since they were copied in (trained, for instance). Every method may be called by any thread.

    Args:
        model: a ``PeftModel`` or a bare model, with or without adapters of its own; the slots are added to it.
        config: what a slot has room for: the method, the layers, and as ``r`` the largest rank.
        max_resident: how many slots.
        max_host: how many adapters are kept in this machine's memory after they were read, so that using them again
            reads no file; those that were registered from memory do not count.
        autocast_adapter_dtype: the slots of a half-precision model are in float32.

    Raises:
        ConfigError: a number is out of range, or the config asks for more than tensors at layers.
        what :func:`inlay.plan` raises. In each case the model is as before.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        *,
        max_resident: int = 8,
        max_host: int = 0,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        for what, number, least in (("max_resident", max_resident, 1), ("max_host", max_host, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ConfigError(f"{what}: expected a whole number of at least {least}, found {number!r}")
        self._model = model
        self._max_host = max_host
        self._sources: dict[str, Folder | Arena] = {}
        self._at: OrderedDict[str, str] = OrderedDict()  # resident adapter -> its slot, the last used at the end
        self._pinned: set[str] = set()
        self._leases: Counter[str] = Counter()  # adapter -> forwards that use it
        self._mine = _Mine()
        self._versions: dict[str, int] = {}
        self._host: OrderedDict[str, Future[Arena]] = OrderedDict()
        self._readers: ThreadPoolExecutor | None = None
        self._changed = threading.Condition(threading.RLock())
        self.copies = 0
        """How often an adapter was copied into a slot so far."""
        names = add_slots(model, config, max_resident, autocast_adapter_dtype)
        try:
            self._slots = Slots(bare_model(model)[0], names)
        except BaseException:
            remove_slots(model, names)
            raise
        self._free = list(reversed(names))
        self._state.residency = self

    @property
    def _state(self) -> State:
        return self._slots.state

    # -- what is registered ------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        source: str | os.PathLike[str] | tuple[Any, Mapping[str, Tensor]],
        *,
        subfolder: str | None = None,
        check: bool = True,
        **hub_keywords: Any,
    ) -> None:
        """Give an adapter a name; no tensor is read from a file, and nothing is added to the model.

        Args:
            name: any string but ``__base__`` and the names of the model's own adapters.
            source: a folder or a Hub repository; or a configuration and tensors by the keys of a checkpoint, which
                are copied into one tensor.
            subfolder: a folder inside ``source``.
            check: read the configuration and the shapes now, and refuse what does not fit; otherwise this is done
                when the adapter is used for the first time.
            hub_keywords: revision, token, ... of ``huggingface_hub.hf_hub_download``.

        Raises:
            AdapterNameError: the name is taken or reserved.
            CheckpointError: files are missing or damaged.
            ConfigError: another method than the slots are for, or more than tensors at layers.
            CheckpointMismatchError: other layers, a larger rank, or other shapes than the slots have.
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise AdapterNameError(f"expected a name other than {BASE!r}, found {name!r}")
        if isinstance(source, tuple):
            config, tensors = source
            self._slots.fitted(name, config, tensors)
            held: Folder | Arena = packed(config, tensors, self._pins_memory)
        else:
            held = Folder(os.fspath(source), subfolder, dict(hub_keywords) or None)
            if check:
                self._slots.fitted(name, *held.read())
        with self._changed:
            if name in self._sources or name in self._state.records:
                where = "registered" if name in self._sources else "an adapter of the model"
                raise AdapterNameError(f"{name!r} is {where} already; unregister it first or take another name")
            self._sources[name] = held

    def unregister(self, name: str) -> None:
        """Forget an adapter, and what was changed of it in its slot.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: it is active, pinned or in use.
        """
        with self._changed:
            self._known(name)
            if name in self._at:
                self._drop(name, changed=True)
            self._sources.pop(name)
            self._host.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sources))

    def _known(self, name: str) -> Folder | Arena:
        if name not in self._sources:
            raise UnknownAdapterError(
                f"no adapter {name!r} is registered; there are {len(self._sources)}.{did_you_mean(name, self._sources)}"
            )
        return self._sources[name]

    # -- what is resident --------------------------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[str, ...]:
        """Adapters that are in a slot, the last used one last."""
        with self._changed:
            return tuple(self._at)

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that stay in their slots."""
        with self._changed:
            return frozenset(self._pinned)

    @property
    def max_resident(self) -> int:
        """The number of slots."""
        return len(self._slots.names)

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: no slot can be had.
        """
        with self._changed:
            self._admit([self._checked(name)])
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            UnknownAdapterError: it is not registered.
        """
        with self._changed:
            self._known(name)
            self._pinned.discard(name)
            self._changed.notify_all()

    def evict(self, name: str) -> None:
        """Free an adapter's slot; it stays registered.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: it is active, pinned, in use, or was changed since it was copied in.
        """
        with self._changed:
            self._known(name)
            if name in self._at:
                self._drop(name)

    def prefetch(self, names: str | Iterable[str]) -> None:
        """Read adapters into this machine's memory, in another thread; using them then only copies them.

        What goes wrong there is raised when the adapter is used. At most ``max_host`` adapters are kept, or as many
        as there are slots if that is 0.

        Raises:
            UnknownAdapterError: one is not registered.
        """
        with self._changed:
            for name in [names] if isinstance(names, str) else names:
                source = self._known(name)
                if isinstance(source, Arena) or name in self._at:
                    continue
                if name not in self._host:
                    if self._readers is None:
                        self._readers = ThreadPoolExecutor(2, thread_name_prefix="inlay-prefetch")
                    self._host[name] = self._readers.submit(_read_ahead, source, self._pins_memory)
                self._host.move_to_end(name)
                self._bound_host(self._max_host or self.max_resident)

    def _bound_host(self, most: int) -> None:
        while len(self._host) > most:
            self._host.popitem(last=False)[1].cancel()

    @property
    def _pins_memory(self) -> bool:
        return any(tensor.is_cuda for tensor in self._slots.tensors(self._slots.names[0])[:1])

    @contextmanager
    def placed(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Make adapters resident and keep them so inside the block; yields the model's names for them, in order.

        Names of the model's own adapters and ``__base__`` stand for themselves.

        Raises:
            UnknownAdapterError: a name is neither registered nor one of the model's.
            StateError: there are more distinct names than slots that can be had.
            what :meth:`register` raises, for an adapter that was not checked. No slot was changed then.
        """
        wanted = list(names)
        with self._changed:
            distinct = [name for name in dict.fromkeys(wanted) if not self._is_own(name)]
            places = self._admit([self._checked(name) for name in distinct])
            self._leases.update(distinct)
            self._mine.leases.update(distinct)
        try:
            yield [places.get(name, name) for name in wanted]
        finally:
            with self._changed:
                self._leases.subtract(distinct)
                self._mine.leases.subtract(distinct)
                self._changed.notify_all()

    def shown(self, names: Iterable[str]) -> list[str]:
        """Return adapter names with those of slots replaced by those of the adapters in them."""
        with self._changed:
            held = {slot: name for name, slot in self._at.items()}
        return [held.get(name, name) for name in names]

    def _is_own(self, name: str) -> bool:
        return name == BASE or (name in self._state.records and name not in self._slots.names)

    def _checked(self, name: str) -> str:
        if name not in self._sources:
            own = [one for one in self._state.records if one not in self._slots.names]
            known = ", ".join(map(repr, own)) or "none"
            raise UnknownAdapterError(
                f"no adapter {name!r}: it is not registered, nor one of the model's ({known})."
                f"{did_you_mean(str(name), [*own, *self._sources])}"
            )
        return name

    def _admit(self, names: list[str]) -> dict[str, str]:
        """Make adapters resident and return their slots; everything that can fail comes before the first copy."""
        if self._slots.names[0] not in self._state.records:
            raise StateError("the slots were taken out of the model; make another AdapterStore")
        fits: dict[str, Fitted] = {}
        while True:
            missing = [name for name in names if name not in self._at]
            fits.update((name, self._fitted(name)) for name in missing if name not in fits)
            victims = self._victims(len(missing) - len(self._free), names)
            if victims is not None:
                break
            self._changed.wait()  # others may take or free slots meanwhile
        for victim in victims:
            self._drop(victim)
        for name in missing:
            slot = self._free.pop()
            try:
                self._slots.write(slot, fits[name])
            except BaseException:
                self._free.append(slot)
                raise
            self.copies += 1
            self._at[name] = slot
            self._versions[name] = self._version(slot)
        for name in names:
            self._at.move_to_end(name)
        return {name: self._at[name] for name in names}

    def _victims(self, count: int, wanted: list[str]) -> list[str] | None:
        """Return the least recently used adapters that can go; None to wait for what other threads use.

        Raises:
            StateError: waiting is of no use.
        """
        if count <= 0:
            return []
        found: list[str] = []
        reasons: dict[str, str] = {}
        for name in self._at:
            reason = "asked for as well" if name in wanted else self._kept(name)
            if reason is None:
                found.append(name)
                if len(found) == count:
                    return found
            else:
                reasons[name] = reason
        waits = [name for name, reason in reasons.items() if reason == _IN_USE and not self._mine.leases[name]]
        if len(found) + len(waits) >= count and not +self._mine.leases:  # two that wait for each other wait for ever
            return None
        kept = ", ".join(f"{name!r} ({reason})" for name, reason in reasons.items()) or "none"
        raise StateError(
            f"{len(wanted)} adapters are asked for, and {count} more of the {self.max_resident} slots would be needed "
            f"than are free; what cannot be evicted: {kept}"
        )

    def _kept(self, name: str) -> str | None:
        """Return why a resident adapter cannot go, or None."""
        slot = self._at[name]
        if name in self._pinned:
            return "pinned"
        if slot in self._state.active:
            return "active"
        if self._leases[name] > 0:
            return _IN_USE
        if any(slot in layer.merged_names for layer in self._state.layers()):
            return "merged"
        if slot in self._state.training and any(tensor.requires_grad for tensor in self._slots.tensors(slot)):
            return "trainable"
        return "changed since it was copied in" if self._version(slot) != self._versions[name] else None

    def _version(self, slot: str) -> int:
        return sum(tensor._version for tensor in self._slots.tensors(slot))

    def _drop(self, name: str, changed: bool = False) -> None:
        reason = self._kept(name)
        if reason is not None and not (changed and reason.startswith("changed")):
            raise StateError(f"adapter {name!r} cannot leave its slot: it is {reason}")
        self._free.append(self._at.pop(name))
        self._versions.pop(name, None)

    def _fitted(self, name: str) -> Fitted:
        """Return an adapter ready to be copied, from memory where it is there."""
        source = self._known(name)
        ahead = self._host.get(name)
        if ahead is not None:
            try:
                source = ahead.result()
            except BaseException:
                self._host.pop(name, None)  # so that the next attempt reads the file again
                raise
            if not self._max_host:
                self._host.pop(name, None)
        elif self._max_host and isinstance(source, Folder):
            source = packed(*source.read(), self._pins_memory)
            self._host[name] = Future()
            self._host[name].set_result(source)
        if name in self._host:
            self._host.move_to_end(name)
            self._bound_host(self._max_host)
        return self._slots.fitted(name, *source.read())

    def close(self) -> None:
        """Take the slots out of the model, and stop reading ahead. The adapters that are active in them go too."""
        with self._changed:
            if self._readers is not None:
                self._readers.shutdown(wait=False, cancel_futures=True)
            self._state.residency = None
            remove_slots(self._model, [name for name in self._slots.names if name in self._state.records])
            self._sources.clear()
            self._at.clear()
            self._host.clear()

    def __repr__(self) -> str:
        return f"AdapterStore({len(self)} adapters registered, {len(self._at)} of {self.max_resident} slots taken)"


_IN_USE = "in use by a forward"


class _Mine(threading.local):
    """Leases of the running thread."""

    def __init__(self) -> None:
        self.leases: Counter[str] = Counter()


def _read_ahead(source: Folder, pinned: bool) -> Arena:
    return packed(*source.read(), pinned)
