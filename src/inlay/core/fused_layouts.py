"""Which output rows of a fused projection are whose: ``qkv_proj[q,v]``, ``c_attn[0:768]``, ``gate_up_proj[up]``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from inlay.core.output_rows import Rows
from inlay.errors import TargetError, did_you_mean

__all__ = ["bare_name", "rows_of", "split_name"]

_SLICE = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d*):(\d*)")
_QKV = ("q", "k", "v")


class _Heads:
    """The numbers of attention that a model's configuration gives."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.count = int(config.num_attention_heads)
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // self.count)
        self.pairs = int(getattr(config, "num_key_value_heads", None) or self.count)


def _contiguous(heads: _Heads) -> Iterator[tuple[str, int]]:
    yield from (("q", heads.count * heads.width), ("k", heads.pairs * heads.width), ("v", heads.pairs * heads.width))


def _thirds(heads: _Heads) -> Iterator[tuple[str, int]]:
    yield from ((name, heads.count * heads.width) for name in _QKV)


def _by_head(heads: _Heads) -> Iterator[tuple[str, int]]:
    yield from ((name, heads.width) for _ in range(heads.count) for name in _QKV)


def _falcon(heads: _Heads) -> Iterator[tuple[str, int]]:
    config = heads.config
    if config.new_decoder_architecture:  # each group of queries has its key and its value behind it
        pairs = int(config.num_kv_heads)
        for _ in range(pairs):
            yield from (("q", heads.count // pairs * heads.width), ("k", heads.width), ("v", heads.width))
    elif config.multi_query:
        yield from (("q", heads.count * heads.width), ("k", heads.width), ("v", heads.width))
    else:
        yield from _by_head(heads)


def _bigcode(heads: _Heads) -> Iterator[tuple[str, int]]:
    if heads.config.multi_query:
        yield from (("q", heads.count * heads.width), ("k", heads.width), ("v", heads.width))
    else:
        yield from _by_head(heads)


# (last part of the layer's name, model_type) -> what lies in its rows, one after the other
_LAYOUTS: dict[tuple[str, str], Callable[[_Heads], Iterator[tuple[str, int]]]] = {
    ("qkv_proj", "phi3"): _contiguous,
    ("qkv_proj", "phi4_multimodal"): _contiguous,
    **{("c_attn", family): _thirds for family in ("gpt2", "imagegpt", "decision_transformer", "qwen")},
    ("c_attn", "gpt_bigcode"): _bigcode,
    **{("query_key_value", family): _by_head for family in ("bloom", "gpt_neox", "persimmon")},
    ("query_key_value", "falcon"): _falcon,
}
_GATED = {("gate_up_proj", family) for family in ("phi3", "phi4_multimodal", "glm", "glm4")}


def split_name(target: str) -> tuple[str, str] | None:
    """Split ``qkv_proj[q,v]`` into the layer's name and what stands in brackets; None where there are none."""
    found = _SLICE.fullmatch(target)
    return None if found is None else (found[1], found[2])


def bare_name(target: str) -> str:
    """Return the name of the layer that a target means a slice of, or the target itself."""
    found = split_name(target)
    return target if found is None else found[0]


def rows_of(model: nn.Module, path: str, out: int, target: str) -> Rows:
    """Return the output rows that a target means.

    Args:
        model: whose configuration says how many heads there are; that of a part of it counts first.
        path: dotted path of the layer.
        out: its rows.
        target: such as ``qkv_proj[q,v]`` or ``c_attn[0:768]``; names and ranges may stand side by side.

    Raises:
        TargetError: a range is none of the layer's, or a name is none that is known there.
    """
    name, inside = split_name(target) or (target, "")
    chosen: set[int] = set()
    named: dict[str, list[tuple[int, int]]] | None = None
    for part in inside.split(","):
        part = part.strip()
        ranged = _RANGE.fullmatch(part)
        if ranged is not None:
            start, stop = int(ranged[1] or 0), int(ranged[2] or out)
            if not start < stop <= out:
                raise TargetError(f"{target!r}: {path!r} has rows 0:{out}, and {part!r} is no range of them")
            ranges = [(start, stop)]
        else:
            if named is None:
                named = _named(model, path, name.rpartition(".")[2], out, target)
            if part not in named:
                raise TargetError(
                    f"{target!r}: {part!r} is none of the parts of {path!r}, which are {', '.join(named)}; a range of "
                    f"rows such as {name}[0:{out // 2}] means any.{did_you_mean(part, named)}"
                )
            ranges = named[part]
        for start, stop in ranges:
            rows = range(start, stop)
            if not chosen.isdisjoint(rows):
                raise TargetError(f"{target!r} means some rows of {path!r} twice")
            chosen.update(rows)
    return tuple(_ranges(sorted(chosen)))


def _ranges(rows: list[int]) -> Iterator[tuple[int, int]]:
    start = before = rows[0]
    for row in rows[1:]:
        if row != before + 1:
            yield start, before + 1
            start = row
        before = row
    yield start, before + 1


def _named(model: nn.Module, path: str, leaf: str, out: int, target: str) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges of each named part of a layer."""
    families = []
    for config in _configs(model, path):
        family = str(getattr(config, "model_type", None))
        families.append(family)
        if (leaf, family) in _GATED:
            parts = [("gate", out // 2), ("up", out // 2)]
        elif (leaf, family) in _LAYOUTS:
            parts = list(_LAYOUTS[leaf, family](_Heads(config)))
        else:
            continue
        if sum(size for _, size in parts) != out:
            raise TargetError(
                f"{target!r}: {path!r} has {out} rows, and those of {leaf!r} in {family} models are "
                f"{sum(size for _, size in parts)}; name a range of rows, such as {leaf}[0:{out // 2}]"
            )
        found: dict[str, list[tuple[int, int]]] = {}
        at = 0
        for name, size in parts:
            found.setdefault(name, []).append((at, at + size))
            at += size
        return found
    known = sorted({f"{leaf} of {family}" for leaf, family in (*_LAYOUTS, *_GATED)})
    raise TargetError(
        f"{target!r}: what the rows of {path!r} mean is not known (model family: "
        f"{', '.join(dict.fromkeys(families)) or 'none'}); name a range of rows, such as {leaf}[0:{out // 2}]. Parts "
        f"have names in: {', '.join(known)}"
    )


def _configs(model: nn.Module, path: str) -> Iterator[Any]:
    """Iterate over the configurations that a layer stands under, the nearest first."""
    above: list[Any] = [model]
    for part in path.split("."):
        inner = getattr(above[-1], part, None)
        if inner is None:
            break
        above.append(inner)
    for module in reversed(above):
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            yield config
            text = getattr(config, "text_config", None)
            if text is not None:
                yield text
