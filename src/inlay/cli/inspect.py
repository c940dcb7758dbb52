"""``inlay inspect``: what an adapter is and whether it is sound, from its files alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from inlay.checkpoint.serving import Finding
    from inlay.cli.inspection import AdapterReport

BROKEN = 1


def command(
    path: Annotated[Path, typer.Argument(help="Adapter folder, or a .safetensors or .bin file")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
    server: Annotated[
        str | None, typer.Option("--for", help="Hold the folder against a server's rules: vllm, sglang or llama.cpp")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, with --for; default: the one the adapter names")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="What the server is started with; default: its own default")
    ] = None,
    server_version: Annotated[
        str | None, typer.Option(help="The server's release, with --for; default: rules of every release in use")
    ] = None,
) -> None:
    """Show method, base, sites, ranks and update norms of an adapter; no base model is needed.

    Exit code 1 means that tensors hold NaN or infinity or that a tensor's counterpart is missing; with --for, that
    the server would refuse the adapter or compute something else than was trained.
    """
    if server is not None:
        _serving(path, server, as_json, base, max_lora_rank, server_version)
        return
    for name, given in (("base", base), ("max-lora-rank", max_lora_rank), ("server-version", server_version)):
        if given is not None:
            raise ConfigError(f"--{name}: expected with --for SERVER, found without it")
    from inlay.cli.inspection import inspect_adapter

    report = inspect_adapter(path)
    if as_json:
        print(json.dumps(_finite(dataclasses.asdict(report)), indent=2))
    else:
        _show(report)
    if report.broken:
        raise typer.Exit(BROKEN)


def _serving(
    path: Path, server: str, as_json: bool, base: Path | None, max_lora_rank: int | None, version: str | None
) -> None:
    from inlay.checkpoint.serving import check, problems

    findings = check(path, server, base=base, max_lora_rank=max_lora_rank, version=version)
    wrong = problems(findings)
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"path": str(path), "for": server, "served": not wrong, "findings": listed}, indent=2))
    else:
        _show_findings(path, server, findings, wrong)
    if wrong:
        raise typer.Exit(BROKEN)


def _show_findings(path: Path, server: str, findings: list[Finding], wrong: list[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    verdict = f"[red]{len(wrong)} in the way[/]" if wrong else "[green]every rule is kept[/]"
    console.print(f"{path} for {server}: {verdict}", soft_wrap=True)
    if console.is_terminal:
        console.print(_finding_table(findings))
        return
    for finding in findings:  # one line each, for whoever greps
        console.print(f"{finding.severity}: {finding.rule}: {finding.looks_at}", soft_wrap=True, markup=False, end="")
        if finding in wrong:
            details = f": {finding.found}; {finding.says}. Remedy: {finding.mend}"
        else:
            details = f" ({finding.says})" if finding.says else ""
        console.print(details, soft_wrap=True, markup=False)


def _finding_table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("", "rule", "found", "what the server does", "remedy"):
        table.add_column(title, overflow="fold")
    styles = {"fine": "green", "refused": "red", "wrong result": "bold red"}
    for finding in findings:
        cells = (finding.rule, finding.found or finding.looks_at, finding.says, finding.mend)
        table.add_row(Text(finding.severity, styles[finding.severity]), *map(Text, cells))
    return table


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
