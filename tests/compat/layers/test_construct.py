"""Layers that users construct themselves, by the same call from peft and from Inlay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_twins import INPUTS, OURS, PEFT, Bank, get
from torch import nn

Make = Callable[[str, nn.Module, str], Any]


def lora(cls: str, **fields: Any) -> Make:
    def make(library: str, base: nn.Module, name: str) -> Any:
        config = get(library, "LoraConfig")(**fields)
        return get(library, f"tuners.lora.layer.{cls}")(base, name, config=config, r=2, lora_alpha=16)

    return make


def vera(library: str, base: nn.Module, name: str) -> Any:
    buffers = get(library, "tuners._buffer_dict.BufferDict")
    torch.manual_seed(7)
    A, B = torch.randn(4, 9), torch.randn(8, 4)
    config = get(library, "VeraConfig")(r=4)
    return get(library, "tuners.vera.layer.Linear")(base, buffers({name: A}), buffers({name: B}), name, config, r=4)


def tokens(library: str, base: nn.Module, name: str) -> Any:
    config = get(library, "TrainableTokensConfig")(token_indices=[1, 3])
    layer = get(library, "tuners.trainable_tokens.layer.TrainableTokensLayer")(base, name, config)
    layer.update_layer(name, config)
    return layer


def other(cls: str, config: str, fields: dict[str, Any], **arguments: Any) -> Make:
    return lambda library, base, name: get(library, cls)(base, name, config=get(library, config)(**fields), **arguments)


CONSTRUCTED: dict[str, tuple[str, Make]] = {
    "lora.Linear": ("lin", lora("Linear")),
    "lora.Linear dora": ("lin", lora("Linear", use_dora=True)),
    "lora.Linear options": ("lin", lora("Linear", use_rslora=True, lora_bias=True)),
    "lora.Embedding": ("emb", lora("Embedding")),
    "lora.Conv1d": ("conv1", lora("Conv1d")),
    "lora.Conv2d": ("conv", lora("Conv2d")),
    "lora.MultiheadAttention": ("mha", lora("MultiheadAttention")),
    "lora.ParamWrapper": (
        "exp",
        other("tuners.lora.layer.ParamWrapper", "LoraConfig", {}, parameter_name="w", r=2, lora_alpha=16),
    ),
    "ia3.Linear": ("lin", other("tuners.ia3.layer.Linear", "IA3Config", {"feedforward_modules": []})),
    "ia3.Linear input": (
        "lin",
        other("tuners.ia3.layer.Linear", "IA3Config", {"feedforward_modules": []}, is_feedforward=True),
    ),
    "ia3.Conv2d": ("conv", other("tuners.ia3.layer.Conv2d", "IA3Config", {"feedforward_modules": []})),
    "loha.Linear": ("lin", other("tuners.loha.layer.Linear", "LoHaConfig", {}, r=2, alpha=3)),
    "loha.Conv2d": ("conv", other("tuners.loha.layer.Conv2d", "LoHaConfig", {}, r=2, alpha=3)),
    "oft.Linear": ("lin", other("tuners.oft.layer.Linear", "OFTConfig", {"oft_block_size": 2}, r=0)),
    "vera.Linear": ("lin", vera),
    "fourierft": ("lin", other("tuners.fourierft.layer.FourierFTLinear", "FourierFTConfig", {}, n_frequency=5)),
    "ln_tuning": ("ln", other("tuners.ln_tuning.layer.LNTuningLayer", "LNTuningConfig", {})),
    "trainable_tokens": ("emb", tokens),
}


def bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "lin": nn.Linear(6, 4),
        "emb": nn.Embedding(10, 6),
        "conv": nn.Conv2d(4, 4, 3),
        "conv1": nn.Conv1d(4, 6, 3),
        "mha": nn.MultiheadAttention(8, 2, batch_first=True),
        "ln": nn.LayerNorm(6),
        "exp": Bank(),
    }


def first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def randomise(layer: nn.Module, *others: nn.Module) -> None:
    """Give layers the same random adapter weights."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.split(".")[-2 if "base_layer" in name else -1 :] or "base_layer" in name.split(".")[-2:]:
                continue
            if name.startswith("base_layer.") and "lora" not in name:
                continue
            parameter.add_(torch.randn_like(parameter) * 0.3)
            for twin in others:
                dict(twin.named_parameters())[name].copy_(parameter)


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_constructed_layer_is_peft_s(name: str) -> None:
    kind, make = CONSTRUCTED[name]
    theirs, ours = make(PEFT, bases()[kind], "default").eval(), make(OURS, bases()[kind], "default").eval()
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    randomise(theirs, ours)
    x = INPUTS[kind]()
    expected = first(theirs(*x))
    assert torch.allclose(first(ours(*x)), expected, atol=1e-5)
    assert ours.active_adapters == theirs.active_adapters
    ours.merge()
    assert torch.allclose(first(ours(*x)), expected, atol=1e-5)
    ours.unmerge()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert torch.equal(first(twin(*x)), first(ours(*x)))
        assert twin.state is not ours.state


