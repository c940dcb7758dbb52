"""One Llama layer with adapters on its seven linear layers: what the rows about training measure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Run
from benchmarks.models import llama


@dataclass(frozen=True)
class Block:
    """A frozen Llama layer and its input, which is where gradients end: what remains of a step without adapters.

    Attributes:
        base: ``LlamaForCausalLM`` of one layer.
        x: (batch, sequence, hidden), requires a gradient.
        position: the rotary embedding's cosine and sine.
    """

    base: nn.Module
    x: Tensor
    position: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, dtype: torch.dtype, hidden: int, inner: int, tokens: int) -> Block:
        """Weights and inputs are drawn anew from a fixed seed; the sequences have 128 tokens."""
        torch.manual_seed(0)
        base = llama(1, hidden, inner).to(dtype).requires_grad_(False)
        x = torch.randn(tokens // 128, 128, hidden, dtype=dtype, requires_grad=True)
        return cls(base, x, base.model.rotary_emb(x, torch.arange(128)[None]))

    def adapted(self, library: Any, *, autocast: bool = True, compute: str = "base", **config: Any) -> nn.Module:
        """A copy with LoRA from ``library``, its parameters small random numbers that every dtype can hold.

        ``compute`` is Inlay's policy: products of adapters in the base's dtype or in the adapter's, as in peft.
        """
        model, made = copy.deepcopy(self.base), library.LoraConfig(target_modules="all-linear", **config)
        if compute == "base":
            model = library.get_peft_model(model, made, autocast_adapter_dtype=autocast)
        else:
            from inlay.core.policy import INLAY
            from inlay.models.entry import wrap

            model = wrap(model, made, "default", policy=replace(INLAY, compute=compute), autocast=autocast)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_A" in name or "lora_B" in name:
                    drawn = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.copy_(drawn.to(torch.bfloat16))
        return model.train()

    def variants(self, run: Run, **config: Any) -> dict[str, nn.Module]:
        """The models that a row compares: Inlay as it is and with fp32 products, peft as it is and without autocast."""
        half = self.x.dtype != torch.float32
        models = {"floor": self.base.train()}
        for name, library in run.libraries().items():
            models[name] = self.adapted(library, **config)
            if half and name == "inlay":
                models["inlay fp32 products"] = self.adapted(library, compute="adapter", **config)
            if half and name == "peft":
                models["peft bf16 adapters"] = self.adapted(library, autocast=False, **config)
        return models

    def layer(self, model: nn.Module) -> nn.Module:
        """The one decoder layer of a model, wrapped or bare."""
        return next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")

    def forward(self, layer: Callable[..., Any]) -> Tensor:
        out = layer(self.x, position_embeddings=self.position)
        return out[0] if isinstance(out, tuple) else out

    def step(self, layer: Callable[..., Any]) -> None:
        """Forward and backward; gradients accumulate, as between two steps of an optimiser."""
        self.forward(layer).sum().backward()


def gradients(block: Block, model: nn.Module) -> dict[str, Tensor]:
    """The output and every gradient of one step, by name: ``output``, ``x``, and the parameters' from the layer on."""
    block.x.grad = None
    layer = block.layer(model)
    layer.zero_grad()
    out = block.forward(layer)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    out.backward(weights)
    assert block.x.grad is not None
    found = {"output": out.detach(), "x": block.x.grad}
    found.update({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    block.x.grad = None
    return found


def exact(block: Block, model: nn.Module, scale: float, dora: bool = False) -> dict[str, Tensor]:
    """What ``gradients`` would be in fp64, by the definition of LoRA alone: the layer with the weights V = W + s B A.

    The gradients of the factors follow from that of the weight: dA = s B^T dV and dB = s dV A^T. With DoRA
    (arXiv:2402.09353) the weight is m V / |V|, row by row, the norm a constant; m's gradient is the sum of dW V / |V|.
    """
    double = copy.deepcopy(block.base).double()
    layer, parts = block.layer(double), {}
    values = {name: value.detach().double() for name, value in block.layer(model).named_parameters()}
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            a, b = values[f"{path}.lora_A.default.weight"], values[f"{path}.lora_B.default.weight"]
            adapted = module.weight + scale * (b @ a)
            norm = adapted.norm(dim=1, keepdim=True) if dora else adapted.new_ones(len(adapted), 1)
            m = values[f"{path}.lora_magnitude_vector.default.weight"].view(-1, 1) if dora else norm
            parts[path] = (a, b, adapted, norm, m)
            module.weight = nn.Parameter(m * adapted / norm)
    x = block.x.detach().double().requires_grad_()
    cosine, sine = block.position
    found = gradients(Block(double, x, (cosine.double(), sine.double())), double)
    for path, (a, b, adapted, norm, m) in parts.items():
        weight = found.pop(f"{path}.weight")
        if dora:
            found[f"{path}.lora_magnitude_vector.default.weight"] = (weight * adapted / norm).sum(1)
        weight = weight * m / norm
        found[f"{path}.lora_A.default.weight"] = scale * (b.T @ weight)
        found[f"{path}.lora_B.default.weight"] = scale * (weight @ a.T)
    return found


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors in the Frobenius norm: of the output, and of the gradients (root of the mean square of all)."""
    if missing := right.keys() - found.keys():
        raise ValueError(f"no gradient came for {', '.join(sorted(missing))}")
    relative = {name: float((found[name].double() - value).norm() / value.norm()) for name, value in right.items()}
    output = relative.pop("output")
    return output, (sum(value**2 for value in relative.values()) / len(relative)) ** 0.5
