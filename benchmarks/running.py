"""Running rows: each in a process forked from one that has imported everything, so that none disturbs another."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from typing import Any

from benchmarks.harness import Row, Run

SECONDS_A_ROW = 240  # a row that takes longer is broken; the others still run


def import_everything(run: Run, threads: int) -> None:
    """Import what rows import, once, and leave it out of every later garbage collection."""
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # loaded before a row's process is forked, so that no row pays for it
    import transformers.models.llama.modeling_llama  # noqa: F401

    for library in run.libraries().values():
        for name in getattr(library, "__all__", ()):  # what is loaded lazily
            getattr(library, name, None)
    gc.collect()
    gc.freeze()


def measure(row: Row, run: Run) -> dict[str, Any]:
    """``{"figures": ..., "parameters": ...}``, or ``{"failed": why}``; never raises."""
    parameters = row.parameters(run.quick)
    try:
        figures = row.measure(run, **parameters)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:100], "parameters": parameters}
    return {
        "figures": {name: figure.asdict() for name, figure in figures.items()},
        "parameters": parameters,
    }


def measure_apart(row: Row, run: Run) -> dict[str, Any]:
    """``measure`` in a forked process, killed after ``SECONDS_A_ROW``, and the ``seconds`` of CPU that it took.

    Where there is no fork it runs in this process.
    """
    if not hasattr(os, "fork"):
        return measure(row, run)
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", encoding="utf-8") as answer:
            json.dump(measure(row, run), answer)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads that torch started must not be waited for
    os.close(writing)
    text = _read(reading, child)
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if text:
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {**json.loads(text), "seconds": round(spent, 1)}
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return {"failed": f"took more than {SECONDS_A_ROW} s"}
    return {"failed": f"the process ended with {signal.Signals(-code).name if code < 0 else code}"}


def _read(source: int, child: int) -> str:
    end = time.monotonic() + SECONDS_A_ROW
    parts = []
    with os.fdopen(source, "rb", buffering=0) as answer:
        while True:
            ready, _, _ = select.select([answer], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGALRM)
                return ""
            part = answer.read(1 << 16)
            if not part:
                return b"".join(parts).decode("utf-8")
            parts.append(part)