@pytest.mark.parametrize("name", [name for name in CONSTRUCTED if name.startswith(("lora", "loha", "ia3"))])
def test_a_further_adapter(name: str) -> None:
    kind, make = CONSTRUCTED[name]
    made = []
    for library in (PEFT, OURS):
        layer = make(library, bases()[kind], "default").eval()
        if name.startswith("lora"):
            layer.update_layer("other", 4, lora_alpha=8, config=get(library, "LoraConfig")(use_rslora=True))
        elif name.startswith("loha"):
            layer.update_layer("other", 4, alpha=8, config=get(library, "LoHaConfig")())
        else:
            layer.update_layer("other", config=get(library, "IA3Config")(feedforward_modules=[]))
        made.append(layer)
    theirs, ours = made
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    gradients = [{n: p.requires_grad for n, p in layer.named_parameters()} for layer in made]
    assert gradients[0] == gradients[1]
    randomise(theirs, ours)
    x = INPUTS[kind]()
    for active in ("other", "default", ["default", "other"]):
        for layer in made:
            layer.set_adapter(active)
            if kind == "mha":
                layer.base_layer.out_proj.set_adapter(active)
        assert torch.allclose(first(ours(*x)), first(theirs(*x)), atol=1e-5)
    if name.startswith("lora"):
        assert (dict(ours.r), dict(ours.scaling)) == (theirs.r, theirs.scaling)


def test_update_layer_on_a_layer_of_a_model() -> None:
    import inlay

    torch.manual_seed(0)
    config = inlay.LoraConfig(target_modules=["0", "1"])
    model = inlay.inject_adapter_in_model(config, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    for layer in model:
        layer.update_layer("other", 2, 4, config=inlay.LoraConfig())
    assert set(model[0].state.records) == {"default", "other"}
    assert dict(model[1].r) == {"default": 8, "other": 2}
    model[0].lora_B["other"].weight.data.normal_()
    x = torch.randn(2, 3)
    before = model(x)
    model[0].set_adapter("other")
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("library", [PEFT, OURS])
def test_what_peft_refuses(library: str) -> None:
    linear, config = get(library, "tuners.lora.layer.Linear"), get(library, "LoraConfig")()
    with pytest.raises(ValueError, match="r"):
        linear(nn.Linear(3, 3), "default", config=config)  # r is 0 unless it is given
    with pytest.raises(TypeError):
        linear(nn.Linear(3, 3), "default")
    with pytest.raises(NotImplementedError):
        get(library, "tuners.tuners_utils.BaseTunerLayer")().merge()


def test_what_has_no_such_layer_is_refused() -> None:
    from inlay.errors import ConfigTypeError, TargetError

    config = get(OURS, "LoraConfig")()
    with pytest.raises(TargetError, match="Conv2d"):
        get(OURS, "tuners.lora.layer.Linear")(nn.Conv2d(1, 1, 1), "default", config=config, r=2)
    with pytest.raises(ConfigTypeError, match="IA3Config"):
        get(OURS, "tuners.ia3.layer.Linear")(nn.Linear(2, 2), "default", config=config)
    with pytest.raises(TargetError, match="Did you mean"):
        get(OURS, "tuners.lora.layer.ParamWrapper")(Bank(), "default", "ww", config=config, r=2)


@pytest.mark.parametrize("kind", ["lin", "emb", "conv", "conv1", "mha"])
def test_dispatch_default(kind: str) -> None:
    made = []
    for library in (PEFT, OURS):
        config = get(library, "LoraConfig")()
        dispatch = get(library, "tuners.lora.layer.dispatch_default")
        made.append(dispatch(bases()[kind], "default", config, r=2, lora_alpha=4))
        assert dispatch(nn.ReLU(), "default", config, r=2, lora_alpha=4) is None
    assert type(made[1]).__name__ == type(made[0]).__name__
    assert dict(made[1].scaling) == {"default": 2.0}


def test_dispatch_corrects_fan_in_fan_out() -> None:
    from transformers.pytorch_utils import Conv1D

    for library in (PEFT, OURS):
        config = get(library, "LoraConfig")()
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            layer = get(library, "tuners.lora.layer.dispatch_default")(Conv1D(4, 3), "default", config, r=2)
        assert config.fan_in_fan_out is True
        assert layer.is_target_conv_1d_layer is True
        assert layer(torch.randn(2, 3)).shape == (2, 4)


def test_adapters_by_sample() -> None:
    for name in ("lora.Linear", "lora.Embedding", "lora.Conv2d"):
        kind, make = CONSTRUCTED[name]
        made = []
        for library in (PEFT, OURS):
            layer = make(library, bases()[kind], "default").eval()
            layer.update_layer("other", 4, lora_alpha=8, config=get(library, "LoraConfig")())
            made.append(layer)
        randomise(*made)
        x = INPUTS[kind]()[0]
        names = ["__base__", "default", "other"][: len(x)]
        assert torch.allclose(made[1](x, adapter_names=names), made[0](x, adapter_names=names), atol=1e-5)
        for layer in made:
            with pytest.raises(ValueError, match="adapter_names"):
                layer(x, adapter_names=[*names, "default"])


def test_training_reaches_the_adapter_only() -> None:
    kind, make = CONSTRUCTED["lora.Linear"]
    layers = [make(library, bases()[kind], "default") for library in (PEFT, OURS)]
    randomise(*layers)
    x = torch.randn(3, 6)
    for layer in layers:
        optimiser = torch.optim.SGD([p for n, p in layer.named_parameters() if "lora" in n], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            layer(x).square().mean().backward()
            optimiser.step()
    assert torch.allclose(layers[1](x), layers[0](x), atol=1e-5)


def test_a_constructed_layer_joins_a_model() -> None:
    from inlay.compat.layers.constructed import adopt
    from inlay.core.state import State

    kind, make = CONSTRUCTED["lora.Linear"]
    layer = make(OURS, bases()[kind], "default")
    x = torch.randn(2, 6)
    randomise(layer)
    before = layer(x)
    state = State(policy=layer.state.policy, active=("default",))
    adopt(layer, state, "block.fc")
    assert layer.state is state
    assert layer.site.name == "block.fc"
    assert list(state.records) == ["default"]
    assert list(state.layers()) == [layer]
    assert torch.equal(layer(x), before)
    state.enabled = False
    state.touch()
    assert torch.equal(layer(x), layer.base_layer(x))
