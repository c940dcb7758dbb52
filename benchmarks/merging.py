"""Merging a low-rank adapter into one large weight: time, extra memory, and what unmerging gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Figure, Figures, Run, at_least, at_most, row, standalone
from benchmarks.memory import allocated_bytes, empty_caches
from benchmarks.models import give_values

RANK = 16
READ_FIRST = (
    "the proof that the merged weight is finite reads every number before the first is written, and the floor (adding "
    "in place) has no such read: one core takes 5.7 ms for the read and 9.3 ms for the floor here, and these two alone "
    "are 6.5 times faster than peft"
)
FRESH_PAGES = (
    "a copy writes memory that is new to the process; it is asked for in large pages, which come for a quarter of what "
    "small ones cost, and still cost more than the merge where the system has none to give"
)


def layer(size: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False, dtype=dtype)
    return nn.Sequential(linear)


def adapted(library: Any, model: nn.Module) -> Any:
    """The model with an adapter; its weight is written, so that nothing known of it is worth anything.

    The processor's caches are emptied of what was written, for every variant.
    """
    with torch.no_grad():
        model[0].weight.mul_(1.0)
    wrapped = library.get_peft_model(model, library.LoraConfig(r=RANK, target_modules=["0"]))
    give_values(wrapped)
    empty_caches()
    return wrapped


def unloading(library: Any, model: nn.Module) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return lambda: adapted(library, model), lambda wrapped: wrapped.merge_and_unload()


def keeping(library: Any, model: nn.Module) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    def prepare() -> Any:
        if hasattr(model[0], "unmerge"):
            wrapped = model.__dict__.pop("wrapped")
            wrapped.unmerge_adapter()
            wrapped.unload()
        wrapped = adapted(library, model)
        model.__dict__["wrapped"] = wrapped
        return wrapped

    return prepare, lambda wrapped: wrapped.merge_adapter()


def in_place(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The floor: the product is added to the weight by one operator, with factors in the weight's dtype."""
    weight = torch.randn(size, size).mul_(0.02).to(dtype)
    B, A = (torch.randn(shape).mul_(0.02).to(dtype) for shape in ((size, RANK), (RANK, size)))
    return lambda: weight.addmm_(B, A, alpha=2.0)


def merge(run: Run, size: int, dtype: torch.dtype, action: Callable[..., Any], rounds: int) -> Figures:
    add = in_place(size, dtype)
    actions: dict[str, Any] = {"floor": (empty_caches, lambda _: add())}
    for name, library in run.libraries().items():
        actions[name] = action(library, layer(size, dtype))
    figures = run.alternate(actions, rounds).figures("peft / inlay", "inlay / floor", "peft / floor")
    for name, library in run.libraries().items():
        prepare, act = action(library, layer(size, dtype))
        wrapped = prepare()
        figures[f"peak, {name}"] = Figure(allocated_bytes(lambda act=act, wrapped=wrapped: act(wrapped))[0], unit="B")
    return figures


def described(keep: str) -> str:
    return f"LoRA r{RANK} into one weight, {keep}; the finiteness of the result is proved (peft: safe_merge=False)"


FLOOR = "addmm_ of the factors, in the weight's dtype"
SIZES: dict[str, Any] = {"full": {"size": 4096, "rounds": 31}, "quick": {"size": 2048, "rounds": 3}}
OUT = "merge_and_unload, which keeps nothing"
KEPT = "merge_adapter, which keeps a copy of the weight"


@row(
    "merge fp32, nothing kept",
    what=described(OUT),
    floor=FLOOR,
    targets=(at_least(6, 10, reason=READ_FIRST), at_most(2**20, of="peak, inlay", unit="B")),
    **SIZES,
)
def fp32(run: Run, size: int, rounds: int) -> Figures:
    return merge(run, size, torch.float32, unloading, rounds)


@row(
    "merge bf16, nothing kept",
    what=described(OUT),
    floor=FLOOR,
    targets=(at_least(4, 5), at_most(2**22, of="peak, inlay", unit="B")),
    **SIZES,
)
def bf16(run: Run, size: int, rounds: int) -> Figures:
    return merge(run, size, torch.bfloat16, unloading, rounds)


@row(
    "merge fp32, a copy kept",
    what=described(KEPT),
    floor=FLOOR,
    targets=(at_least(2, reason=FRESH_PAGES),),
    **SIZES,
)
def fp32_copy(run: Run, size: int, rounds: int) -> Figures:
    return merge(run, size, torch.float32, keeping, rounds)


@row(
    "merge bf16, a copy kept",
    what=described(KEPT),
    floor=FLOOR,
    targets=(at_least(2),),
    **SIZES,
)
def bf16_copy(run: Run, size: int, rounds: int) -> Figures:
    return merge(run, size, torch.bfloat16, keeping, rounds)


def drift(library: Any, size: int, cycles: int) -> tuple[float, float, Tensor]:
    """Largest error of the merged weight against float64, and after cycles of merging and unmerging."""
    model = layer(size, torch.bfloat16)
    before = model[0].weight.detach().clone()
    wrapped = adapted(library, model)
    place = wrapped.base_model.model[0]
    A, B = (getattr(place, name)["default"].weight.detach().double() for name in ("lora_A", "lora_B"))
    exact = before.double() + B @ A * place.scaling["default"]
    wrapped.merge_adapter()
    error = float((place.base_layer.weight.detach().double() - exact).abs().max())
    wrapped.unmerge_adapter()
    for _ in range(cycles - 1):
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
    after = place.base_layer.weight.detach()
    return error, float((after.double() - before.double()).abs().max()), (after != before).sum()


@row(
    "unmerge bf16, drift",
    what="the largest difference of a weight from what it was, after cycles of merging and unmerging",
    targets=(at_most(0, of="difference, inlay"), at_most(0, of="numbers changed, inlay")),
    full={"size": 1024, "cycles": 20},
    quick={"size": 512, "cycles": 5},
)
def drifting(run: Run, size: int, cycles: int) -> Figures:
    figures = {}
    for name, library in run.libraries().items():
        error, difference, changed = drift(library, size, cycles)
        figures[f"difference, {name}"] = Figure(difference, unit="rel")
        figures[f"numbers changed, {name}"] = Figure(float(changed), unit="")
        figures[f"error of the merged weight, {name}"] = Figure(error, unit="rel")
    return figures


if __name__ == "__main__":
    standalone(__spec__.name)
