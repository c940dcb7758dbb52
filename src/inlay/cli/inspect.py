"""``inlay inspect``: what an adapter is and whether it is sound, from its files alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from inlay.cli.inspection import AdapterReport

BROKEN = 1


def command(
    path: Annotated[Path, typer.Argument(help="Adapter folder, or a .safetensors or .bin file")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Show method, base, sites, ranks and update norms of an adapter; no base model is needed.

    Exit code 1 means that tensors hold NaN or infinity or that a tensor's counterpart is missing.
    """
    from inlay.cli.inspection import inspect_adapter

    report = inspect_adapter(path)
    if as_json:
        print(json.dumps(_finite(dataclasses.asdict(report)), indent=2))
    else:
        _show(report)
    if report.broken:
        raise typer.Exit(BROKEN)


def _finite(value: Any) -> Any:
    """NaN and infinity have no spelling in JSON: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or value - value == 0.0 else str(value)


def _show(report: AdapterReport) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{report.method or 'unknown method'}[/] adapter in {report.path}", soft_wrap=True)
    console.print(
        f"base model: {report.base_model or 'not named'}    task: {report.task_type or 'none'}", soft_wrap=True
    )
    if report.settings:
        console.print("    ".join(f"{name}: {value}" for name, value in report.settings.items()), soft_wrap=True)
    console.print(f"{report.parameters:,} parameters, {report.file_bytes:,} bytes, {len(report.sites)} sites")
    if report.sites:
        console.print(_site_table(report))
    for title, entries in (("shared tensors", report.shared), ("trained whole", report.saved)):
        for entry in entries:
            console.print(f"{title}: {entry.name} {entry.shape} {entry.dtype}, norm {entry.norm:.4g}", soft_wrap=True)
    dead = [site.module for site in report.sites if site.dead]
    if dead:
        names = ", ".join(dead[:5]) + (", ..." if len(dead) > 5 else "")
        console.print(f"[yellow]{len(dead)} of {len(report.sites)} sites change nothing: {names}[/]", soft_wrap=True)
    for entry in report.non_finite:
        console.print(
            f"[red]not finite: {entry.name}, {entry.non_finite:,} of its values are NaN or infinite[/]", soft_wrap=True
        )
    for name in report.incomplete:
        console.print(f"[red]missing: {name}, its counterpart is there[/]", soft_wrap=True)
    if not report.broken:
        console.print("every tensor is finite")


def _site_table(report: AdapterReport) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    for title in ("rank", "parameters", "norm"):
        table.add_column(title, justify="right")
    table.add_column("of the")
    for site in report.sites:
        rank = "" if site.rank is None else str(site.rank)
        style = "yellow" if site.dead else ""
        table.add_row(site.module, rank, f"{site.parameters:,}", f"{site.size:.4g}", site.measure, style=style)
    return table
