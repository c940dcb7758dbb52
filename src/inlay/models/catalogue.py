"""Every method that there is, and what can be said of it without a model: a table made from the registry."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from inlay.config import PeftConfig
from inlay.config.types import PeftType, method_name
from inlay.core import storage
from inlay.core.method import Method
from inlay.core.plan import plan
from inlay.core.registry import method_class, method_types
from inlay.core.report import table
from inlay.errors import InlayError, InlayWarning

__all__ = ["LAYERS", "MethodFacts", "catalogue", "described", "facts", "markdown"]


class _Bank(nn.Module):
    """A bank of experts, as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 4096, 4096))


# What a method is tried on, large enough for every default setting. Nothing is allocated: it is planned on "meta".
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4096, 4096),
    "conv1d": lambda: nn.Conv1d(1024, 1024, 3),
    "conv2d": lambda: nn.Conv2d(1024, 1024, 3),
    "conv3d": lambda: nn.Conv3d(512, 512, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(1024, 1024, 3),
    "embedding": lambda: nn.Embedding(32768, 4096),
    "embedding_bag": lambda: nn.EmbeddingBag(32768, 4096),
    "norm": lambda: nn.LayerNorm(4096),
    "attention": lambda: nn.MultiheadAttention(4096, 32),
    "experts": _Bank,
}
# Fields without which a config says nothing, and forms of a method that have mathematics of their own.
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000},
    "IA3": {"feedforward_modules": []},
    "TRAINABLE_TOKENS": {"token_indices": [0]},
}
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "DoRA": {"use_dora": True},
        "QA-LoRA": {"use_qalora": True},
        "BD-LoRA": {"use_bdlora": {"target_modules_bd_b": [""], "nblocks": 4}},
        "KaSA": {"kasa_config": {}},
        "VeLoRA": {"velora_config": {}},
        "MonteCLoRA": {"monteclora_config": {}},
    }
}
_PAPER = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b")


@dataclass
class MethodFacts:
    """What the table says of one method.

    Attributes:
        peft_type: its name in configs and files.
        title: what it is, in a few words.
        paper: where it comes from.
        formula: what it makes of a layer.
        kinds: the layers that it goes to, with its config's defaults.
        refused: why it does not go to the others.
        storages: how weights may be held that it is put on.
        mergeable: whether it can be written into the weight of a linear layer with a bias.
        parameters: how many numbers train at a linear layer of 4096 x 4096, shared ones included.
    """

    peft_type: str
    title: str
    paper: str
    formula: str
    kinds: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    storages: list[str] = field(default_factory=list)
    mergeable: bool = True
    parameters: int | None = None


def catalogue() -> list[MethodFacts]:
    """Return the facts of every method that can be looked up, by name, each with its forms behind it."""
    found = []
    for name in method_types():
        found += [facts(name), *(facts(name, form) for form in FORMS.get(name, {}))]
    return found


def facts(peft_type: PeftType | str, form: str | None = None) -> MethodFacts:
    """Return what can be said of one method, or of a form of it.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    name = method_name(peft_type)
    cls = method_class(name)
    fields = {**NEEDED.get(name, {}), **(FORMS[name][form] if form else {})}
    method = cls.variant(cls.config_class(**fields))
    title, paper = _described(sys.modules[method.__module__].__doc__ or method.__name__)
    found = MethodFacts(f"{name}, {form}" if form else name, title, paper, _first_sentence(method))
    for kind, build in LAYERS.items():
        try:
            made = _planned(cls, fields, build)
        except InlayError as error:
            found.refused[kind] = str(error).partition("): ")[2] or str(error)
            continue
        found.kinds.append(kind)
        if kind == "linear":
            found.parameters = made.trainable
            found.mergeable = made.method.mergeable
    found.storages = storage.names()
    return found


def _planned(method: type[Method], fields: dict[str, Any], build: Callable[[], nn.Module]) -> Any:
    """Plan a method with its defaults on one layer, without memory."""
    with torch.device("meta"):
        model = nn.Sequential(build())
    bare = isinstance(model[0], _Bank)
    target = {"target_modules": [], "target_parameters": ["0.weight"]} if bare else {"target_modules": ["0"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InlayWarning)
        return plan(model, method.config_class(**fields, **target))


def _described(docstring: str) -> tuple[str, str]:
    """Split the first line of a method's file into what the method is and where it comes from."""
    line = docstring.strip().partition("\n")[0]
    said, _, source = line.rpartition(" (")
    if not said:
        return line.rstrip("."), ""
    return said, source.rstrip(".").removesuffix(")")


def _first_sentence(method: type[Method]) -> str:
    """Return the first paragraph of a method's docstring, which gives its formula."""
    return " ".join((method.__doc__ or "").strip().partition("\n\n")[0].split())


def described(peft_type: str) -> str:
    """Return what there is to know of one method as text, its config's fields included.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    found = facts(peft_type)
    config = method_class(peft_type).config_class
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    rows = [
        (one.name, repr(default_of(one)), str(one.metadata.get("help", "")))
        for one in dataclasses.fields(config)
        if one.name not in common
    ]
    count = "" if found.parameters is None else f"{found.parameters:,} at a linear layer of 4096 x 4096"
    lines = [
        f"{found.peft_type}: {found.title}",
        f"source   {found.paper}",
        f"formula  {found.formula}",
        f"layers   {', '.join(found.kinds)}",
        f"merged   {'yes' if found.mergeable else 'no'}",
        f"trains   {count}",
        *(f"not on {kind}: {why}" for kind, why in found.refused.items()),
        "",
        *table(("field of " + config.__name__, "default", "meaning"), rows),
    ]
    return "\n".join(lines)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, made anew where it is made by a function; None where there is none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def markdown(rows: list[MethodFacts]) -> str:
    """Return the table as a page of documentation."""
    lines = [
        "# Methods",
        "",
        "<!-- Written by `inlay methods --markdown`; do not edit. -->",
        "",
        "Each method goes to every kind of layer that its mathematics admits. *Trains* counts the numbers that train "
        "at a linear layer of 4096 x 4096 with the config's defaults. All are put on weights in fp32, bf16 and fp16, "
        "and on sharded ones. `inlay methods NAME` tells more of one method.",
        "",
        "| method | what it is | what it makes of a layer | layers | merged | trains | source |",
        "|---|---|---|---|---|---|---|",
    ]
    every = list(LAYERS)
    for row in rows:
        kinds = "all" if row.kinds == every else ", ".join(row.kinds)
        count = "" if row.parameters is None else f"{row.parameters:,}"
        merged = "yes" if row.mergeable else "no"
        cells = (row.peft_type, row.title, row.formula, kinds, merged, count, linked(row.paper))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Where a method does not go, and why", ""]
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for kind, why in row.refused.items():
            reasons.setdefault(why, []).append(kind)
        lines += [f"- {row.peft_type}, {', '.join(kinds)}: {why}" for why, kinds in reasons.items()]
    return "\n".join(lines) + "\n"


def linked(paper: str) -> str:
    """Make links of the arXiv numbers in a source."""
    return _PAPER.sub(r"[\1](https://arxiv.org/abs/\1)", paper)
