"""Which modules get a full copy (``modules_to_save``), and what must not lie inside one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from inlay.core.follow import follower_of
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.patterns import matcher
from inlay.core.scope import within
from inlay.core.targets import Place
from inlay.core.tied import tied_groups, warn_untied
from inlay.errors import ContainerError, TargetError

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["check_copies", "covering", "plan_copies", "tie_copies"]

# task_type -> what the new layer on top may be called; it trains in full
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def plan_copies(made: Plan, everything: list[Place]) -> None:
    """Find the modules that modules_to_save means.

    Raises:
        ContainerError: one of them is a bare container.
        TargetError: one of them holds layers that an earlier adapter adapts.
    """
    from inlay.core.choose import unmatched

    wanted = list(getattr(made.config, "modules_to_save", None) or [])
    task = getattr(made.config, "task_type", None)
    heads = _HEADS.get(str(getattr(task, "value", task)), ())
    optional: set[str] = set()
    if heads:
        present = {place.path.rpartition(".")[2] for place in everything}
        # A saved config names them all, whichever of them the model has.
        optional = {name for name in heads if name not in present}
        wanted += [name for name in heads if name not in wanted]
        made.resolved["modules_to_save"] = list(wanted)
    if not wanted:
        return
    match = matcher(wanted)
    hit: set[str] = set()
    inside = within(made, everything)
    for place in inside:
        pattern = match(place.path)
        if pattern is None:
            continue
        if covering(made, place.path) is not None:  # inside another copy
            hit.add(pattern)
            continue
        if isinstance(place.module, _CONTAINERS):
            raise ContainerError(
                f"modules_to_save: {place.path!r} is a {type(place.module).__name__}, which has no forward that a copy "
                "could stand in for; name the modules inside it"
            )
        inner = [path for path, module in _adapted(place.module, place.path) if module is not place.module]
        covered = any(follower_of(parent) is not None for parent, _ in place.parents)  # by a layer that others wrote
        if isinstance(place.module, AdaptedLayer) or covered or inner:
            adapted = inner[0] if inner else place.path
            raise TargetError(
                f"modules_to_save: {place.path!r} cannot be trained in full, because {adapted!r} is adapted by another "
                "adapter"
            )
        hit.add(pattern)
        made.copies.append((place, pattern))
        made.matched.setdefault(pattern, []).append(place.path)
    unmatched(made, "modules_to_save", set(wanted) - hit - optional, inside, [p.path for p, _ in made.copies])


def _adapted(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    if isinstance(module, ModuleCopies):  # an earlier adapter's copies are no part of the original
        return []
    return [(f"{path}.{name}", child) for name, child in module.named_modules() if follower_of(child) is not None]


def covering(made: Plan, path: str) -> str | None:
    """Return the path of the full copy that a path lies in or is, or None."""
    return next((p.path for p, _ in made.copies if path == p.path or path.startswith(f"{p.path}.")), None)


def tie_copies(made: Plan, everything: list[Place]) -> None:
    """Let the full copies of tied layers share their weight too, where ``ensure_weight_tying`` asks for it."""
    chosen = {id(place.module): pattern for place, pattern in made.copies}
    if not chosen:
        return
    for group in tied_groups(everything):
        together = [place for place in group.places if id(place.module) in chosen]
        if not together:
            continue
        if not getattr(made.config, "ensure_weight_tying", False):
            warn_untied(made, group, "so the model is no longer tied after a merge")
            continue
        for place in group.places:
            if id(place.module) not in chosen:
                made.copies.append((place, chosen[id(together[0].module)]))
            if place is not group.source:
                made.ties.append((group.source, place))


def check_copies(made: Plan) -> None:
    """Refuse a place that would be adapted and trained in full.

    Raises:
        TargetError: names the place and the copy.
    """
    for placement in made.placements if made.copies else ():
        covered = covering(made, placement.place.path)
        if covered is not None:
            raise TargetError(
                f"modules_to_save: {covered!r} is trained in full, so {placement.site.name!r}, matched by "
                f"{placement.pattern!r}, cannot be adapted"
            )
