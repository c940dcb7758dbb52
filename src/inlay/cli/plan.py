"""``inlay plan``: what an adapter would touch and cost, before anything is allocated."""

from __future__ import annotations

from typing import Annotated

import typer

LISTS = ("--target", "--set")


def command(
    model: Annotated[str, typer.Option(help="Model name on the hub, or a folder")],
    method: Annotated[str, typer.Option(help="As in inlay train")] = "lora",
    task: Annotated[str, typer.Option(help="causal-lm or classify: decides the model's head")] = "causal-lm",
    target: Annotated[list[str] | None, typer.Option(help="Modules to adapt by name, or all-linear")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank, for methods that have one")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale numerator")] = None,
    init: Annotated[str | None, typer.Option(help="How the adapter starts, as in inlay train")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field, as field=value or field.option=value")
    ] = None,
    meta: Annotated[
        bool, typer.Option("--meta/--weights", help="Build the model from its configuration, or load its weights")
    ] = True,
) -> None:
    """Print every module that the adapter would sit on, with shapes, parameters and bytes.

    By default the model is built on the meta device from its configuration: its weights are never read.
    """
    import inlay
    from inlay.training.methods import build_config
    from inlay.training.pretrained import load_base, skeleton
    from inlay.training.settings import parse_assignments
    from inlay.training.tasks import task_class

    kind = task_class(task)
    extra = parse_assignments(assignments or [], "--set")
    config = build_config(
        method, task_type=kind.task_type, target=target, rank=rank, alpha=alpha, init=init, extra=extra
    )
    base = skeleton(model, kind.auto_class) if meta else load_base(model, kind.auto_class)
    print(inlay.plan(base, config))
