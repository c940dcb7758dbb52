"""``inlay train``: flags and a YAML file become one run."""

from __future__ import annotations

import inspect
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import NODEFAULT, Meta

from inlay.training.settings import FIELDS, RunConfig, build, parse_assignments, read_yaml

LISTS = ("--data", "--eval-data", "--target", "--set")


def resolve(flags: dict[str, Any], config_file: Path | None, resume: bool) -> RunConfig:
    """Return the settings of a run: the file's, overridden by the flags that were given.

    A resumed run that names only its output folder takes the settings stored there.

    Raises:
        InlayError: see :func:`inlay.training.settings.build`.
    """
    values: dict[str, Any] = {}
    origin = "command line"
    if config_file is not None:
        values = read_yaml(config_file)
        origin = f"{config_file} and command line" if any(v is not None for v in flags.values()) else str(config_file)
    elif resume and flags.get("output") is not None:
        from inlay.training.output import stored_settings

        values = stored_settings(Path(flags["output"]))
    for name, value in flags.items():
        if value is None:
            continue
        if name == "set":
            value = {**(values.get("set") or {}), **parse_assignments(value, "--set")}
        values[name] = value
    return build(values, origin)


def _train(config: Path | None, resume: bool, quiet: bool, plain: bool, **flags: Any) -> None:
    """Train an adapter: text or JSONL in, adapter folder out.

    Settings come from --config run.yaml and from flags; flags win. A run that was killed goes on
    with --resume --output FOLDER and ends in the same bits as one that was not.
    """
    settings = resolve(flags, config, resume)
    from inlay.training.display import choose
    from inlay.training.run import train

    # under torchrun every process runs this; one of them speaks
    display = choose(quiet or os.environ.get("RANK", "0") != "0", plain)
    outcome = train(settings, display, resume=resume)
    for name, value in outcome.last.items():
        if name.startswith("eval_"):
            before = f"{outcome.first[name]:.4g} -> " if name in outcome.first else ""
            display.note(f"held-out {name.removeprefix('eval_')}: {before}{value:.4g}")
    display.note(
        f"saved {outcome.folder}: {outcome.trainable:,} trained parameters, {outcome.adapter_bytes:,} bytes, "
        f"{outcome.steps:,} steps"
    )


def _flag(name: str) -> inspect.Parameter:
    """Return the command-line option for one setting; None means that the flag was not given."""
    kind, meta = _plain_type(FIELDS[name].type)
    default = FIELDS[name].default
    if FIELDS[name].default_factory is not NODEFAULT:
        default = FIELDS[name].default_factory()
    shown = default if default not in (NODEFAULT, None, [], {}) else None
    option = typer.Option(
        help=str(meta.description) + (f" [default: {shown}]" if shown is not None and kind is not bool else ""),
        rich_help_panel=(meta.extra or {})["panel"],
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _plain_type(annotated: Any) -> tuple[Any, Meta]:
    """Return the type a flag is parsed as, and the setting's description."""
    kind: Any = typing.get_args(annotated)[0]
    meta: Meta = annotated.__metadata__[-1]  # bounds come before it
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (list, dict):
        kind = list[str]
    return kind, meta


_OWN = {
    "config": (Path | None, None, "YAML file of settings, named as the flags below"),
    "resume": (bool, False, "Continue the run in --output from its last checkpoint"),
    "quiet": (bool, False, "Print nothing but errors"),
    "plain": (bool, False, "Print lines instead of a live display; automatic when stdout is no terminal"),
}


def command(**flags: Any) -> None:
    _train(**flags)


command.__doc__ = _train.__doc__
# Typer reads a signature; ours has one flag per field of RunConfig, so that a setting is written in one place.
command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option("--" + name, help=text, show_default=False)],
        )
        for name, (kind, default, text) in _OWN.items()
    ]
    + [_flag(name) for name in FIELDS]
)
command.__annotations__ = {p.name: p.annotation for p in inspect.signature(command).parameters.values()}
