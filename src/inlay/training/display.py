"""How a run shows its progress: a live bar on a terminal, lines for logs, or nothing."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


class Display(Protocol):
    """Receives what happens in a run; called by the first process only."""

    def note(self, text: str) -> None: ...

    def begin(self, step: int, last: int) -> None: ...

    def step(self, step: int) -> None: ...

    def log(self, entry: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


class Quiet:
    """Shows nothing; errors still reach stderr."""

    def note(self, text: str) -> None:
        return

    def begin(self, step: int, last: int) -> None:
        return

    def step(self, step: int) -> None:
        return

    def log(self, entry: dict[str, Any]) -> None:
        return

    def end(self) -> None:
        return


class Plain(Quiet):
    """One line per event on stdout, without colour or cursor movement."""

    def __init__(self) -> None:
        self._last = 0

    def note(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, step: int, last: int) -> None:
        self._last = last
        print(f"training from step {step} to {last}", flush=True)

    def log(self, entry: dict[str, Any]) -> None:
        print(f"step {entry['step']}/{self._last}  {_line(entry)}", flush=True)


class Live(Quiet):
    """A progress bar with loss, tokens per second and time left; evaluations stay above it as lines."""

    def __init__(self, console: Console | None = None) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]
        self.console = console or Console()
        self._progress = Progress(*columns, console=self.console)
        self._task: Any = None

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def begin(self, step: int, last: int) -> None:
        self._task = self._progress.add_task("training", total=last, completed=step, figures="")
        self._progress.start()

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self._progress.update(
                self._task, figures=f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:,.0f} tok/s"
            )
        else:
            self._progress.console.print(f"step {entry['step']}: {_line(entry)}", highlight=False)

    def end(self) -> None:
        self._progress.stop()


def _line(entry: dict[str, Any]) -> str:
    shown = {name: value for name, value in entry.items() if name not in ("step", "tokens", "seconds")}
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def choose(quiet: bool, plain: bool) -> Display:
    """Return the display for these flags; lines where stdout is no terminal."""
    if quiet:
        return Quiet()
    console = Console()
    return Plain() if plain or not console.is_terminal else Live(console)
