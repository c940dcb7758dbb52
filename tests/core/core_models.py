"""Small models for tests of the core, and a full record of what a model is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import State
from inlay.methods.lora import LoraConfig
from inlay.methods.oft import OFTConfig


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.attn_k = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.q(x)) * self.k(x) + self.attn_k(x))


class Net(nn.Module):
    """An embedding, blocks, and a head that shares nothing; ``twin`` is ``first`` under a second name."""

    def __init__(self, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.first = nn.Linear(width, width)
        self.twin = self.first
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.first(x) + self.twin(x).sin())

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def net(blocks: int = 3, width: int = 6) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(blocks, width)


def tokens() -> Tensor:
    return torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 2, 4, 6]])


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that may not change when an operation fails: objects, flags, bytes, and the adapters' own records."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state = module.__dict__.get("_state")
        found[f"module {name}"] = (id(module), type(module), module.training, sorted(module.__dict__))
        if "entries" in module.__dict__:
            entries = {key: tuple(map(id, held)) for key, held in module.__dict__["entries"].items()}
            found[f"entries {name}"] = (entries, module.__dict__["_merged"], sorted(module.__dict__["_kept"]))
        if state is not None:
            found["state"] = (
                id(state),
                list(state.records),
                state.active,
                state.enabled,
                sorted(state.base_values),
                state.base_grad,
                len(list(state.layers())),
                list(state.shared.state_dict()),
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, _bytes(parameter))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = (id(buffer), _bytes(buffer))
    return found


def _bytes(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return tensor.shape
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


CONFIGS = {
    "a": lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["q", "first"], init_lora_weights=False),
    "b": lambda: LoraConfig(r=3, lora_alpha=3, target_modules=["q", "k"], init_lora_weights=False),
    "turn": lambda: OFTConfig(oft_block_size=3, target_modules=["q"], init_weights=False),
}


def adapted(*names: str) -> tuple[torch.nn.Module, State]:
    model = net()
    state = None
    for name in names:
        state = inject(plan(model, CONFIGS[name](), name), seed=3)
    assert state is not None
    if "turn" in names:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "oft_R" in name:
                    parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return model, state
