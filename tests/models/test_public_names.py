"""The front of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import inlay

# Of PEFT's names, what belongs to this release: everything about models and the methods that are there.
PROMISED = """
AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification FourierFTConfig
IA3Config LNTuningConfig LoHaConfig LoraConfig
LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING OFTConfig PEFT_TYPE_TO_CONFIG_MAPPING
PEFT_TYPE_TO_TUNER_MAPPING PeftConfig PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction
PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
PeftType TaskType TrainableTokensConfig VeraConfig cast_mixed_precision_params
convert_to_lora find_kappa_target_modules save_as_lora get_base_model_state_dict get_layer_status get_model_status
get_peft_config get_peft_model get_peft_model_state_dict inject_adapter_in_model load_peft_weights
prepare_model_for_kbit_training set_base_model_state_dict set_peft_model_state_dict shift_tokens_right
""".split()  # noqa: SIM905


def test_all_is_alphabetic_and_complete():
    def order(name: str) -> tuple[int, str]:
        """Constants, classes, functions, as isort and ruff have it."""
        return 0 if name.isupper() else 1 if name[0].isupper() else 2, name

    assert list(inlay.__all__) == sorted(set(inlay.__all__), key=order)
    assert set(inlay.__all__) == set(inlay._HOMES)
    assert set(PROMISED) <= set(inlay.__all__)


def test_promised_names_are_names_of_peft():
    import peft

    assert set(PROMISED) <= set(peft.__all__)


@pytest.mark.parametrize("name", inlay.__all__)
def test_every_name_loads(name):
    assert getattr(inlay, name) is not None
    assert name in dir(inlay)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LorraConfig'"):
        _ = inlay.LorraConfig


def test_importing_the_package_imports_no_large_library():
    """Neither the import nor a model without transformers needs more than torch and safetensors."""
    program = """
import sys
import inlay
light = set(sys.modules)
import torch
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
wrapped = inlay.get_peft_model(net, inlay.LoraConfig(target_modules=["0"]))
wrapped(torch.ones(1, 4)).sum().backward()
wrapped.get_model_status()
large = {"transformers", "accelerate", "huggingface_hub", "peft", "typer", "rich", "matplotlib", "yaml"}
print(sorted(large & set(sys.modules)))
print(sorted(name for name in light if name.startswith("inlay")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, own = done.stdout.splitlines()[-2:]
    assert loaded == "[]"
    assert own == "['inlay']"
