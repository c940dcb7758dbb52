"""Functions between the layers of a network, by the names that transformers has for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS"]

# Those that have parameters of their own are not among them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(["gelu", "gelu_python"], functional.gelu),
    **dict.fromkeys(
        ["gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"],
        partial(functional.gelu, approximate="tanh"),
    ),
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "hardswish": functional.hardswish,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "prelu": partial(functional.leaky_relu, negative_slope=0.25),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    **dict.fromkeys(["silu", "swish"], functional.silu),
    "tanh": torch.tanh,
}
