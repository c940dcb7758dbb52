"""Whether a server would serve a LoRA adapter, and rightly: the rules of ``serving_rules`` applied to a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from inlay.checkpoint.serving_conditions import Case
from inlay.checkpoint.serving_files import Base, ServedAdapter, read_adapter, read_base
from inlay.checkpoint.serving_rules import FINE, REFUSED, RULES, WRONG, Rule
from inlay.errors import ConfigError, did_you_mean

__all__ = ["FINE", "REFUSED", "SERVERS", "WRONG", "Finding", "base_of", "check", "judge", "problems", "rules_of"]

SERVERS = tuple(RULES)
UNSEEN = "not looked at, the base model's folder is not known"


@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: the rule's name.
        looks_at: what the server reads.
        severity: ``fine``, ``refused``, or ``wrong result`` where the server serves it and computes something else.
        found: what is in the adapter; empty if fine.
        says: what the server does about it; if fine, that nothing could be looked at, or empty.
        mend: what helps; empty if fine.
    """

    rule: str
    looks_at: str
    severity: str
    found: str = ""
    says: str = ""
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.says}: {self.found} ({self.mend})" if self.found else f"{self.rule}: {self.says or FINE}"


def check(
    folder: str | os.PathLike[str],
    server: str,
    *,
    base: str | os.PathLike[str] | None = None,
    max_lora_rank: int | None = None,
    version: str | None = None,
) -> list[Finding]:
    """Return what each rule of a server says about a local adapter folder; no model is built.

    Args:
        folder: the adapter folder.
        server: ``vllm``, ``sglang`` or ``llama.cpp``.
        base: folder of the base model, for the names and shapes of its layers; by default the folder that the adapter
            names, if there is one. Without it, rules that need the base see nothing wrong.
        max_lora_rank: the largest rank that the server is started with; by default its own default.
        version: the server's release; by default rules hold that any release in use may have.

    Raises:
        ConfigError: an unknown server, or a version that is none.
        CheckpointMissingError, CheckpointError: the adapter or the base cannot be read.
    """
    rules_of(server)
    adapter = read_adapter(folder)
    return judge(adapter, server, base=base_of(adapter, base), max_lora_rank=max_lora_rank, version=version)


def judge(
    adapter: ServedAdapter,
    server: str,
    *,
    base: Base | None = None,
    max_lora_rank: int | None = None,
    version: str | None = None,
) -> list[Finding]:
    """Return the same for an adapter that was read."""
    release = None if version is None else _release(version)
    case = Case(adapter, base, max_lora_rank)
    findings = []
    for rule in rules_of(server):
        over = rule.before is not None and release is not None and release >= _release(rule.before)
        found = None if over else rule.condition(case)
        if found is None:
            unseen = rule.needs_base and (base is None or not (base.files or base.config))
            findings.append(Finding(rule.name, rule.looks_at, FINE, says=UNSEEN if unseen else ""))
        else:
            findings.append(Finding(rule.name, rule.looks_at, rule.severity, found, rule.says, rule.mend))
    return findings


def problems(findings: list[Finding]) -> list[Finding]:
    """Return the findings that are not fine."""
    return [finding for finding in findings if finding.severity != FINE]


def rules_of(server: str) -> tuple[Rule, ...]:
    """Return a server's rules.

    Raises:
        ConfigError: there is none of that name.
    """
    if server not in RULES:
        raise ConfigError(
            f"server: expected one of {', '.join(SERVERS)}, found {server!r}.{did_you_mean(server.lower(), SERVERS)}"
        )
    return RULES[server]


def base_of(adapter: ServedAdapter, folder: str | os.PathLike[str] | None) -> Base | None:
    """Return the base model's files: those asked for, or those in the folder that the adapter names."""
    if folder is not None:
        return read_base(folder)
    named = adapter.config.get("base_model_name_or_path")
    if isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        return read_base(named)
    return None


def _release(version: str) -> tuple[int, ...]:
    parts = version.lstrip("v").split(".")
    numbers = [part for part in parts if part.isdigit()]
    if len(numbers) < 2 or not parts[0].isdigit():
        raise ConfigError(f"version: expected a release such as 0.32.0, found {version!r}")
    return tuple(int(number) for number in numbers[:3])
