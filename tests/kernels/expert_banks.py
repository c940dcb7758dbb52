"""Modules of experts from transformers, small, with adapters on their banks."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.nest import rewritten
from inlay.core.plan import plan
from inlay.core.state import State
from inlay.methods.lora import LoraConfig

EXPERTS, IN, INNER = 6, 16, 12

# class -> what is particular: biases and (in, out) storage, a norm behind each expert, no gate, clamps, plain
CLASSES: dict[str, str] = {
    "GptOssExperts": "gpt_oss",
    "MuseSparkExperts": "muse_spark",
    "NemotronHExperts": "nemotron_h",
    "DeepseekV4Experts": "deepseek_v4",
    "AriaExperts": "aria",
    "MixtralExperts": "mixtral",
    "Qwen3MoeExperts": "qwen3_moe",
}
_CONFIG = {
    **dict.fromkeys(["hidden_size", "moe_hidden_size"], IN),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], INNER),
    **dict.fromkeys(["hidden_act", "mlp_hidden_act"], "silu"),
    "moe_latent_size": None,
    "swiglu_alpha": 1.7,
    "swiglu_limit": 1.0,
    "post_norm_eps": 1e-5,
}


def experts(name: str, way: str = "eager", dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Return a module of experts of that class, run the way that ``experts_implementation`` says."""
    folder = CLASSES.get(name, "llama4")
    cls = getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    torch.manual_seed(0)
    module: nn.Module = cls(SimpleNamespace(**(_CONFIG | changes), _experts_implementation=way))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


def banks(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def adapted(module: nn.Module, ranks: tuple[int, ...] = (2, 3), targets: Any = None, **options: Any) -> Any:
    """Put an adapter of each rank over a module of experts, all of them active; returns (adapted module, state)."""
    holder = nn.ModuleDict({"experts": module})
    state: State | None = None
    names = [chr(ord("a") + i) for i in range(len(ranks))]
    for i, (name, r) in enumerate(zip(names, ranks, strict=True)):
        config = LoraConfig(
            r=r,
            lora_alpha=3,
            target_modules=[],
            target_parameters=targets or banks(module),
            init_lora_weights=False,
            **options,
        )
        state = inject(plan(holder, config, name), seed=i)
    assert state is not None
    set_active(state, names, True)
    return holder["experts"], state


def routed(tokens: int = 24, chosen: int = 3, dtype: torch.dtype = torch.float64, among: int = EXPERTS - 1) -> Any:
    """Return tokens, their experts and weights; the last expert is nobody's choice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    order = torch.rand(tokens, among, generator=generator).argsort(1)
    weights = torch.rand(tokens, chosen, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, order[:, :chosen], weights


def with_gradients(layer: nn.Module, inputs: Any, seed: int = 2) -> dict[str, Tensor]:
    """Run forward and backward; returns the output and every gradient, by name."""
    y = layer(*inputs)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    trained |= {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.autograd.grad(y, list(trained.values()), cotangent.to(y.dtype))
    return {"output": y.detach(), **dict(zip(trained, found, strict=True))}


def nested(layer: Any) -> list[Any]:
    from inlay.core.parameter import parameter_layers

    return list(parameter_layers(layer))


def by_hand(layer: Any) -> nn.Module:
    """Return a copy of the module with the active adapters written into its parameters."""
    import copy

    module = copy.deepcopy(layer.get_base_layer())
    for one in nested(layer):
        for name, tensor in rewritten(one, one.chain(), False).items():
            module._parameters[name] = nn.Parameter(tensor.detach())
    return module
