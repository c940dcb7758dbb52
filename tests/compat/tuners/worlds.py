"""One source text, run against the real peft and against Inlay's namespace of it."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from inlay.core import registry

THEIRS, OURS = "peft", "inlay.compat.peft"
BOTH = (THEIRS, OURS)


def run(source: str, root: str) -> SimpleNamespace:
    """Execute ``source``, which imports from ``peft``, with the namespace ``root`` in its place; return its names."""
    text = re.sub(r"\bfrom peft\b", f"from {root}", source)
    text = re.sub(r"^import peft$", f"import {root} as peft", text, flags=re.MULTILINE)
    name = f"source_{abs(hash((source, root)))}_of_{root.replace('.', '_')}"
    module = ModuleType(name)
    sys.modules[name] = module  # pickle finds classes there
    exec(compile(text, name, "exec"), module.__dict__)
    return SimpleNamespace(**module.__dict__)


def add_method(root: str, name: str) -> None:
    """Give ``PeftType`` a further member, which is what PEFT wants before a method can be registered."""
    enum = importlib.import_module(f"{root}.utils.peft_types").PeftType
    if name in enum.__members__:
        return
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[name] = member


def drop_methods(root: str, *names: str) -> None:
    """Undo :func:`add_method` and what was registered under the names: other tests compare the registries."""
    enum = importlib.import_module(f"{root}.utils.peft_types").PeftType
    mapping = importlib.import_module(f"{root}.mapping")
    for name in names:
        for table in ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX"):
            held = getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING")
            if isinstance(held, dict):
                held.pop(name, None)
        if name in enum.__members__:
            del enum._member_map_[name], enum._value2member_map_[name]
            enum._member_names_.remove(name)
        for registered in (registry._methods, registry._tuners):
            registered.pop(name, None)


class Net(nn.Module):
    """Three linear layers, one of them nested, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.first(x)))


def inputs() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def fill(model: nn.Module, seed: int = 2) -> None:
    """Give everything that adapters hold values that depend on its name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("gain_", "lora_", "modules_to_save", "bank")):
                generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Train what trains, and return the losses."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = (model(inputs()) ** 2).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    return losses
