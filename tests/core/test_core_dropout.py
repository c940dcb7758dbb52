"""Dropout: on the adapters' input only, in training only, the same under gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_models import Net, net, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.errors import UnsupportedError
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.oft import OFTConfig
from inlay.methods.vera import VeraConfig

CONFIGS: dict[str, Any] = {
    "lora": lambda p: LoraConfig(r=3, lora_dropout=p, target_modules=["q", "first"]),
    "dora": lambda p: LoraConfig(r=3, lora_dropout=p, use_dora=True, target_modules=["q", "first"]),
    "vera": lambda p: VeraConfig(r=3, vera_dropout=p, target_modules=["q"]),
    "loha_module": lambda p: LoHaConfig(r=3, module_dropout=p, target_modules=["q", "first"]),
    "loha_rank": lambda p: LoHaConfig(r=3, rank_dropout=p, target_modules=["q", "first"]),
    "oft_module": lambda p: OFTConfig(oft_block_size=3, module_dropout=p, target_modules=["q", "first"]),
}


def adapted(method: str, p: float, size: float = 0.4) -> Net:
    """A model whose adapter has an effect, unless ``size`` is 0."""
    model = net()
    inject(plan(model, CONFIGS[method](p)), seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", CONFIGS)
def test_none_in_eval_mode(method: str) -> None:
    model, plain = adapted(method, 0.5).eval(), adapted(method, 0.0)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_fresh_adapter_changes_nothing_whatever_is_dropped(method: str) -> None:
    model = adapted(method, 0.5, size=0.0)
    assert torch.allclose(model(tokens()), net()(tokens()), atol=1e-5)


@pytest.mark.parametrize("p", [0.25, 0.6])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_expectation_is_the_output_without(method: str, p: float) -> None:
    """The update is linear in its dropped input, so the mean of one layer over many masks is the update itself."""
    layer, plain = adapted(method, p).layers[0].q, adapted(method, 0.0).layers[0].q
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    with torch.no_grad():
        many = layer(x.expand(40_000, 6))
        expected = plain(x)
    error = 5 * many.std(dim=0) / 40_000**0.5
    assert bool(((many.mean(dim=0) - expected[0]).abs() <= error + 1e-6).all())
    assert float(many.std(dim=0).min()) > 1e-3


def gradients(model: Net, reentrant: bool | None) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    x = model.embed(tokens()).detach().requires_grad_()

    def block(x: Tensor) -> Tensor:
        return model.first(model.layers[0](x))

    torch.manual_seed(9)
    y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    torch.rand(7)  # the stream moves on between forward and backward
    y.sin().sum().backward()
    assert x.grad is not None
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_recomputed_block_drops_the_same(method: str, reentrant: bool) -> None:
    model = adapted(method, 0.5)
    expected, found = gradients(model, None), gradients(model, reentrant)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_where_only_a_weight_changes_dropout_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0\.5"):
        plan(net(), LoraConfig(lora_dropout=0.5, target_modules=["norm"]))
