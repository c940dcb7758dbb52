"""What ``explain`` says is what runs: base layers are called exactly where it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.plan import plan
from inlay.errors import StateError
from inlay.kinds.linear import Linear
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.lora import LoraConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.q = nn.Linear(6, 6)
        self.k = nn.Linear(6, 6, bias=False)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        return self.head(self.q(x) * self.k(x) + self.attention(x, x, x)[0])


TARGETS = ["table", "q", "k", "attention"]


def adapted(config: object) -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    inlay.inject(plan(model, config, "one"))
    return model


def paths(model: nn.Module) -> dict[str, str]:
    return {one.name: one.path for one in inlay.explain(model)}


def base_calls(model: nn.Module) -> set[str]:
    """Run the model, and return the layers whose base layer's forward ran; replaced, because hooks change the path."""
    called: set[str] = set()
    forward = nn.Linear.forward

    def noted(self: nn.Linear, x: Tensor) -> Tensor:
        called.update(name for name, module in model.named_modules() if module is self and name.endswith("base_layer"))
        return forward(self, x)

    nn.Linear.forward = noted  # type: ignore[method-assign]
    try:
        model(torch.tensor([[1, 2], [3, 4]])).sum().backward()
    finally:
        nn.Linear.forward = forward  # type: ignore[method-assign]
    return {name.removesuffix(".base_layer") for name in called}


def test_each_layer_has_a_path() -> None:
    model = adapted(LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"]))
    weights = {"attention": "weight", "attention.out_proj": "weight"}
    assert paths(model) == {"table": "generic", "q": "fused", "k": "fused", "head": "copy", **weights}
    found = inlay.explain(model)
    assert {one.name for one in found.slow} == {"table", *weights}
    assert "geometry" in str(found)
    assert "MultiheadAttention reads its weights" in str(found)


def test_base_layers_are_called_only_where_the_path_says_so() -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q", "k"]))
    assert base_calls(model) == set()  # the noted forward is the class's own, so the product is still made directly
    model.k.base_layer.register_forward_hook(lambda *_: None)
    assert paths(model) == {"q": "fused", "k": "fused update"}
    assert base_calls(model) == {"k"}
    model.q.base_layer.weight.requires_grad_(True)
    assert paths(model)["q"] == "fused update"
    assert "is being trained" in str(inlay.explain(model))
    assert base_calls(model) == {"q", "k"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "forward", layer.forward), "was replaced"),
        (lambda layer: layer.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda layer: torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()), "computed"),
    ],
    ids=["forward", "hook", "parametrization"],
)
def test_the_reason_names_what_was_done_to_the_base(change: object, reason: str) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q"]))
    change(model.q.base_layer)  # type: ignore[operator]
    (one,) = inlay.explain(model)
    assert (one.path, one.adapters) == ("fused update", ("one",))
    assert reason in (one.reason or "")


def test_methods_that_are_not_low_rank_say_so() -> None:
    (one,) = inlay.explain(adapted(FourierFTConfig(n_frequency=4, target_modules=["q"])))
    assert (one.path, one.reason) == ("generic", "the update is held as Dense, which has no rank to go through")
    model = adapted(LoraConfig(r=2, target_modules=["q"], use_dora=True))
    assert paths(model) == {"q": "fused"}
    inlay.inject(plan(model, LoraConfig(r=2, target_modules=["q"]), "two"))
    inlay.core.active.set_active(inlay.core.state.find_state(model), ["two", "one"])
    (one,) = inlay.explain(model)
    assert one.path == "generic"
    assert "DoRA has a forward pass of its own" in (one.reason or "")


def test_state_is_seen() -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q"]))
    state = inlay.core.state.find_state(model)
    with inlay.without_fast_paths():
        (one,) = inlay.explain(model)
        assert (one.path, one.reason) == ("generic", "fast paths are switched off")
    inlay.core.merge.merge(state)
    assert paths(model) == {"q": "base"}
    state.enabled = False
    state.touch()
    assert paths(model) == {"q": "weight"}


def test_a_kind_with_a_way_of_its_own_is_not_fused() -> None:
    class Named(Linear):
        name = "named"

    class Doubled(Linear):
        name = "doubled"

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2.0 * super().run(*args, **kwargs)

    model = adapted(LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    (layer,) = inlay.core.state.find_state(model).layers()
    x = torch.randn(3, 6)
    update = x @ layer.get_delta_weight("one").T
    for kind, path, times in ((Named(), "fused", 1), (Doubled(), "generic", 2)):
        layer.__dict__["kind"] = kind
        layer.state.touch()
        assert paths(model) == {"q": path}
        assert torch.allclose(layer(x), layer.base_layer(x) + times * update, atol=1e-6)


def test_a_bare_model_is_refused() -> None:
    with pytest.raises(StateError, match="Block has no adapters"):
        inlay.explain(Block())
