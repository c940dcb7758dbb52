"""Tests of other libraries on Inlay, in an environment without peft; see ``peftless``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from peftless import HERE, INSIDE, Outcome, reason_to_skip, run_file, source_of


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Stay out of runs of the whole suite where peft is installed; say why where this folder was asked for."""
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(HERE) for arg in config.args)
    return True if not asked and reason_to_skip() is not None else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Find ``check_*.py``."""
    if INSIDE in os.environ or file_path.suffix != ".py" or not file_path.name.startswith("check_"):
        return None
    return CheckFile.from_parent(parent, path=file_path)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    """Let the process that runs a file's tests import it, and no other, also where the file is named outright."""
    if INSIDE not in os.environ and module_path.name.startswith("check_"):
        return Nothing.from_parent(parent, path=module_path)
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prove that peft is Inlay here before anything is tested."""
    if INSIDE in os.environ:
        found, own = import_module("peft"), import_module("inlay.compat.peft")
        assert reason_to_skip() is None
        assert found is own, found
        assert sys.modules["peft"] is own


class Nothing(pytest.Module):
    """Stands for a file whose tests are found as a :class:`CheckFile`."""

    def collect(self) -> Iterator[Any]:
        return iter(())


class CheckFile(pytest.File):
    """A file whose tests run together in another process."""

    _done: dict[str, list[Outcome]] | None = None

    def collect(self) -> Iterator[pytest.Item]:
        names, self.way = source_of(self.path)
        for name, line in names:
            item = Check.from_parent(self, name=name)
            item.line = line
            yield item

    def outcomes(self) -> dict[str, list[Outcome]]:
        """Run the tests that this session selected, once."""
        if self._done is None:
            mine = [item.name for item in self.session.items if item.parent is self]
            self._done = run_file(self.path, mine, self.way)
        return self._done


class Check(pytest.Item):
    """One test of a file that runs in another process."""

    line: int

    def runtest(self) -> None:
        reason = reason_to_skip()
        if reason is not None:
            pytest.skip(reason)
        parent = self.parent
        assert isinstance(parent, CheckFile)
        outcomes = parent.outcomes()[self.name]
        failed = [one.words for one in outcomes if one.status == "failed"]
        if failed:
            raise Failed("\n".join(failed))
        if all(one.status == "skipped" for one in outcomes):
            pytest.skip(outcomes[0].words)
        self.user_properties.append(("seconds", sum(one.seconds for one in outcomes)))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, Failed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line - 1, self.name


class Failed(Exception):
    """A test failed in its own process."""
