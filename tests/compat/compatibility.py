"""What of PEFT's surface Inlay has: every public name, its signature, and every attribute of what it makes.

``python -m tests.compat.compatibility`` writes ``docs/compatibility.md``; ``test_compatibility.py`` holds it true.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.compat import namespace
from tests.compat.samples import pairs

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"

# Parts of PEFT that later work brings: module (or module and name) -> what they belong to. Names there must be
# placeholders; a name that is none makes the entry wrong, and the test says so.
LATER = {
    "tuners.lora.aqlm": "quantised layers",
    "tuners.lora.arrow": "LoRA variants",
    "tuners.lora.awq": "quantised layers",
    "tuners.lora.bnb": "quantised layers",
    "tuners.lora.config.ArrowConfig": "LoRA variants",
    "tuners.lora.eetq": "quantised layers",
    "tuners.lora.gptq": "quantised layers",
    "tuners.lora.hqq": "quantised layers",
    "tuners.lora.inc": "quantised layers",
    "tuners.lora.te": "quantised layers",
    "tuners.lora.torchao": "quantised layers",
    "tuners.lora.tp_layer": "Megatron layers",
    "tuners.lora.variants": "LoRA variants",
    "tuners.ia3.bnb": "quantised layers",
    "tuners.hira.bnb": "quantised layers",
    "tuners.road.bnb": "quantised layers",
    "utils.quantization_utils.Bnb4bitBackend": "quantised layers",
    "utils.quantization_utils.Bnb8bitBackend": "quantised layers",
    "utils.quantization_utils.ForwardOnlyQuantizationBackend": "quantised layers",
    "utils.quantization_utils.HqqBackend": "quantised layers",
    "utils.quantization_utils.QuantizationBackend": "quantised layers",
    "utils.quantization_utils.TorchaoBackend": "quantised layers",
    "tuners.tuners_utils.BasePromptEncoder": "prompt methods",
}
# Names (or modules) that Inlay does not have and does not mean to, and members of classes, each with the reason.
INSIDE = "a piece of PEFT's own forward pass, which Inlay does not have"
NOT_OFFERED = {
    "helpers.bnb": "an import of PEFT's",
    "peft_model.PeftModel.get_prompt": "comes with the prompt methods",
    "peft_model.PeftModel.get_prompt_embedding_to_save": "comes with the prompt methods",
    "mixed_model.PeftMixedModel.set_modules_to_save": "a step of PEFT's constructor",
    "tuners.loha.layer.HadaWeight": INSIDE,
    "tuners.loha.layer.HadaWeightCP": INSIDE,
    "tuners.loha.layer.make_weight": INSIDE,
    "tuners.loha.layer.make_weight_cp": INSIDE,
    "tuners.lora.corda": "a step of preprocess_corda",
    "tuners.lora.dora": INSIDE,
    "tuners.lora.eva": "a step of get_eva_state_dict",
    "tuners.lora.layer.LoraEmbeddingATPHolder": INSIDE,
    "tuners.lora.loraga": "a step of preprocess_loraga",
    "tuners.lora.monteclora": INSIDE,
    "tuners.lora.velora": INSIDE,
    "tuners.lora.model.add_lora_tp_hooks_dtensor": "adapters are placed with their base weight when they are created",
    "tuners.lora.model.get_tp_plan_and_mesh": "adapters are placed with their base weight when they are created",
    "tuners.mixed.model.COMPATIBLE_TUNER_TYPES": "every method may be mixed",
    "tuners.mixed.model.Configs": "a name for type hints",
    "tuners.mixed.model.Layers": "a name for type hints",
    **{
        f"tuners.mixed.model.MixedModel.{member}": "a hook of BaseTuner; a mixed model is injected into by the engine"
        for member in (
            "generate",
            "get_model_config",
            "inject_adapter",
            "supports_lora_conversion",
            "uses_shared_state",
        )
    },
    "tuners.mixed.model.PREFIXES": "every method may be mixed",
    "tuners.oft.layer.MultiplicativeDropoutLayer": INSIDE,
    "tuners.oft.layer.OFTRotationModule": INSIDE,
    **{
        f"tuners.{name}": INSIDE
        for name in (
            *("boft.layer.FastBlockDiag", "boft.layer.MultiplicativeDropoutLayer", "boft.layer.get_fbd_cuda"),
            *("boft.layer.patch_environment", "glora.layer.GloraEmptyPath", "glora.layer.GloraLoraPath"),
            *("glora.layer.GloraPath", "glora.layer.GloraScalarPath", "glora.layer.GloraVectorPath"),
            *("hira.layer.dispatch_default", "psoft.layer.OrthLayer", "psoft.layer.dispatch_default"),
            *("road.layer.dispatch_default", "adalora.layer.RankAllocator", "adamss.utils", "c3a.utils"),
            *("lokr.layer.factorization", "lokr.layer.make_kron", "lokr.layer.make_weight_cp", "osf.utils"),
            *("osf.layer.dispatch_default", "poly.router", "randlora.layer.UniqueBaseGrad", "waveft.constants"),
            *("waveft.wavelet", "waveft.waverec2d"),
        )
    },
    "tuners.road.config.RoadVariant": "a name for type hints",
    "utils.loftq_utils": "a step of the LoftQ start, which needs bitsandbytes",
    "utils.other.create_attention_mask": "comes with the prompt methods",
    "utils.quantization_utils.LayerType": "a name for type hints",
}


@dataclass
class Row:
    """One public name.

    Attributes:
        home, name: where PEFT defines it.
        status: ``yes``, ``later`` or ``no``.
        members: attributes of the class, or of an object of it.
        missing: those that Inlay lacks.
        differing: signatures that do not take every call that PEFT's takes.
        why: for ``later`` and ``no``.
    """

    home: str
    name: str
    status: str
    members: int = 0
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    why: str = ""


def public_names() -> Iterator[tuple[str, str]]:
    """Iterate over the defining module and name of everything public; a name of a tool of PEFT's own is none."""
    for module, names in sorted(namespace.table().items()):
        for name, (home, _, _) in sorted(names.items()):
            if home == module and (not name.startswith("_") or name == "__version__"):
                yield module, name


