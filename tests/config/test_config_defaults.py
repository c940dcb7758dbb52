import peft.utils.constants as constants
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from inlay.config import PeftType, default_feedforward, default_targets, families

THEIRS = {
    peft_type.value: tuner.target_module_mapping
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if getattr(tuner, "target_module_mapping", None)
} | {"IA3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING}


@pytest.mark.parametrize("peft_type", sorted(THEIRS))
def test_targets_are_pefts(peft_type):
    assert {family: default_targets(peft_type, family) for family in families(peft_type)} == THEIRS[peft_type]


def test_every_table_of_peft_is_covered():
    tables = [name for name in dir(constants) if name.startswith("TRANSFORMERS_MODELS_TO_")]
    tables = [name for name in tables if name.endswith("_TARGET_MODULES_MAPPING")]
    methods = {name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING") for name in tables}
    assert len(methods) == 35
    for method in methods:
        own_name = {"LNTUNING": "LN_TUNING"}.get(method, method)
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
        assert {family: default_targets(own_name, family) for family in families(own_name)} == theirs


def test_methods_without_a_table_in_peft_have_none_here():
    assert {t.value for t in PeftType if families(t)} == set(THEIRS)


def test_feedforward_is_pefts():
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {family: default_feedforward(family) for family in families("IA3")} == theirs


def test_unknown_families_have_no_default():
    assert default_targets(PeftType.LORA, "no-such-family") is None
    assert default_targets("NO_SUCH_METHOD", "llama") is None
    assert default_feedforward("no-such-family") is None


def test_callers_cannot_change_the_tables():
    default_targets("LORA", "llama").append("spoiled")
    default_feedforward("llama").append("spoiled")
    assert default_targets("LOHA", "llama") == ["q_proj", "v_proj"]
    assert default_feedforward("llama") == ["down_proj"]
