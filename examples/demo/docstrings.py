"""The demo's text: docstrings of Python's own library, labelled by what their module is about.

Whole modules are held out. A docstring mentions its class, its arguments and its neighbours, so texts of one module on
both sides would let a model recognise the module instead of the topic.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# topic -> (modules to learn from, modules held out); a Python without one of them goes without its texts
TOPICS: dict[str, tuple[str, str]] = {
    "network": (
        "http.client http.server http.cookiejar ftplib imaplib smtplib socketserver urllib.request ssl ipaddress "
        "xmlrpc.server nntplib telnetlib wsgiref.handlers wsgiref.headers",
        "socket poplib urllib.parse xmlrpc.client http.cookies urllib.robotparser webbrowser wsgiref.simple_server",
    ),
    "concurrency": (
        "asyncio.events asyncio.base_events asyncio.locks asyncio.tasks asyncio.transports asyncio.protocols "
        "asyncio.unix_events threading multiprocessing.managers multiprocessing.context multiprocessing.connection "
        "multiprocessing.shared_memory concurrent.futures.thread concurrent.futures.process sched",
        "asyncio.futures asyncio.queues asyncio.streams asyncio.timeouts asyncio.runners concurrent.futures._base "
        "multiprocessing.pool multiprocessing.process queue asyncio.subprocess",
    ),
    "mathematics": (
        "math cmath decimal numbers array",
        "statistics random fractions",
    ),
    "files": (
        "os posix shutil tarfile zipfile tempfile posixpath ntpath genericpath fileinput gzip bz2 lzma stat",
        "pathlib mmap glob fnmatch filecmp zipimport linecache",
    ),
    "testing": (
        "unittest.case unittest.mock unittest.result unittest.suite pdb bdb cProfile profile pstats tracemalloc "
        "faulthandler",
        "doctest unittest.loader unittest.util unittest.runner unittest.async_case trace traceback timeit code",
    ),
    "text": (
        "re difflib codecs textwrap email.message email.header email.charset html.parser xml.sax.xmlreader "
        "xml.sax.handler xml.etree.ElementTree configparser locale csv",
        "string html shlex unicodedata json.decoder json.encoder json email.utils email.quoprimime xml.dom.minidom "
        "quopri base64 binascii pprint gettext stringprep",
    ),
}
SHORTEST = 25  # characters: below it a docstring says "Return a copy."


@dataclass(frozen=True)
class Text:
    text: str
    label: str
    module: str


SAME = 0.8  # share of common words from which two texts count as the same


def collect() -> tuple[list[Text], list[Text]]:
    """Return (training texts, held-out texts).

    No module is on both sides, and no training text has nearly the words of a held-out one.
    """
    held = _side(1)
    kept_out = [_words(entry.text) for entry in held]
    train = []
    for entry in _side(0):
        words = _words(entry.text)
        if not any(_alike(words, other) for other in kept_out):
            train.append(entry)
    return train, held


def _side(side: int) -> list[Text]:
    texts: dict[str, Text] = {}
    for topic, modules in TOPICS.items():
        for name in modules[side].split():
            for text in _docstrings(name):
                texts.setdefault(text, Text(text, topic, name))
    return list(texts.values())


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    if min(len(one), len(other)) < SAME * max(len(one), len(other)):
        return False  # too different in size to share that much: spares most intersections
    return len(one & other) >= SAME * len(one | other)


def write(texts: list[Text], path: Path) -> None:
    """Write JSONL with ``text``, ``label`` and ``module``."""
    lines = [json.dumps({"text": t.text, "label": t.label, "module": t.module}) for t in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _docstrings(name: str) -> list[str]:
    """Return the docstrings of what ``name`` defines itself: functions, classes and their public methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
    except ImportError:
        return []
    found: list[str] = []
    for key, value in vars(module).items():
        if key.startswith("__") or not _is_home(value, module):
            continue
        found += _text_of(value)
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if not attribute.startswith("__"):
                    found += _text_of(getattr(member, "__func__", member))
    return found


def _is_home(value: Any, module: ModuleType) -> bool:
    documented = inspect.isclass(value) or inspect.isroutine(value)
    return documented and getattr(value, "__module__", None) in (module.__name__, None)


def _text_of(value: Any) -> list[str]:
    documented = inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, property)
    text = inspect.cleandoc(value.__doc__) if documented and isinstance(value.__doc__, str) else ""
    return [text] if len(text) >= SHORTEST else []