def rows() -> list[Row]:
    """Compare every public name."""
    found = []
    made = {(type(theirs).__module__, type(theirs).__name__): (theirs, ours) for theirs, ours in pairs()}
    for home, name in public_names():
        module = f"peft.{home}".rstrip(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):  # bitsandbytes and the like
                theirs = None
        row = Row(home, name, "yes")
        found.append(row)
        kind = namespace.table()[home][name][2]
        try:
            ours = namespace.value_of(home, name, kind)
        except AttributeError:
            row.status, row.why = "no", _reason(home, name) or _later(home, name)
            continue
        waiting = type(ours).__name__ == "Unavailable" or getattr(ours, "__unavailable__", False)
        method = namespace.method_of(home)
        if waiting or (method is not None and not _is_built(method)) or _later(home, name):
            reason = _reason(home, name)
            row.status, row.why = ("no", reason) if reason else ("later", _later(home, name))
            continue
        if theirs is not None:
            _compare(row, theirs, ours, made.get((module, name)))
    return found


def _later(home: str, name: str) -> str:
    """Return what a name that is not there yet belongs to, empty where nobody said so."""
    for key in (f"{home}.{name}", home):
        if key in LATER:
            return LATER[key]
    method = namespace.method_of(home)
    if method is not None and not _is_built(method):
        return "method not built"
    return ""


def _reason(home: str, name: str, member: str = "") -> str:
    """Return why Inlay does not offer a name, or an attribute of it; empty where nobody said so."""
    if member:
        return NOT_OFFERED.get(f"{home}.{name}.{member}", "") or NOT_OFFERED.get(f"{home}.PeftModel.{member}", "")
    return NOT_OFFERED.get(f"{home}.{name}", "") or NOT_OFFERED.get(home, "")


def _is_built(method: str) -> bool:
    from inlay.config import PeftType
    from inlay.core.registry import method_types

    return method in method_types() or method not in PeftType.__members__


def _compare(row: Row, theirs: Any, ours: Any, made: tuple[Any, Any] | None) -> None:
    if isinstance(theirs, type):
        ignored = {*dir(nn.Module()), *dir(Enum), *dir(dict), *dir(torch.autograd.Function)}
        members = {name for name in dir(theirs) if not name.startswith("_")} - ignored
        for name in sorted(members):
            if not hasattr(ours, name) and not (made is not None and hasattr(made[1], name)):
                row.missing.append(name)
            else:
                _signature(row, name, getattr(theirs, name, None), getattr(ours, name, None))
        if made is not None:
            mine = {name for name in dir(made[0]) if not name.startswith("_")} - ignored - members
            row.missing += [name for name in mine if not hasattr(made[1], name)]
            members |= mine
        row.members = len(members)
        if not issubclass(theirs, (Exception, Enum)):
            _signature(row, "__init__", theirs, ours)
    elif callable(theirs):
        _signature(row, "", theirs, ours)
    row.missing.sort()


