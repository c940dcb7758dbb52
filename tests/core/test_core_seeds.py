"""Initial values depend on seed, site and slot alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_models import Net, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.slot import KaimingUniform, Normal, generator_for
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig

CONFIGS: dict[str, Any] = {
    "lora": lambda **fields: LoraConfig(r=3, init_lora_weights=False, **fields),
    "loha": lambda **fields: LoHaConfig(r=3, init_weights=False, **fields),
    "vera": lambda **fields: VeraConfig(r=3, init_weights=False, **fields),
}
PATHS = ["layers.0.q", "layers.1.q", "layers.2.q", "layers.0.k", "first"]


def values(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key.replace(name, "*"): t.detach().clone() for key, t in model.state_dict().items() if f".{name}" in key}


def drawn(config: Any, name: str = "x", seed: int = 5, model: Net | None = None) -> dict[str, Tensor]:
    model = model or net()
    inject(plan(model, config, name), seed=seed)
    return values(model, name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


@pytest.mark.parametrize("method", CONFIGS)
@given(order=st.permutations(PATHS), count=st.integers(1, len(PATHS)), noise=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_not_on_order_other_layers_or_the_global_stream(method: str, order: list[str], count: int, noise: int) -> None:
    whole = drawn(CONFIGS[method](target_modules=PATHS))
    torch.manual_seed(noise)
    some = drawn(CONFIGS[method](target_modules=order[:count]))
    assert_equal(some, {key: whole[key] for key in some})


@pytest.mark.parametrize("method", CONFIGS)
def test_not_on_the_name_or_on_other_adapters(method: str) -> None:
    alone = drawn(CONFIGS[method](target_modules=PATHS))
    model = net()
    inject(plan(model, LoraConfig(r=7, target_modules=["q", "attn_k"]), "earlier"), seed=1)
    assert_equal(drawn(CONFIGS[method](target_modules=PATHS), "later", model=model), alone)


def test_not_on_the_base_s_dtype_beyond_rounding() -> None:
    exact = drawn(CONFIGS["lora"](target_modules=PATHS))
    assert_equal(drawn(CONFIGS["lora"](target_modules=PATHS), model=net().bfloat16()), exact)  # kept in float32


def test_the_seed_and_the_site_and_the_slot_matter() -> None:
    first = drawn(CONFIGS["lora"](target_modules=PATHS), seed=5)
    other = drawn(CONFIGS["lora"](target_modules=PATHS), seed=6)
    tensors = [t for values in (first, other) for key, t in values.items() if not key.startswith("twin")]
    assert (
        len(first) == len(other) == 2 * (len(PATHS) + 1)
    )  # `first` stands in the state dict under its second path too
    for i, tensor in enumerate(tensors):
        for earlier in tensors[:i]:
            assert tensor.shape != earlier.shape or not torch.equal(tensor, earlier)


def test_by_default_the_seed_is_torch_s_and_its_stream_is_left_alone() -> None:
    torch.manual_seed(11)
    model = net()
    stream = torch.get_rng_state()
    inject(plan(model, CONFIGS["lora"](target_modules=PATHS), "x"))
    assert torch.equal(torch.get_rng_state(), stream)
    assert_equal(values(model, "x"), drawn(CONFIGS["lora"](target_modules=PATHS), seed=11))


def test_the_dropin_draws_from_the_global_stream_as_peft_does() -> None:
    def once() -> dict[str, Tensor]:
        model = net()
        torch.manual_seed(3)
        inject(plan(model, CONFIGS["lora"](target_modules=PATHS), "x", policy=PEFT), seed=5)
        return values(model, "x")

    assert_equal(once(), once())
    assert not torch.equal(torch.rand(3), torch.rand(3))


def test_distributions_are_what_they_say() -> None:
    """Bounds and moments of 40,000 draws, against the formulas of He et al. (2015)."""
    tensor = torch.empty(200, 200)
    KaimingUniform()(tensor, generator_for(0, "site", "slot"))
    bound = (1 / 200) ** 0.5  # gain(sqrt 5) * sqrt(3 / fan_in)
    assert 0.99 * bound < float(tensor.abs().max()) <= bound
    assert abs(float(tensor.mean())) < 4 * bound / (3 * 40_000) ** 0.5
    reference = torch.empty(200, 200)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert abs(float(reference.abs().max()) - float(tensor.abs().max())) < 1e-3 * bound
    Normal(0.25)(tensor, generator_for(0, "site", "slot"))
    assert abs(float(tensor.std()) - 0.25) < 4 * 0.25 / (2 * 40_000) ** 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_not_on_the_device() -> None:
    found = drawn(CONFIGS["lora"](target_modules=PATHS), model=net().cuda())
    assert all(tensor.is_cuda for tensor in found.values())
    assert_equal({key: tensor.cpu() for key, tensor in found.items()}, drawn(CONFIGS["lora"](target_modules=PATHS)))
