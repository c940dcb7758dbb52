"""LoRA's variants where adapters are combined, swapped and converted: two factors, like any other LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.checkpoint.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict
from inlay.errors import ConfigError, UnsupportedError

VARIANTS = {
    "qa": {"use_qalora": True, "qalora_group_size": 4},
    "bd": {"use_bdlora": {"target_modules_bd_b": ["0"], "nblocks": 2}},
    "velora": {"velora_config": {"num_groups": 3}},
    "monteclora": {"monteclora_config": {"num_samples": 2}},
    "kasa": {"kasa_config": {}},
}


def config(name, **fields):
    return inlay.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **VARIANTS[name], **fields})


def wrapped(*names):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8))
    model = inlay.get_peft_model(base, config(names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    return model


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_a_combination_of_variants_is_an_ordinary_lora(combination):
    names = ["qa", "bd", "velora", "monteclora"]
    model = wrapped(*names)
    layer = model.base_model.model[0]
    expected = sum(w * layer.get_delta_weight(name) for w, name in zip([1.0, -0.5, 2.0, 0.3], names, strict=True))
    rank = {"svd_rank": 8} if combination == "svd" else {}
    model.add_weighted_adapter(names, [1.0, -0.5, 2.0, 0.3], "sum", combination_type=combination, **rank)
    made = model.peft_config["sum"]
    assert not any(getattr(made, field) for field in ("use_qalora", "use_bdlora", "velora_config", "monteclora_config"))
    if combination != "linear":  # which combines factors
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-4)
    assert model.base_model.model[0].lora_A["sum"].weight.shape[1] == 12


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_is_swapped_for_one_of_its_own_variant(name):
    model, other = wrapped(name), wrapped(name)
    with torch.no_grad():
        other.base_model.model[0].lora_B[name].weight.mul_(2)
    x = torch.randn(3, 12)
    expected = other.eval()(x)
    tensors = inlay.get_peft_model_state_dict(other, adapter_name=name)
    hotswap_adapter_from_state_dict(model, tensors, name, config(name))
    torch.testing.assert_close(model.eval()(x), expected)
    with pytest.raises(ConfigError, match="must be the same"):
        check_hotswap_configs_compatible(config(name), inlay.LoraConfig(r=4))
    if name == "kasa":
        with pytest.raises(ConfigError, match="r must be the same"):
            check_hotswap_configs_compatible(config(name), config(name, r=2))


def test_a_start_is_taken_out_of_what_trains_only(tmp_path):
    """What VeLoRA and MonteCLoRA hold for training has no place in the ordinary LoRA that a conversion makes."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8))
    x = torch.randn(3, 12)
    fields = {"init_lora_weights": "pissa", "velora_config": {}, "monteclora_config": {"num_samples": 2}}
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0"], **fields))
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        base[0].lora_A["default"].weight.mul_(1.5)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path / "last", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    torch.manual_seed(0)
    found = inlay.PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)), tmp_path / "last")
    torch.testing.assert_close(found.eval()(x), expected, rtol=1e-4, atol=1e-4)
    kasa = wrapped("kasa")
    kasa.save_pretrained(tmp_path, selected_adapters=["kasa"])
    with pytest.raises(UnsupportedError, match="convert_to_lora"):
        kasa.save_pretrained(
            tmp_path / "other",
            selected_adapters=["kasa"],
            path_initial_model_for_weight_conversion=str(tmp_path / "kasa"),
        )
