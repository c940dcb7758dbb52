"""What a rule of a server looks at. Each function returns what it found, in words, or None where nothing is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from inlay.checkpoint.resolve import listed
from inlay.checkpoint.serving_files import REGULAR_ENDS, Base, ServedAdapter, module_path
from inlay.errors import CheckpointMismatchError

# starts that change the base's weights when PEFT builds the adapter, so that the saved factors fit only that base
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# fields that change what the factors mean
VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "layer_replication")
IN_LAYER = re.compile(r"layers\.\d+\.")
BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


@dataclass(frozen=True)
class Case:
    """What is judged: an adapter, its base where that is here, and the largest rank the server was started with."""

    adapter: ServedAdapter
    base: Base | None = None
    largest_rank: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.adapter.config


Condition = Callable[[Case], str | None]


def some(items: Iterable[str]) -> str | None:
    """Join what was found, or return None where that is nothing."""
    return listed(items) or None


def in_layer(path: str) -> bool:
    """Whether a module or a tensor lies in a numbered layer, as SGLang reads names."""
    return IN_LAYER.search(f"{path}.") is not None


def method(case: Case) -> str | None:
    """Another method than LoRA."""
    kind = case.config["peft_type"]
    return None if kind.upper() == "LORA" else f"peft_type is {kind!r}"


def fields(case: Case) -> str | None:
    """A field that every server reads is missing or of no use."""
    wrong = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if name not in case.config]
    if "r" in case.config and case.adapter.rank is None:
        wrong.append(f"r is {case.config['r']!r}, expected a positive integer")
    if "lora_alpha" in case.config and case.adapter.alpha is None:
        wrong.append(f"lora_alpha is {case.config['lora_alpha']!r}, expected a number")
    return some(wrong)


def dora(case: Case) -> str | None:
    """DoRA, by the config or by its tensors."""
    if case.config.get("use_dora"):
        return "use_dora is true"
    return some(key for key in case.adapter.others if "lora_magnitude_vector" in key)


def saved_modules(*allowed: str) -> Condition:
    """Modules that were trained whole, other than those allowed."""

    def condition(case: Case) -> str | None:
        names = case.config.get("modules_to_save") or []
        return some(repr(name) for name in names if name not in allowed)

    return condition


def biases(case: Case) -> str | None:
    """Base biases that were trained."""
    return None if case.config.get("bias") in (None, "none") else f"bias is {case.config['bias']!r}"


def lora_bias(case: Case) -> str | None:
    """A bias of B."""
    return "lora_bias is true" if case.config.get("lora_bias") else None


def trained_tokens(case: Case) -> str | None:
    """Trained rows of the embeddings."""
    return "trainable_token_indices is set" if case.config.get("trainable_token_indices") else None


def activated(case: Case) -> str | None:
    """An adapter that acts only behind certain tokens."""
    return "alora_invocation_tokens is set" if case.config.get("alora_invocation_tokens") else None


def variants(case: Case) -> str | None:
    """Fields that change the mathematics."""
    return some(f"{name} is set" for name in VARIANTS if case.config.get(name))


def changed_base(case: Case) -> str | None:
    """A start that changed the base's weights."""
    start = case.config.get("init_lora_weights")
    changes = isinstance(start, str) and start.lower().startswith(CHANGING_STARTS)
    return f"init_lora_weights is {start!r}" if changes else None


def parameters(case: Case) -> str | None:
    """Adapted bare parameters, such as the stacked weights of experts."""
    return some(map(repr, case.config.get("target_parameters") or []))


def rslora(case: Case) -> str | None:
    """rsLoRA, where it makes a difference."""
    return "use_rslora is true" if case.config.get("use_rslora") and (case.adapter.rank or 2) > 1 else None


def patterns(own_ranks: bool = False, rslora: bool = False) -> Condition:
    """Patterns that change the scale of a module from what the server computes.

    Args:
        own_ranks: the server divides by the rank of each module's tensors instead of the config's.
        rslora: the server honours ``use_rslora``.
    """

    def condition(case: Case) -> str | None:
        adapter = case.adapter
        if adapter.rank is None or adapter.alpha is None or case.config.get("target_parameters"):
            return None
        try:
            scales = adapter.scales()
        except CheckpointMismatchError as error:
            return str(error)
        differing = []
        for module, scale in scales.items():
            if module in adapter.by_hand:
                continue
            rank = adapter.pairs[module].rank
            if case.config.get("use_rslora") and not rslora:
                scale /= math.sqrt(rank)  # that it is ignored is another rule's finding
                theirs = adapter.alpha / (rank if own_ranks else adapter.rank)
            else:
                theirs = adapter.scaled(adapter.alpha, rank if own_ranks else adapter.rank)
            if not math.isclose(scale, theirs, rel_tol=1e-9):
                differing.append(f"{module} has scale {scale:g} and would get {theirs:g}")
        return some(differing)

    return condition


