"""Settings and states that PEFT takes, ignores or refuses otherwise: both sides of each."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.lin(x))
        return self.head(self.attn(x, x, x)[0])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_frod_reads_the_base_weight() -> None:
    assert peft.FrodConfig(target_modules=["lin"], runtime_offload_base_weight=True).runtime_offload_base_weight
    with pytest.raises(ConfigError, match="runtime_offload_base_weight"):
        inlay.FrodConfig(target_modules=["lin"], runtime_offload_base_weight=True)


@pytest.mark.parametrize("option", ["use_rslora", "lora_bias"])
def test_adalora_refuses_what_it_does_not_read(option: str) -> None:
    fields: dict[str, Any] = {"total_step": 10, option: True}
    assert getattr(peft.AdaLoraConfig(**fields), option)
    with pytest.raises(ConfigError, match=option):
        inlay.AdaLoraConfig(**fields)


def test_several_adaloras_train() -> None:
    def two(library: Any) -> Any:
        model = library.get_peft_model(net(), library.AdaLoraConfig(target_modules=["lin"], total_step=10))
        model.add_adapter("two", library.AdaLoraConfig(target_modules=["lin"], total_step=10, init_r=4))
        return model

    with pytest.raises(ValueError, match="AdaLoraModel supports only 1 trainable adapter"):
        two(peft)
    model = two(inlay)
    for name in ("default", "two"):
        model.set_adapter(name)
        model(torch.randn(2, 4, 8)).sum().backward()
        model.base_model.update_and_allocate(3)
        left = model.peft_config[name].rank_pattern
        assert all(len(mask) == model.peft_config[name].init_r for mask in left.values())


def test_a_sparse_basis_without_any_element() -> None:
    """All of a small basis may be zero, whose deviation PEFT divides by."""
    fields = {"r": 1, "randlora_alpha": 2, "sparse": True, "projection_prng_key": 0, "target_modules": ["lin"]}
    base = nn.ModuleDict({"lin": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="without one element"):
        inlay.get_peft_model(base, inlay.RandLoraConfig(**fields))
    assert type(base["lin"]) is nn.Linear
    theirs = peft.get_peft_model(base, peft.RandLoraConfig(**fields))
    assert any(bool(buffer.isnan().all()) for name, buffer in theirs.named_buffers() if "randlora_A" in name)


def test_olora_on_conv1d() -> None:
    def start(library: Any) -> Any:
        base = nn.ModuleDict({"c_attn": transformers.pytorch_utils.Conv1D(6, 8)})
        config = library.LoraConfig(r=2, init_lora_weights="olora", target_modules=["c_attn"], fan_in_fan_out=True)
        return library.get_peft_model(base, config).base_model.model.c_attn

    with pytest.raises(RuntimeError):
        start(peft)(torch.randn(3, 8))
    assert start(inlay)(torch.randn(3, 8)).shape == (3, 6)


def test_a_tuned_norm_trains_in_float32() -> None:
    dtypes = []
    for library in (peft, inlay):
        model = library.get_peft_model(net().to(torch.bfloat16), library.LNTuningConfig(target_modules=["norm"]))
        dtypes.append({p.dtype for p in model.parameters() if p.requires_grad})
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


def test_the_projections_of_tuned_attention_have_keys_of_their_own() -> None:
    keys = []
    for library in (peft, inlay):
        model = library.get_peft_model(net(), library.LNTuningConfig(target_modules=["attn"]))
        keys.append(sorted(library.get_peft_model_state_dict(model)))
    (theirs, ours) = ({key.removeprefix("base_model.model.attn.") for key in found} for found in keys)
    assert {key.partition(".")[0] for key in theirs} == {"ln_tuning_layers"}
    assert ours == {
        f"{above}ln_tuning_layers.{name}" for above in ("", "base_layer.out_proj.") for name in ("weight", "bias")
    }


def test_full_copies_are_left_out_of_what_is_active() -> None:
    status = []
    for library in (peft, inlay):
        model = library.get_peft_model(net(), library.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"]))
        model.add_adapter("two", library.LoraConfig(r=2, target_modules=["lin"]))
        model.set_adapter("two")
        status.append(model.get_model_status().active_adapters)
    assert status == ["irregular", ["two"]]
