"""A training step of LoRA on a bank of experts, whose adapters run on routed rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Figure, Figures, Run, Target, at_most, row, standalone
from benchmarks.memory import allocated_bytes, kept_for_backward

WHAT = "forward and backward of Qwen3-MoE's experts (hidden 512, inner 256), 128 experts, 8 for each of 4,096 tokens"
FLOOR = "the frozen experts in transformers' grouped_mm, with gradients through tokens and routing weights only"
FULL = {"tokens": 4096, "hidden": 512, "inner": 256, "experts": 128, "rounds": 3}
# as many rows an expert as in full, which is what the ratio depends on
QUICK = {"tokens": 512, "experts": 16, "rounds": 3}
BANKS = ("gate_up_proj", "down_proj")


def bank(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> nn.ModuleDict:
    """A frozen module of experts, the same each time."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = SimpleNamespace(
        num_experts=experts,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="grouped_mm",
    )
    generator = torch.Generator().manual_seed(0)
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return nn.ModuleDict({"experts": module.to(dtype)}).requires_grad_(False)


def with_adapters(library: Any, base: nn.ModuleDict, rank: int, count: int, banks: tuple[str, ...], p: float) -> Any:
    """The experts with ``count`` active adapters."""
    config = library.LoraConfig(
        r=rank, target_modules=[], target_parameters=list(banks), init_lora_weights=False, lora_dropout=p
    )
    torch.manual_seed(1)
    model = library.get_peft_model(base, config, adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config)
    if count > 1:
        model.base_model.set_adapter([str(i) for i in range(count)])
    return model.train().base_model.model["experts"]


def step(
    run: Run,
    dtype: str,
    dropout: float,
    adapters: int,
    banks: tuple[str, ...],
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    rounds: int,
) -> Figures:
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).to(kind).requires_grad_()
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :8].contiguous()
    weights = torch.rand(tokens, 8, generator=generator).to(kind).requires_grad_()
    cotangent = torch.randn(tokens, hidden, generator=generator).to(kind)

    def made() -> nn.ModuleDict:
        return bank(experts, hidden, inner, kind)

    layers: dict[str, Any] = {"floor": made()["experts"]}
    for name, library in run.libraries().items():
        if name == "inlay" or (dropout == 0 and adapters == 1 and len(banks) == 2):  # peft has no dropout there
            layers[name] = with_adapters(library, made(), 16, adapters, banks, dropout)

    def act(layer: Any) -> Callable[[], None]:
        return lambda: layer(x, index, weights).backward(cotangent)

    figures = run.alternate({n: act(layer) for n, layer in layers.items()}, rounds).figures(
        "inlay / floor", "peft / inlay", "peft / floor"
    )
    for name, layer in layers.items():
        held: list[Tensor] = [*layer.parameters(), *layer.buffers()]
        for parameter in layer.parameters():
            parameter.grad = None
        figures[f"peak bytes, {name}"] = Figure(allocated_bytes(act(layer))[0], unit="B")
        kept = kept_for_backward(partial(layer, x, index, weights), held)
        figures[f"bytes kept, {name}"] = Figure(kept, unit="B")
    return figures


def lora(name: str, dtype: str, *targets: Target, dropout: float = 0.0, adapters: int = 1, banks: Any = BANKS) -> Any:
    return row(
        f"expert bank {dtype} r16, {name}",
        what=f"{WHAT}; LoRA on {' and '.join(banks)}",
        floor=FLOOR,
        targets=targets,
        full={"dtype": dtype, "dropout": dropout, "adapters": adapters, "banks": banks, **FULL},
        quick=QUICK,
        slow=dtype == "float32" or adapters > 1 or banks != BANKS,
    )(step)


GOAL = at_most(None, 1.25)
bf16 = lora("p = 0", "bfloat16", GOAL)
bf16_dropout = lora("p = 0.1", "bfloat16", GOAL, dropout=0.1)
bf16_two = lora("two adapters", "bfloat16", GOAL, adapters=2)
bf16_down = lora("down_proj alone", "bfloat16", GOAL, banks=("down_proj",))
fp32 = lora("p = 0", "float32", GOAL)
fp32_dropout = lora("p = 0.1", "float32", GOAL, dropout=0.1)

if __name__ == "__main__":
    standalone(__spec__.name)
