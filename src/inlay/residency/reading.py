"""Adapters of files that are in this machine's memory: those that were used last, and those that are read ahead."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from inlay.residency.host import Arena, Folder, packed

__all__ = ["HostCache"]


class HostCache:
    """Adapters that were read from files, by name; the least recently used ones go first.

    Whoever calls a method holds the store's lock.

    Args:
        most: how many are kept after they were used.
        ahead: how many are kept that were read ahead of their use, where ``most`` is 0.
        pinned: whether to use page-locked memory.
    """

    def __init__(self, most: int, ahead: int, pinned: Callable[[], bool]) -> None:
        self._most = most
        self._ahead = ahead
        self._pinned = pinned
        self._readers: ThreadPoolExecutor | None = None
        self.reads: OrderedDict[str, Future[Arena]] = OrderedDict()
        """What is there or on its way, the last used at the end."""

    def prefetch(self, name: str, source: Folder) -> None:
        """Begin to read an adapter in another thread; what goes wrong there is raised by :meth:`get`."""
        if name not in self.reads:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(2, thread_name_prefix="inlay-prefetch")
            self.reads[name] = self._readers.submit(_read, source, self._pinned())
        self.reads.move_to_end(name)
        self._bound(self._most or self._ahead)

    def get(self, name: str, source: Folder | Arena) -> Folder | Arena:
        """Return where to take an adapter's tensors from now: memory where it is there or is to be kept there.

        Raises:
            what :meth:`Folder.read` raises.
        """
        read = self.reads.get(name)
        if read is not None:
            try:
                source = read.result()
            except BaseException:
                self.forget(name)  # so that the next attempt reads the file again
                raise
            if not self._most:
                self.forget(name)
        elif self._most and isinstance(source, Folder):
            source = _read(source, self._pinned())
            self.reads[name] = Future()
            self.reads[name].set_result(source)
        if name in self.reads:
            self.reads.move_to_end(name)
            self._bound(self._most)
        return source

    def _bound(self, most: int) -> None:
        while len(self.reads) > most:
            self.reads.popitem(last=False)[1].cancel()

    def forget(self, name: str) -> None:
        """Let an adapter go, if it is there."""
        self.reads.pop(name, None)

    def close(self) -> None:
        """Let all go, and stop reading ahead."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self.reads.clear()


def _read(source: Folder, pinned: bool) -> Arena:
    return packed(*source.read(), pinned)
