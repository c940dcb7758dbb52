"""Inlay measured: over the floor, and beside peft. Run on an idle machine.

    python -m benchmarks all --against peft           every row; about a quarter of an hour
    python -m benchmarks all --against peft --quick   smaller models and fewer rounds; under three minutes
    python -m benchmarks injecting merging            some scripts; `python -m benchmarks.injecting` is the same for one
    python -m benchmarks learning [--save]            whether each method learns; six minutes, apart from the others
    python -m benchmarks report                       docs/performance.md with its plot, docs/learning.md

A figure is the median of several ratios of process CPU time, measured in alternation in one process with one thread.
The floor is what any adapter library has to do; each row says what that is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import catalogue
from benchmarks.harness import Run


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, report, or names of scripts")
    parser.add_argument("--against", choices=["peft"], help="measure peft too")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds, and no slow rows")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json and the report")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads, 1 by default")
    parser.add_argument("--row", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the rows with gate and goal and measure nothing")
    chosen = parser.parse_intermixed_args(given)
    unknown = sorted(set(chosen.names) - {"all", "report", *catalogue.scripts()})
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: all, {', '.join(catalogue.scripts())}")
    if not chosen.names and not chosen.list:
        parser.error(f"name what to run: all, or some of {', '.join(catalogue.scripts())}")
    return chosen


def main(given: Sequence[str]) -> int:
    if given[:1] == ["learning"]:
        from benchmarks import learning

        return learning.main(given[1:])
    chosen = arguments(given)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(chosen.threads)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler that counts bytes warns of what came before it
    every = "all" in chosen.names or not chosen.names
    names = catalogue.scripts() if every else [name for name in chosen.names if name != "report"]
    if chosen.list:
        from benchmarks.table import show

        show((row, {}, None) for name in names for row in catalogue.rows(name))
        return 0
    failed = run(names, chosen) if set(chosen.names) != {"report"} else 0
    if "report" in chosen.names or chosen.save:
        from benchmarks.report import write

        write()
    return failed


def run(names: Sequence[str], chosen: argparse.Namespace) -> int:
    """Measure the rows of the scripts; print the table. 1 where a row failed, else 0."""
    from benchmarks.machine import environment
    from benchmarks.running import import_everything, measure_apart
    from benchmarks.table import show

    how = Run(quick=chosen.quick, against_peft=chosen.against == "peft")
    where = environment(chosen.threads)
    start = time.monotonic()
    import_everything(how, chosen.threads)
    measured = []
    for name in names:
        result: dict[str, Any] = {"environment": where, "quick": how.quick, "against_peft": how.against_peft}
        result["rows"] = dict(catalogue.read_result(name).get("rows", {})) if chosen.row else {}
        for row in catalogue.rows(name):
            if chosen.row not in row.name or (how.quick and not row.in_quick):
                continue
            print(f"{time.monotonic() - start:5.0f} s  {name}: {row.name}", end="", file=sys.stderr, flush=True)
            result["rows"][row.name] = entry = measure_apart(row, how)
            print(f"  ({entry.get('seconds', '-')} s of CPU)", file=sys.stderr, flush=True)
            measured.append((row, catalogue.figures_of(result, row), entry.get("failed")))
            if chosen.save:
                catalogue.write_result(name, result)
    show(measured)
    if how.quick:
        print("Gates and goals are for the sizes of a full run; fixed costs weigh more here.", file=sys.stderr)
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    return int(any(failed for _, _, failed in measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
