"""What PEFT's own tests ask for and Inlay does otherwise on purpose, each beside PEFT; see ``tests/peft_suite``."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import inlay.compat.peft as drop_in
from inlay.errors import UnsupportedError

LIBRARIES = [pytest.param(peft, id="peft"), pytest.param(drop_in, id="inlay")]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lin0 = nn.Linear(4, 4)
        self.lin1 = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.lin1(self.lin0(x))


def quiet(library: Any, model: nn.Module, config: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(model, config, **options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_that_was_disabled_alone_stays_so_after_disable_adapter(library: Any) -> None:
    model = quiet(library, Pair(), library.LoraConfig(target_modules=["lin0", "lin1"], r=2))
    layer = model.base_model.model.lin0
    layer.enable_adapters(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            pass
    assert layer.disable_adapters is (library is drop_in)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_method_with_shared_tensors_is_injected_bare(library: Any) -> None:
    config = library.VeraConfig(target_modules=["lin0"], r=2)
    if library is peft:
        with pytest.raises(ValueError, match="shared state"):
            peft.inject_adapter_in_model(config, Pair())
        return
    model = drop_in.inject_adapter_in_model(config, Pair())
    assert model(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_adapters_with_different_target_parameters(library: Any) -> None:
    model = quiet(library, Pair(), library.LoraConfig(target_modules=[], target_parameters=["lin0.weight"], r=2))
    other = library.LoraConfig(target_modules=[], target_parameters=["lin1.weight"], r=2)
    if library is peft:
        with pytest.raises(ValueError, match="same set of parameters"):
            model.add_adapter("other", other)
        return
    model.add_adapter("other", other)
    model.set_adapter("other")
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lin1"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_dora_on_a_grouped_convolution(library: Any) -> None:
    config = library.LoraConfig(target_modules=["0"], r=4, use_dora=True)
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=4))
    if library is peft:
        assert quiet(peft, model, config)(torch.ones(1, 8, 5)).shape == (1, 8, 3)
        return
    with pytest.raises(UnsupportedError, match="grouped convolution"):
        drop_in.get_peft_model(model, config)


def test_a_class_for_one_task_does_not_read_auto_mapping(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 20}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    drop_in.get_peft_model(base, drop_in.LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    wrong = {"parent_library": "os", "base_model_class": "system"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": wrong, "task_type": None}))
    with pytest.raises(ValueError, match="allowlist"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = drop_in.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.get_base_model(), LlamaForCausalLM)
    with pytest.raises(ValueError, match="os"):
        drop_in.AutoPeftModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("library", LIBRARIES)
def test_generate_of_an_encoder_decoder_takes_inputs_by_position(library: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 20}
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    model = quiet(library, base, library.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
    tokens = torch.tensor([[3, 4, 5]])
    if library is peft:
        with pytest.raises(TypeError):
            model.generate(tokens, max_new_tokens=2)
        return
    assert model.generate(tokens, max_new_tokens=2).shape[0] == 1
