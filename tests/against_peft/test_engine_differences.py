"""Where PEFT's engine does something else than Inlay's: each test shows both sides (docs/differences.md)."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.errors import MergeError, TargetError, UnknownAdapterError

LIBRARIES = {"peft": peft, "inlay": inlay}


class Blocks(nn.Module):
    """Three residual blocks, recomputed in backward if ``mode`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.mode: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (torch.tanh(block(x)) if self.mode is None else checkpoint(self.run, block, x, use_reentrant=False))
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(block(x))


def wrapped(library: Any, names: tuple[str, ...] = ("default",), dtype: torch.dtype = torch.float32) -> Any:
    """Return blocks with random LoRA adapters, the same in both libraries."""
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    config = {"r": 2, "target_modules": ["0", "1", "2"], "init_lora_weights": False}
    made = library.get_peft_model(model, library.LoraConfig(**config), names[0])
    for name in names[1:]:
        made.add_adapter(name, library.LoraConfig(**config))
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) * 0.3)
    return made


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}


def test_unmerging_puts_the_weights_back_bitwise() -> None:
    changed = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library, dtype=torch.bfloat16)
        before = weights(model)
        model.merge_adapter()
        model.unmerge_adapter()
        changed[name] = sum(int((value != before[key]).sum()) for key, value in weights(model).items())
    assert changed["peft"] > 0
    assert changed["inlay"] == 0


def test_a_merge_that_fails_in_one_layer_changes_none() -> None:
    x = torch.randn(2, 6)
    for name, library in LIBRARIES.items():
        model = wrapped(library)
        before, y = weights(model), None
        with torch.no_grad():
            model.base_model.model.blocks[2].lora_B["default"].weight.fill_(float("inf"))
        with pytest.raises(ValueError) as raised:
            model.merge_adapter(safe_merge=True)
        same = all(torch.equal(value, before[key]) for key, value in weights(model).items())
        assert same == (name == "inlay"), name
        if name == "inlay":
            assert isinstance(raised.value, MergeError)
            y = model(x)
            assert y.shape == x.shape


def test_what_is_not_finite_is_never_merged() -> None:
    for name, library in LIBRARIES.items():
        model = wrapped(library)
        with torch.no_grad():
            model.base_model.model.blocks[1].lora_B["default"].weight.fill_(float("inf"))
        if name == "peft":
            merged = model.merge_and_unload()
            assert not torch.isfinite(merged.blocks[1].weight).all()
        else:
            with pytest.raises(MergeError, match=r"blocks\.1"):
                model.merge_and_unload()


def test_merging_some_of_the_active_adapters_leaves_the_others_on() -> None:
    x = torch.randn(2, 6)
    off = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library, ("default", "second")).eval()
        model.base_model.set_adapter(["default", "second"])
        before = model(x)
        model.merge_adapter(["default"])
        off[name] = float((model(x) - before).abs().max())
    assert off["peft"] > 1e-2
    assert off["inlay"] < 1e-5


def test_a_target_that_matches_nothing() -> None:
    model = Blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(Blocks(), peft.LoraConfig(target_modules=["0", "blokcs.1"]))
    with pytest.raises(TargetError, match=r"blokcs\.1.*near: blocks\.1"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["0", "blokcs.1"]))
    assert isinstance(model.blocks[0], nn.Linear)


def test_a_module_that_stands_at_two_paths_is_adapted_at_both() -> None:
    x = torch.randn(2, 6)
    adapted = {}
    for name, library in LIBRARIES.items():
        model = Blocks()
        model.blocks.append(model.blocks[0])
        made = library.get_peft_model(model, library.LoraConfig(target_modules=["blocks.0"], init_lora_weights=False))
        blocks = made.base_model.model.blocks
        adapted[name] = [hasattr(blocks[i], "base_layer") for i in (0, 3)]
        assert made(x).shape == x.shape
    assert adapted == {"peft": [True, False], "inlay": [True, True]}


def test_unloading_gives_the_flags_back() -> None:
    flags = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library).unload()
        flags[name] = {parameter.requires_grad for parameter in model.parameters()}
    assert flags == {"peft": {False}, "inlay": {True}}


def test_adapters_by_sample_for_any_method() -> None:
    """PEFT's IA3 takes any name and ignores it."""
    x = torch.randn(2, 6)
    fields = {"target_modules": ["0"], "feedforward_modules": [], "init_ia3_weights": False}
    theirs = peft.get_peft_model(Blocks(), peft.IA3Config(**fields)).eval()
    assert torch.equal(theirs(x, adapter_names=["no such", "__base__"]), theirs(x))
    ours = inlay.get_peft_model(Blocks(), inlay.IA3Config(**fields)).eval()
    with pytest.raises(UnknownAdapterError, match="no such"):
        ours(x, adapter_names=["no such", "__base__"])
    mixed = ours(x, adapter_names=["default", "__base__"])
    assert torch.allclose(mixed[0], ours(x)[0], atol=1e-6)
    with ours.disable_adapter():
        assert torch.allclose(mixed[1], ours(x)[1], atol=1e-6)


def test_adapters_by_sample_in_training() -> None:
    x = torch.randn(2, 6)
    names = ["default", "__base__"]
    with pytest.raises(ValueError, match="training"):
        wrapped(peft).train()(x, adapter_names=names)
    model = wrapped(inlay).train()
    model(x, adapter_names=names).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_switching_off_holds_for_the_backward_of_a_checkpointed_forward() -> None:
    x = torch.randn(4, 6)
    wrong = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library)
        bare = model.base_model.model
        grads = []
        for mode in (None, False):
            bare.mode = mode
            leaf = x.clone().requires_grad_(True)
            with model.disable_adapter():
                y = model(leaf)
            try:
                y.sum().backward()
                grads.append(leaf.grad)
            except Exception:  # torch itself may notice that something else was recomputed
                grads.append(torch.full_like(x, float("inf")))
        wrong[name] = float((grads[0] - grads[1]).abs().max())
    assert wrong["peft"] > 1e-3
    assert wrong["inlay"] == 0.0


def test_a_frozen_adapter_stays_frozen_when_adapters_are_switched_off_and_on() -> None:
    trainable = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library)
        model.set_adapter("default", inference_mode=True)
        model.base_model.set_requires_grad("default", False)
        with model.disable_adapter():
            pass
        trainable[name] = any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    assert trainable == {"peft": True, "inlay": False}


def test_several_adapters_can_be_activated_on_the_wrapper() -> None:
    with pytest.raises(TypeError):
        wrapped(peft, ("default", "second")).set_adapter(["default", "second"])
    model = wrapped(inlay, ("default", "second"))
    model.set_adapter(["second", "default"])
    assert model.active_adapters == ["second", "default"]
    model.active_adapters = ["default"]
    assert model.active_adapters == ["default"]


def test_initial_values_do_not_depend_on_the_order_of_injection() -> None:
    different = {}
    for name, library in LIBRARIES.items():
        drawn = []
        for first in (["0"], ["1"]):
            torch.manual_seed(0)
            model = library.get_peft_model(Blocks(), library.LoraConfig(target_modules=first), "first")
            model.add_adapter("second", library.LoraConfig(target_modules=["2"]))
            drawn.append(model.base_model.model.blocks[2].lora_A["second"].weight.detach().clone())
        torch.manual_seed(0)
        alone = library.get_peft_model(Blocks(), library.LoraConfig(target_modules=["2"]), "second")
        drawn.append(alone.base_model.model.blocks[2].lora_A["second"].weight.detach().clone())
        different[name] = not all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert different == {"peft": True, "inlay": False}


def test_forward_while_merged_and_switched_off_leaves_the_weights_alone() -> None:
    x = torch.randn(2, 6)
    for name, library in LIBRARIES.items():
        model = wrapped(library, dtype=torch.float64).eval()
        with model.disable_adapter():
            base = model(x.double())
        model.merge_adapter()
        merged = weights(model)
        with model.disable_adapter():
            assert torch.allclose(model(x.double()), base)
        same = all(torch.equal(value, merged[key]) for key, value in weights(model).items())
        assert same == (name == "inlay"), name


def test_gradients_switched_on_by_hand_outlast_a_switch_of_other_adapters() -> None:
    left = {}
    for name, library in LIBRARIES.items():
        model = wrapped(library, ("a", "b", "c"))
        for path, parameter in model.named_parameters():
            if ".b." in path:
                parameter.requires_grad_(True)
        model.set_adapter("c")
        trained = {path.split(".")[-2] for path, parameter in model.named_parameters() if parameter.requires_grad}
        left[name] = trained
        model.set_requires_grad("b", True)
        model.set_adapter("a")
        assert {path.split(".")[-2] for path, p in model.named_parameters() if p.requires_grad} == {"a"}
    assert left == {"peft": {"c"}, "inlay": {"b", "c"}}


def test_what_stands_for_no_dropout_is_made_when_it_is_asked_for() -> None:
    for library in LIBRARIES.values():
        layer = wrapped(library).base_model.model.blocks[0]
        assert ("lora_dropout.default" in dict(layer.named_modules())) == (library is peft)
        assert isinstance(layer.lora_dropout["default"], nn.Identity)
        assert "lora_dropout.default" in dict(layer.named_modules())


def test_what_holds_an_adapter_is_a_subclass_of_torchs() -> None:
    classes = {"lora_A": nn.ModuleDict, "lora_dropout": nn.ModuleDict, "lora_A.default": nn.Linear}
    classes |= {"lora_B.default": nn.Linear, "lora_dropout.default": nn.Identity}
    for library in LIBRARIES.values():
        layer = wrapped(library).base_model.model.blocks[0]
        for path, cls in classes.items():
            held = layer.get_submodule(path)
            assert isinstance(held, cls)
            assert repr(held).startswith(f"{cls.__name__}(")
            assert (type(held) is cls) == (library is peft), path