def by_hand(case: Case) -> str | None:
    """Scales that were changed after injection; only Inlay reads where they are recorded."""
    return some(f"{module} has scale {scale:g}" for module, scale in case.adapter.by_hand.items())


def ranks(case: Case) -> str | None:
    """Tensors of another rank than the config's."""
    if case.adapter.rank is None:
        return None
    return some(
        f"{module} has rank {pair.rank}, r is {case.adapter.rank}"
        for module, pair in case.adapter.pairs.items()
        if pair.rank and pair.rank != case.adapter.rank
    )


def largest_rank(default: int | None) -> Condition:
    """A rank above what the server was started with, or above its default."""

    def condition(case: Case) -> str | None:
        limit = default if case.largest_rank is None else case.largest_rank
        found = max([case.adapter.rank or 0, *(pair.rank for pair in case.adapter.pairs.values())])
        return None if limit is None or found <= limit else f"rank {found}, the server takes {limit}"

    return condition


def factors(case: Case) -> str | None:
    """A factor without its counterpart or of another rank than it, or no factors at all."""
    if not case.adapter.pairs:
        return "no lora_A and lora_B in the file"
    wrong = []
    for module, pair in case.adapter.pairs.items():
        if pair.A is None or pair.B is None:
            wrong.append(f"{module} has no {'lora_A' if pair.A is None else 'lora_B'}")
        elif pair.A.dim() == pair.B.dim() == 2 and not (pair.A.shape[0] == pair.B.shape[1] > 0):
            wrong.append(f"{module} has rank {pair.A.shape[0]} in lora_A and {pair.B.shape[1]} in lora_B")
    return some(wrong)


def matrices(case: Case) -> str | None:
    """Factors that are no matrices: convolutions, stacks."""
    return some(
        f"{pair.keys[name]} has shape {tuple(value.shape)}"
        for pair in case.adapter.pairs.values()
        for name, value in (("A", pair.A), ("B", pair.B))
        if value is not None and value.dim() != 2
    )


def finite(case: Case) -> str | None:
    """NaN or infinity."""
    return some(
        key
        for key, value in case.adapter.tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())
    )


def names(allowed: Callable[[str], bool]) -> Condition:
    """Tensors that are no LoRA factors under PEFT's names, other than those allowed."""

    def condition(case: Case) -> str | None:
        adapter = case.adapter
        odd = [key for pair in adapter.pairs.values() for key in pair.keys.values() if not key.endswith(REGULAR_ENDS)]
        return some([*odd, *(key for key in adapter.others if not allowed(key))])

    return condition


def base_embeddings(allowed: tuple[str, ...]) -> Condition:
    """Base embeddings in the file, which the server passes over, with other values than the base has."""

    def condition(case: Case) -> str | None:
        if case.base is None or not case.base.files:
            return None
        keys = [key for key in case.adapter.others if key.endswith(allowed)]
        return some(key for key in keys if not same_as_base(case.base, key, case.adapter.tensors[key]))

    return condition


def same_as_base(base: Base, key: str, value: torch.Tensor) -> bool:
    """Whether a whole weight in an adapter's file is what the base has; False where the base has no such weight."""
    module = module_path(key).removesuffix(".weight").removesuffix(".base_layer")
    name = base.weight(module)
    if name is None and module.endswith("lm_head") and base.tied:
        name = base.weight("embed_tokens")
    if name is None:
        return False
    held = base.tensor(name)
    return held.shape == value.shape and bool(torch.equal(held.to(value.dtype), value))


def in_base(case: Case) -> str | None:
    """Adapted modules that the base does not have, or has in another shape."""
    if case.base is None or not case.base.files:
        return None
    wrong = []
    for module, pair in case.adapter.pairs.items():
        path = "embed_tokens" if module.rpartition(".")[2] == "lm_head" and case.base.tied else module
        if case.base.module(path) is None:
            wrong.append(f"{module} is not in {case.base.folder}")
            continue
        name = case.base.weight(path)
        if name is not None and pair.A is not None and pair.B is not None and pair.A.dim() == pair.B.dim() == 2:
            ours, theirs = (pair.B.shape[0], pair.A.shape[1]), case.base.shape(name)
            if theirs not in (None, ours, ours[::-1]):  # lookups and GPT-2's layers are stored the other way round
                wrong.append(f"{module} is for shape {ours}, the base has {theirs}")
    return some(wrong)
