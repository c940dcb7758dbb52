"""Which places a config's patterns choose, and what becomes of patterns that choose none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from inlay.core.copies import covering
from inlay.core.extend import readable
from inlay.core.kind import kind_of
from inlay.core.mount import ModuleCopies
from inlay.core.part import part_matcher
from inlay.core.patterns import layer_index, matcher
from inlay.core.scope import within
from inlay.core.targets import ALL_LINEAR, Place, base_parameters, linear_paths, shortened
from inlay.errors import TargetError, TargetWarning, UnsupportedError, did_you_mean, nearest

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["check_patterns", "choose", "model_type", "nothing_matched", "plan_biases", "unmatched"]


def choose(made: Plan, everything: list[Place]) -> list[tuple[Place, str]]:
    """Return the places that target_modules means, with the pattern that chose each."""
    config = made.method.config
    targets = config.target_modules
    if targets is None:  # the config asks for something else than modules
        return []
    inside = within(made, everything)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        paths = linear_paths(made.model, inside, config.task_type)
        if made.policy.strict_targets:
            paths = readable(paths, inside)
        if made.copies:
            paths = {path for path in paths if covering(made, path) is None}
        made.resolved["target_modules"] = set(shortened(paths, (place.path for place in everything)))

        def match(path: str) -> str | None:
            return ALL_LINEAR if path in paths else None
    else:
        match = part_matcher(targets)  # type: ignore[assignment]  # the two branches differ in the parameter's name
    exclude = matcher(config.exclude_modules) if getattr(config, "exclude_modules", None) else None
    wanted = getattr(config, "layers_to_transform", None)
    indices = None if wanted is None else {wanted} if isinstance(wanted, int) else set(wanted)
    chosen: list[tuple[Place, str]] = []
    hit: set[str] = set()
    excluded: set[str] = set()
    covered: dict[str, str] = {}
    for place in inside:
        pattern = match(place.path)
        if pattern is None and place.aliases:
            pattern = next((p for p in map(match, place.aliases) if p is not None), None)
        if exclude is not None:
            key = exclude(place.path)
            if key is not None:
                excluded.add(key)
                if pattern is not None:
                    hit.add(pattern)
                continue
        if pattern is None:
            continue
        if indices is not None and layer_index(place.path, config.layers_pattern) not in indices:
            continue
        copied = covering(made, place.path) if made.copies else None
        if isinstance(place.module, ModuleCopies) and copied is None:
            raise TargetError(
                f"{place.path!r} is trained in full by modules_to_save of another adapter; {pattern!r} cannot adapt it"
            )
        if copied is not None:  # trained in full
            covered.setdefault(pattern, copied)
            continue
        hit.add(pattern)
        chosen.append((place, pattern))
    for pattern in covered.keys() - hit:
        if made.policy.strict_targets:
            raise TargetError(
                f"target_modules: {pattern!r} matches nothing outside of {covered[pattern]!r}, which modules_to_save "
                "trains in full; leave one of them out"
            )
        hit.add(pattern)
    if not isinstance(targets, str):
        taken = [path for place, _ in chosen for path in (place.path, *place.aliases)]
        unmatched(made, "target_modules", set(targets) - hit, inside, taken)
    if exclude is not None:
        asked = {config.exclude_modules} if isinstance(config.exclude_modules, str) else set(config.exclude_modules)
        unmatched(made, "exclude_modules", asked - excluded, inside)
    return chosen


def model_type(model: nn.Module) -> str | None:
    """Return the model family's name, ``config.model_type`` of transformers."""
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def unmatched(
    made: Plan, what: str, patterns: Iterable[str], everything: list[Place], taken: Iterable[str] = ()
) -> None:
    """Record patterns that matched nothing, also none of the ``taken`` paths, which a longer pattern chose."""
    paths = [place.path for place in everything]
    for pattern in patterns:
        if any(map(part_matcher([pattern]), taken)):
            continue
        made.unmatched[f"{what}: {pattern}"] = nearest(pattern, [*paths, *(p.rpartition(".")[2] for p in paths)])


def nothing_matched(made: Plan, everything: list[Place]) -> str:
    targets = made.config.target_modules
    names = [targets] if isinstance(targets, str) else sorted(targets or [])
    if not names and made.unmatched:  # only target_parameters were asked for, or token rows
        return f"{type(made.model).__name__}: nothing to adapt; {'; '.join(_unmatched_lines(made))}"
    paths = [place.path for place in within(made, everything) if kind_of(place.base) is not None]
    known = {path.rpartition(".")[2] for path in paths}
    # numbers alone say nothing: where there is nothing else, whole paths
    shown = sorted(name for name in known if not name.isdigit()) or paths
    hint = did_you_mean(names[0], known) if names else ""
    scope = getattr(made.config, "scope", None)
    where = type(made.model).__name__ if scope is None else f"{scope!r} of {type(made.model).__name__}"
    return (
        f"target_modules={targets!r} matches nothing in {where} that is not excluded.{hint} "
        f"Layers there are called: {', '.join(shown[:20])}"
    )


def plan_biases(made: Plan) -> None:
    """Find the base biases that ``bias`` makes trainable."""
    mode = made.method.bias_mode()
    if mode == "none":
        return
    if made.state is not None and any(r.method.bias_mode() != "none" for r in made.state.records.values()):
        raise UnsupportedError(
            f"bias={mode!r}: another adapter of this model already trains the base biases, and they are shared"
        )
    if mode == "all":
        made.biases = [name for name in base_parameters(made.model) if name.rpartition(".")[2] == "bias"]
    elif mode.endswith("_only"):
        owned = {
            id(p.place.base._parameters[p.kind.bias_name])
            for p in made.placements
            if p.site.bias and p.kind.bias_name == "bias"  # PEFT trains biases of that name only
        }
        made.biases = [name for name, p in base_parameters(made.model).items() if id(p) in owned]
    else:
        raise UnsupportedError(f"bias={mode!r} is not one of 'none', 'all' and '{made.method.prefix}only'")


def _unmatched_lines(made: Plan) -> list[str]:
    return [
        f"{pattern} matches nothing" + (f" (near: {', '.join(near)})" if near else "")
        for pattern, near in made.unmatched.items()
    ]


def check_patterns(made: Plan) -> None:
    """Judge what matched nothing, by the policy."""
    for name in ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern", "lambda_pattern"):
        for key in getattr(made.method.config, name, None) or {}:
            if not any(made.method.means(name, key, p.site) for p in made.placements):
                made.unmatched[f"{name}: {key}"] = nearest(key, [p.site.name for p in made.placements])
    marked = getattr(made.config, "feedforward_modules", None)
    for key in [marked] if isinstance(marked, str) else marked or ():
        meant = matcher(key if isinstance(marked, str) else [key])
        if not any(meant(p.site.name) for p in made.placements):
            made.unmatched[f"feedforward_modules: {key}"] = nearest(key, [p.site.name for p in made.placements])
    if not made.unmatched:
        return
    lines = _unmatched_lines(made)
    message = f"{type(made.model).__name__}: " + "; ".join(lines)
    if made.policy.strict_targets:
        raise TargetError(message)
    used = {"target_modules" if p.site.parameter is None else "target_parameters" for p in made.placements}
    for line in lines:  # of what is targeted, it is enough that something was found
        if not line.startswith((*used, "modules_to_save")):
            warnings.warn(line, TargetWarning, stacklevel=4)
