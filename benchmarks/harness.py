"""What a benchmark script is made of: rows with a gate and a goal, and time measured in alternation.

A script holds one or more rows. A row is a function that measures and returns figures; what it must reach is data::

    from benchmarks.harness import Figures, Run, at_least, at_most, row, standalone

    @row(
        "inject LoRA r16, 560 modules",
        what="get_peft_model on a Llama of 80 layers, all linear layers",
        floor="constructing two nn.Linear for each module",
        targets=(
            at_least(15, of="peft / inlay"),
            at_most(1.0, goal=0.7, of="inlay / floor", reason="why the goal is missed, shown only where it is"),
        ),
        full={"layers": 80},
        quick={"layers": 20},
    )
    def inject(run: Run, layers: int) -> Figures:
        actions = {"floor": lambda: construct(layers)}
        for name, library in run.libraries().items():  # "inlay", and "peft" where --against peft was given
            config = library.LoraConfig(r=16, target_modules="all-linear")
            actions[name] = (
                lambda: llama(layers, 64, 128),  # made anew for each round, outside the time
                lambda model, library=library, config=config: library.get_peft_model(model, config),
            )
        return run.alternate(actions).figures("inlay / floor", "peft / inlay", "peft / floor")

    if __name__ == "__main__":
        standalone(__spec__.name)

The names of figures are free, those of row functions too; the name of a row is unique. ``"a / b"`` means the time of
action a over that of action b, the median over the rounds. A figure that is no ratio of times (bytes, a count, an
error) is made with ``Figure(value, unit=...)`` and merged into the dict. ``benchmarks.memory`` counts bytes,
``benchmarks.models`` builds models, ``fresh_process`` runs code where nothing has been imported yet.

Import peft and transformers inside functions only, so that listing the rows stays quick.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Action = Callable[[], object] | tuple[Callable[[], Any], Callable[[Any], object]]


@dataclass(frozen=True)
class Figure:
    """A measured number, and the least and largest of the rounds where there were several.

    Units: ``x`` a ratio, ``s`` seconds of CPU, ``B`` bytes, ``rel`` a relative error, ``""`` a count.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = "x"

    def asdict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Target:
    """What one figure of a row must reach (``gate``) and what it reaches for (``goal``); either may be absent."""

    of: str
    gate: float | None
    goal: float | None
    least: bool  # whether the figure has to be at least so large; otherwise at most
    reason: str = ""  # why the goal is missed; shown only where it is
    unit: str = ""  # of gate and goal, where the name does not say that it is a ratio

    def met(self, bound: float | None, value: float) -> bool:
        if bound is None:
            return True
        return value >= bound if self.least else value <= bound

    def verdict(self, value: float | None) -> str:
        """``goal``, ``gate`` or ``missed``; ``-`` where the figure is not there, nothing where none is asked."""
        if self.gate is None and self.goal is None:
            return ""
        if value is None:
            return "-"
        if not self.met(self.gate, value):
            return "missed"
        if self.goal is None:
            return "gate"
        if self.met(self.goal, value):
            return "goal"
        return "missed" if self.gate is None else "gate"


def at_most(
    gate: float | None, goal: float | None = None, *, of: str = "inlay / floor", reason: str = "", unit: str = ""
) -> Target:
    """The figure ``of`` is at most ``gate``, better still at most ``goal``."""
    return Target(of, gate, goal, False, reason, unit or ("x" if " / " in of else ""))


def at_least(
    gate: float | None, goal: float | None = None, *, of: str = "peft / inlay", reason: str = "", unit: str = ""
) -> Target:
    """The figure ``of`` is at least ``gate``, better still at least ``goal``."""
    return Target(of, gate, goal, True, reason, unit or ("x" if " / " in of else ""))


@dataclass(frozen=True)
class Row:
    """One line of the table; made by ``row``."""

    name: str
    what: str  # what is measured and on what
    targets: tuple[Target, ...]
    measure: Callable[..., Figures]
    floor: str = ""  # what the action "floor" does
    full: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of `measure`
    quick: Mapping[str, Any] = field(default_factory=dict)  # those that differ with --quick

    slow: bool = False  # left out with --quick

    @property
    def in_quick(self) -> bool:
        """Whether the row runs with --quick too: it is not slow, and has a gate or a goal."""
        bounded = any(target.gate is not None or target.goal is not None for target in self.targets)
        return bounded and not self.slow

    def parameters(self, quick: bool) -> dict[str, Any]:
        return {**self.full, **(self.quick if quick else {})}


