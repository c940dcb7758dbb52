"""One small model with several adapters, once in PEFT and once in Inlay, with equal values."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

import inlay
from inlay.core.layer import AdaptedLayer

KINDS = ["linear", "conv1d_hf", "conv1d", "conv2d", "conv2d_pointwise", "conv2d_grouped", "conv3d", "embedding"]


class Net(nn.Module):
    """A layer to adapt, ``layer``, a second one, ``other``, and one beside them, ``head``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layer(x, x, x)[0] if isinstance(x, Tensor) and self.attention else self.layer(x)
        return first, self.head(self.other(y))

    @property
    def attention(self) -> bool:
        return "Attention" in type(getattr(self.layer, "base_layer", self.layer)).__name__


def made_layer(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a layer of a kind and an input for it."""
    from transformers.pytorch_utils import Conv1D

    if kind == "embedding":
        return nn.Embedding(13, 8), torch.randint(13, (3, 4))
    layers: dict[str, Any] = {
        "linear": lambda: (nn.Linear(12, 8), (3, 12)),
        "conv1d_hf": lambda: (Conv1D(8, 12), (3, 12)),
        "conv1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 7)),
        "conv2d": lambda: (nn.Conv2d(4, 8, (3, 2)), (2, 4, 5, 5)),
        "conv2d_pointwise": lambda: (nn.Conv2d(8, 10, 1), (2, 8, 4, 4)),
        "conv2d_grouped": lambda: (nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 5)),
        "conv3d": lambda: (nn.Conv3d(4, 8, (2, 1, 3)), (2, 4, 3, 3, 4)),
        "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8)),
    }
    layer, shape = layers[kind]()
    return layer, torch.randn(shape)


def lora(**fields: Any) -> dict[str, Any]:
    return {"target_modules": ["layer"], "lora_alpha": 6, **fields}


class Pair:
    """``theirs`` and ``ours``: wrappers around equal models with the adapters ``a``, ``b``, ...

    Args:
        kind: of the layer that stands at ``layer``.
        fields: of each adapter's configuration.
        method: the configuration's class, by name.
    """

    def __init__(self, kind: str, *fields: dict[str, Any], method: str = "LoraConfig", dtype: Any = None) -> None:
        torch.manual_seed(0)
        layer, self.x = made_layer(kind)
        self.y = torch.randn(2, 6)
        net = Net(layer).eval()
        if dtype is not None:
            net.to(dtype)
        self.theirs: Any = None
        self.ours: Any = None
        for name, given in zip("abcd", fields, strict=False):
            configs = [getattr(module, method)(**copy.deepcopy(given)) for module in (peft, inlay)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.ours is None:
                    self.theirs = peft.get_peft_model(copy.deepcopy(net), configs[0], name).eval()
                    self.ours = inlay.get_peft_model(copy.deepcopy(net), configs[1], name).eval()
                else:
                    self.theirs.add_adapter(name, configs[0])
                    self.ours.add_adapter(name, configs[1])
        self.equalise()

    def equalise(self) -> None:
        """Move all adapters off their initial values, alike on both sides."""
        generator = torch.Generator().manual_seed(7)
        mine = dict(self.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in self.theirs.named_parameters():
                if any(mark in name for mark in ("lora_", "ia3_", "modules_to_save", "trainable_tokens")):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
                    mine[name].copy_(parameter)

    def both(self, call: Any) -> list[Any]:
        """Run a call on each side and return the errors, None where there was none."""
        errors: list[Any] = []
        for model in (self.theirs, self.ours):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(model)
                errors.append(None)
            except Exception as error:
                errors.append(error)
        return errors

    def combine(self, *args: Any, **kwargs: Any) -> None:
        """Combine on both sides, into ``new``, and activate it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.theirs.add_weighted_adapter(*args, **kwargs)
            self.ours.add_weighted_adapter(*args, **kwargs)
        self.theirs.set_adapter("new")
        self.ours.set_adapter("new")

    def outputs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return self.theirs(self.x, self.y), self.ours(self.x, self.y)


def layer_of(model: Any, path: str = "layer") -> AdaptedLayer:
    return next(m for m in model.modules() if isinstance(m, AdaptedLayer) and m.site.name == path)


def factors(model: Any, name: str, path: str = "layer") -> tuple[Tensor, Tensor, float]:
    """Return an adapter's B (groups, out / groups, n), A (groups, n, fan_in) in float64, and its scale."""
    layer = layer_of(model, path)
    entry = layer.entries[name][0]
    p = layer.params(entry)
    groups = layer.site.groups
    B, A = p.B.detach().double().flatten(1), p.A.detach().double().flatten(1)
    return B.unflatten(0, (groups, -1)), A.unflatten(0, (groups, -1)), float(entry.options["scaling"])


def update(model: Any, name: str, path: str = "layer") -> Tensor:
    """Return an adapter's scaled update (groups, out / groups, fan_in), in float64."""
    B, A, scale = factors(model, name, path)
    return B @ A * scale