def _signature(row: Row, name: str, theirs: Any, ours: Any) -> None:
    """Note where a call that PEFT takes would not be taken."""
    if not callable(theirs) or not callable(ours):
        return
    try:
        wanted = list(inspect.signature(theirs).parameters.values())
        given = inspect.signature(ours).parameters
    except (TypeError, ValueError):
        return
    kinds = {parameter.kind for parameter in given.values()}
    star, double = inspect.Parameter.VAR_POSITIONAL in kinds, inspect.Parameter.VAR_KEYWORD in kinds
    if star and double:
        return
    order = [parameter.name for parameter in given.values()]
    for position, parameter in enumerate(wanted):
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        mine = given.get(parameter.name)
        here = f"{name}({parameter.name})" if name else f"({parameter.name})"
        if mine is None:
            if not double and not (star and parameter.kind is not inspect.Parameter.KEYWORD_ONLY):
                row.differing.append(here)
        elif parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and order.index(parameter.name) != position:
            row.differing.append(f"{here}: position")
        elif mine.default is not parameter.default and not _same(mine.default, parameter.default):
            row.differing.append(f"{here}: {_shown(parameter.default)} is {_shown(mine.default)}")


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    return default.__name__ if inspect.isfunction(default) else repr(default)


def _same(mine: Any, theirs: Any) -> bool:
    if inspect.isfunction(mine) and inspect.isfunction(theirs):  # a function that both have under one name
        return mine.__name__ == theirs.__name__ and mine.__name__ != "<lambda>"
    try:
        return bool(mine == theirs) or (mine is not inspect.Parameter.empty and repr(mine) == repr(theirs))
    except Exception:
        return False


def counted(found: list[Row]) -> tuple[int, int]:
    """Return how many names, attributes and signatures of what is built are there, of how many."""
    have = total = 0
    for row in found:
        if row.status == "later" or (row.status == "no" and not _reason(row.home, row.name) and row.why):
            continue
        total += 1 + row.members
        have += (row.status == "yes" and not row.differing) + row.members - len(row.missing)
    return have, total


def _said(row: Row, member: str) -> str:
    reason = _reason(row.home, row.name, member)
    return f"no `{member}`" + (f" ({reason})" if reason else "")


def document(found: list[Row]) -> str:
    """Return the page."""
    have, total = counted(found)
    yes, later, no = (sum(row.status == status for row in found) for status in ("yes", "later", "no"))
    lines = [
        "# PEFT's public names in `inlay.compat.peft`",
        "",
        "Written by `python -m tests.compat.compatibility` from the installed PEFT 0.21.2 and held true by",
        "`tests/compat/test_compatibility.py`. What tests of PEFT's own suite say of behaviour is in",
        "`compatibility-suite.md`; where Inlay computes or refuses something else on purpose, in `differences.md`.",
        "",
        f"{len(found)} public names: {yes} are there, {later} belong to methods and options that are not built yet "
        f"(importable; using one raises `NotAvailableError`), {no} are not offered.",
        f"Of what is built, {have} of {total} names, attributes and signatures are there ({have / total:.1%}). An",
        "attribute counts when it is found on the class, or on an object made by the same code on both sides. The",
        "page says that they are there; what they do is compared by the tests beside PEFT and by PEFT's own suite.",
        "",
    ]
    for module in sorted({row.home for row in found}):
        shown = [row for row in found if row.home == module]
        lines += [f"## `peft.{module}`".replace(".`", "`"), ""]
        waiting = [row.name for row in shown if row.status == "later"]
        there = [row for row in shown if row.status != "later"]
        if there:
            lines += ["| name | there | attributes | differs |", "|---|---|---|---|"]
        for row in there:
            differs = [_said(row, name) for name in row.missing] + [f"`{text}`" for text in row.differing]
            if row.status == "no":
                differs = [row.why]
            members = f"{row.members - len(row.missing)}/{row.members}" if row.members else ""
            lines.append(f"| `{row.name}` | {row.status} | {members} | {'; '.join(differs)} |".replace("|  |", "| |"))
        if waiting:
            reason = ", ".join(sorted({row.why for row in shown if row.status == "later"}))
            lines += ["", f"Later ({reason}): {', '.join(f'`{name}`' for name in waiting)}."]
        lines.append("")
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(rows()), encoding="utf-8")