def row(
    name: str,
    *,
    what: str,
    targets: tuple[Target, ...],
    floor: str = "",
    full: Mapping[str, Any] | None = None,
    quick: Mapping[str, Any] | None = None,
    slow: bool = False,
) -> Callable[[Callable[..., Figures]], Row]:
    """Make a row of the function that measures it: ``measure(run, **parameters) -> Figures``.

    ``full`` are its parameters, ``quick`` those that differ with ``--quick``, where rows that are ``slow`` do not run.
    """

    def make(measure: Callable[..., Figures]) -> Row:
        return Row(name, what, targets, measure, floor, full or {}, quick or {}, slow)

    return make


@dataclass(frozen=True)
class Timings:
    """Seconds of CPU for one call of each action, one entry a round."""

    seconds: dict[str, list[float]]

    def over(self, name: str, base: str) -> Figure:
        """The time of ``name`` as a multiple of that of ``base`` in the same round."""
        ratios = [one / other for one, other in zip(self.seconds[name], self.seconds[base], strict=True)]
        return Figure(statistics.median(ratios), min(ratios), max(ratios))

    def median(self, name: str) -> Figure:
        values = self.seconds[name]
        return Figure(statistics.median(values), min(values), max(values), "s")

    def figures(self, *ratios: str) -> Figures:
        """The named ratios (``"inlay / floor"``) and the seconds of each action.

        A ratio of an action that did not run (peft's, without ``--against peft``) is left out.
        """
        found = {}
        for ratio in ratios:
            name, slash, base = ratio.partition(" / ")
            if not slash:
                raise ValueError(f"{ratio!r} is no ratio: expected 'action / action'")
            if name in self.seconds and base in self.seconds:
                found[ratio] = self.over(name, base)
            elif not any(part not in self.seconds and part.startswith("peft") for part in (name, base)):
                raise KeyError(f"{ratio!r} names an action that is not there; there are: {', '.join(self.seconds)}")
        return {**found, **{name: self.median(name) for name in self.seconds}}


@dataclass(frozen=True)
class Run:
    """How this run measures: with peft or alone, quickly or in full."""

    quick: bool = False
    against_peft: bool = True

    def libraries(self) -> dict[str, Any]:
        """``{"inlay": the module, "peft": the module}``, the second only where peft is measured too."""
        import inlay

        if not self.against_peft:
            return {"inlay": inlay}
        import peft

        return {"inlay": inlay, "peft": peft}

    def alternate(self, actions: Mapping[str, Action], rounds: int | None = None, repeat: int = 1) -> Timings:
        """Time the actions in turn, so that a slow moment of the machine hits them all.

        Args:
            actions: name to a function, or to a pair (prepare, function): what ``prepare()`` returns is handed to the
                function, and only the function is timed.
            rounds: how many times round, after one round that warms up; 9 by default, 3 with ``--quick``.
            repeat: calls that are timed together, for actions of less than a millisecond; each is prepared anew only
                where it has a ``prepare`` and ``repeat`` is 1.
        """
        rounds = (3 if self.quick else 9) if rounds is None else rounds
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for turn in range(rounds + 1):
            for name, action in actions.items():
                spent = cpu_seconds(action, repeat)
                if turn:
                    seconds[name].append(spent)
        return Timings(seconds)


def cpu_seconds(action: Action, repeat: int = 1) -> float:
    """Seconds of CPU of this process for one call, without the garbage collector."""
    if isinstance(action, tuple):
        prepare, act = action
        given = prepare()

        def call() -> object:
            return act(given)
    else:
        call = action
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        for _ in range(repeat):
            kept = call()  # freeing the last result is not part of the time
        spent = time.process_time() - start
    finally:
        gc.enable()
    del kept
    return spent / repeat


def fresh_process(code: str, *arguments: str) -> Any:
    """Run Python code in a process of its own and return the JSON that it prints as its last line."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def standalone(module: str) -> None:
    """``python -m benchmarks.NAME``: run the rows of one script, with the options of ``python -m benchmarks``."""
    from benchmarks.__main__ import main

    sys.exit(main([module.rpartition(".")[2], *sys.argv[1:]]))
