"""A small model whose samples ask for different adapters, and the oracle for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import BASE, State
from inlay.kernels.switch import without_fast_paths
from inlay.methods.lora import LoraConfig

WIDTH, OUT = 12, 10
RANKS = {"a": 4, "b": 3, "c": 7}
MIXED = ("a", "c", BASE, "b", "a", "b", "c", "elsewhere")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, OUT)
        self.last = nn.Linear(OUT, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def subject(dtype: torch.dtype = torch.float64, policy: Any = None, **options: Any) -> tuple[nn.Module, State]:
    """Two layers with adapters of different ranks and scales; ``elsewhere`` is on the last one only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Two().to(dtype)
        state: Any = None
        for i, (name, r) in enumerate([*RANKS.items(), ("elsewhere", 2)]):
            config = LoraConfig(
                r=r,
                lora_alpha=r * (i + 1),
                init_lora_weights=False,
                target_modules=["last"] if name == "elsewhere" else ["first", "last"],
                **options,
            )
            keywords = {} if policy is None else {"policy": policy}
            state = inject(plan(model, config, name, **keywords), seed=i)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        set_active(state, [*RANKS, "elsewhere"], trainable=True)
    return model, state


def batch(dtype: torch.dtype, *inner: int, samples: int = len(MIXED)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, *inner, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@contextmanager
def alone() -> Iterator[None]:
    """The oracle: a sub-batch for each adapter, by plain operators that autograd differentiates."""
    with without_fast_paths():
        yield


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    (y.double() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["x"] = x.grad
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    return {"y": y.detach(), **found}


def run(
    model: nn.Module,
    state: State,
    x: Tensor,
    names: Sequence[str] = MIXED,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor | None]:
    with opened(state, names=names), around():
        y = model(x) if forward is None else forward(x)
    return gradients(model, x, y)


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other is None) == (tensor is None), name
        if tensor is not None and other is not None:
            assert other.dtype == tensor.dtype, name
            size = max(float(tensor.abs().max()) if tensor.numel() else 0.0, 1e-3)
            torch.testing.assert_close(other.double(), tensor.double(), rtol=0, atol=tolerance * size, msg=name)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}
