"""A pytest plugin: PEFT's own tests without a network, with PEFT or with Inlay behind ``import peft``.

Loaded by ``run.py`` with ``-p offline``. The environment says which library answers and where results go:
``PEFT_SUITE_SIDE`` (``peft`` or ``inlay``), ``PEFT_SUITE_RESULTS`` (a file of JSON lines) and ``PEFT_SUITE_NEEDS`` (the
methods and features that a test may need to be run, separated by commas; empty: run every test).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from needs import needs_of

SIDE = os.environ["PEFT_SUITE_SIDE"]
_HUB = Path(os.environ["HF_HUB_CACHE"])
if SIDE == "inlay":
    import inlay

    inlay.install_as_peft(force=True)  # before anything looks for peft


class _Unbuilt:
    """What stands in lists of parameters for the config of a method that is not built; no test that uses it runs."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


@contextmanager
def _constructible() -> Iterator[None]:
    """Let modules of tests that name methods which are not built be imported."""
    if SIDE != "inlay":
        yield
        return
    from inlay.compat.unavailable import Unavailable

    refusing = Unavailable.__call__

    def construct(cls: Any, *args: Any, **options: Any) -> Any:
        return type(cls.__name__, (_Unbuilt,), {"__module__": cls.__module__})(**options)

    Unavailable.__call__ = construct
    try:
        yield
    finally:
        Unavailable.__call__ = refusing


class _AllVisited(dict[str, int]):
    """PEFT's record of what was fetched from the hub: everything, so that nothing asks the network again."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def _quotes() -> Any:
    from datasets import Dataset, DatasetDict

    rows = {
        "quote": [f"Quote {number}: be yourself; everyone else is already taken." for number in range(64)],
        "author": [f"Author {number % 7}" for number in range(64)],
        "tags": [["be-yourself", "honesty"]] * 64,
    }
    return DatasetDict({"train": Dataset.from_dict(rows)})


def _cats() -> Any:
    from PIL import Image

    picture = Image.new("RGB", (64, 48))
    picture.putdata(
        [(row * 5 % 256, column * 4 % 256, (row * column) % 256) for row in range(48) for column in range(64)]
    )
    return {"test": {"image": [picture]}}


_DATASETS = {
    "ybelkada/english_quotes_copy": _quotes,
    "Abirate/english_quotes": _quotes,
    "huggingface/cats-image": _cats,
}


def _fill_other_caches() -> None:
    """Let downloads into a cache folder of the caller's come from the stand-in hub."""
    import huggingface_hub as hub
    import huggingface_hub.constants

    def filling(download: Any) -> Any:
        @functools.wraps(download)
        def wrapper(repo_id: str, *args: Any, cache_dir: Any = None, **kwargs: Any) -> Any:
            own = Path(hub.constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
            name = "models--" + repo_id.replace("/", "--")
            if (_HUB / name).is_dir() and not (own / name).exists():
                shutil.copytree(_HUB / name, own / name)
            try:
                return download(repo_id, *args, cache_dir=cache_dir, **kwargs)
            except hub.errors.OfflineModeIsEnabled:
                return download(repo_id, *args, cache_dir=cache_dir, local_files_only=True, **kwargs)

        return wrapper

    def file_exists(repo_id: str, filename: str, *, revision: str | None = None, **kwargs: Any) -> bool:
        return isinstance(hub.try_to_load_from_cache(repo_id, filename, revision=revision), str)

    hub.file_exists = file_exists
    os.environ.pop("HF_HUB_OFFLINE", None)  # the hub's client has read it; PEFT would not look for files at all
    for name, home in (("hf_hub_download", "file_download"), ("snapshot_download", "_snapshot_download")):
        wrapped = filling(getattr(hub, name))
        setattr(hub, name, wrapped)
        setattr(importlib.import_module(f"huggingface_hub.{home}"), name, wrapped)


def _stub_datasets() -> None:
    import datasets

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if path not in _DATASETS:
            pytest.skip(f"the data set {path} is not here")
        found = _DATASETS[path]()
        return found[kwargs["split"]] if "split" in kwargs else found

    datasets.load_dataset = load_dataset


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.rootpath))
    _fill_other_caches()
    _stub_datasets()
    import tests.testing_utils

    tests.testing_utils._HUB_MODEL_ACCESSES = _AllVisited()
    if SIDE == "inlay":
        import peft
        import wording

        wording.listen()
        config.pluginmanager.register(wording)
        assert peft.__name__ == "inlay.compat.peft", peft


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    with _constructible():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    allowed = {word for word in os.environ.get("PEFT_SUITE_NEEDS", "").split(",") if word}
    kept, dropped = [], []
    for item in items:
        needs = needs_of(item)
        item.user_properties.append(("needs", needs))
        (kept if not allowed or allowed.issuperset(needs) else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


_WORST = {"passed": 0, "skipped": 1, "xfailed": 1, "failed": 2}
_offline = re.compile(r"LocalEntryNotFoundError|OfflineModeIsEnabled|offline mode|ConnectionError|couldn't connect to")


class _Recorder:
    """Writes one line per test: its worst phase, and the end of what it said."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        entry = self._found.setdefault(
            report.nodeid, {"id": report.nodeid, "outcome": "passed", "needs": [], "message": "", "seconds": 0.0}
        )
        entry["seconds"] += report.duration
        properties = dict(report.user_properties)
        entry["needs"] = properties.get("needs", entry["needs"])
        if "wording" in properties:
            entry["wording"] = True
        if _WORST[outcome] > _WORST[entry["outcome"]]:
            text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext)
            entry["outcome"], entry["message"] = outcome, text[-3000:]
            if outcome == "failed" and _offline.search(text):
                entry["offline"] = True
        if report.when == "teardown":
            print(json.dumps(self._found.pop(report.nodeid)), file=self._file, flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            line = {"id": report.nodeid, "outcome": "failed", "needs": [], "message": report.longreprtext[-3000:]}
            print(json.dumps(line), file=self._file, flush=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # under xdist the controller sees every report
        session.config.pluginmanager.register(_Recorder(Path(os.environ["PEFT_SUITE_RESULTS"])))
