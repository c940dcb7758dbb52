"""Adapters that 21 releases of PEFT wrote load with the outputs that they were saved with (``releases/README.md``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from releases.bases import base, logits
from releases.cases import CASES
from releases.folders import RELEASES, answers, folder, root, saved_by
from torch import Tensor

import inlay
from inlay.checkpoint import get_peft_model_state_dict
from inlay.core.policy import INLAY, PEFT, Policy, default_policy, set_default_policy
from inlay.errors import CheckpointError

# Rotations of a form that no later release has; 0.14 and 0.15 also scaled every output.
REFUSED = {"oft_of_outputs", "oft_of_outputs_shared"}
# bias="<method>_only": written by no release from 0.7 to 0.20, though trained from 0.10 on.
LOST_BIASES = {"lora_bias_only", "oft_bias_only"}
# Since 0.21 PEFT takes nothing out of the state dict of a DataParallel: the file is empty.
EMPTY = {("0.21.2", "lora_parallel")}
WRITTEN = [(release, case) for release in RELEASES for case in saved_by(release)]


@pytest.fixture(params=[INLAY, PEFT], ids=["inlay", "peft"])
def policy(request) -> Iterator[Policy]:
    before = default_policy()
    set_default_policy(request.param)
    yield request.param
    set_default_policy(before)


def expected(release: str, case: str) -> Tensor:
    """Return the outputs to expect: the trained model's, or where its biases are lost those that the release reads."""
    found = answers(release)
    return found.get(f"{case}/reread", found[case]) if case in LOST_BIASES else found[case]


def rounding(case: str) -> float:
    """Return by how much outputs differ between processors.

    The tiny GPT-2 has rows of nearly equal numbers before a norm, which makes rounding a thousand times larger: float32
    is off by 5e-4 from float64. Its adapters change outputs by 2 and more.
    """
    return 3e-3 if case in CASES and CASES[case].base == "gpt2" else 1e-5


def close(found: Tensor, wanted: Tensor, case: str = "") -> None:
    within = rounding(case)
    torch.testing.assert_close(found, wanted, rtol=within, atol=within)


@pytest.mark.parametrize("release", RELEASES)
def test_same_outputs(release, policy):
    """Every case but those that have tests of their own."""
    compared = 0
    for case in saved_by(release):
        doubled = case == "lora_attention" and policy is INLAY
        if case in REFUSED or (release, case) in EMPTY or doubled:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = inlay.PeftModel.from_pretrained(base(CASES[case].base), folder(release, case))
        try:
            close(logits(model), expected(release, case), case)
        except AssertionError as error:
            raise AssertionError(f"{release}, {case}: {error}") from None
        compared += 1
    assert compared >= 12


def test_every_adapter_changes_the_outputs():
    """So that a load which does nothing cannot pass."""
    plain = {name: logits(base(name)) for name in ("net", "bert", "gpt2", "llama", "tied")}
    for release, case in WRITTEN:
        if (release, case) not in EMPTY:
            change = (expected(release, case) - plain[CASES[case].base]).abs().max()
            assert change > 100 * rounding(case), (release, case)


@pytest.mark.parametrize("release", RELEASES)
def test_second_adapters_in_sub_folders(release, policy):
    """Each alone, and both in one model."""
    place = root(release) / "lora_two"
    alone = inlay.PeftModel.from_pretrained(base("net"), place, "other", subfolder="second")
    close(logits(alone), answers(release)["lora_two/second"])
    both = inlay.PeftModel.from_pretrained(base("net"), place)
    both.load_adapter(place / "second", "second")
    close(logits(both), answers(release)["lora_two"])
    both.set_adapter("second")
    close(logits(both), answers(release)["lora_two/second"])


@pytest.mark.parametrize("release", [release for release in RELEASES if "oft_of_outputs" in saved_by(release)])
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_retired_rotations_are_refused(release, case, policy):
    model = base("net")
    with pytest.raises(CheckpointError, match=r"0\.14|0\.15"):
        inlay.PeftModel.from_pretrained(model, folder(release, case))
    assert [type(module) for module in model.modules()] == [type(module) for module in base("net").modules()]
    close(logits(model), logits(base("net")))


def test_an_empty_file_is_refused():
    for release, case in EMPTY:
        with pytest.raises(CheckpointError, match="4 keys are missing"):
            inlay.PeftModel.from_pretrained(base("net"), folder(release, case))


@pytest.mark.parametrize("release", ["0.7.1", "0.16.0", "0.20.0"])
def test_lost_biases_are_reported(release):
    with pytest.warns(inlay.errors.InlayWarning, match="no biases"):
        inlay.PeftModel.from_pretrained(base("net"), folder(release, "lora_bias_only"))


def test_one_lost_bias_is_an_error():
    """Only a file without any is one of those."""
    model = inlay.PeftModel.from_pretrained(base("net"), folder("0.21.2", "lora_bias_only"))
    values = get_peft_model_state_dict(model)
    values.pop("base_model.model.lin.base_layer.bias")
    with pytest.raises(CheckpointError, match="missing"):
        inlay.set_peft_model_state_dict(model, values)


def test_biases_of_any_name_are_given_back():
    """PEFT trained ``in_proj_bias`` of attention layers, which has no bias of its own to train here."""
    model = base("net")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = inlay.PeftModel.from_pretrained(model, folder("0.20.0", "lora_bias_all"))
    assert not torch.equal(model.attention.in_proj_bias, before["attention.in_proj_bias"])
    loaded.unload()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("release", "case"), [(r, c) for r, c in WRITTEN if CASES[c].form == "compiled"][::5])
def test_keys_of_compiled_models_on_compiled_models(release, case, policy):
    model = inlay.PeftModel.from_pretrained(torch.compile(base("net"), backend="eager"), folder(release, case))
    close(logits(model), answers(release)[case], case)


def test_modules_with_the_names_of_wrappers_keep_them():
    """A model that really has a module called ``module`` or ``_orig_mod``."""

    class Odd(torch.nn.Module):
        def __init__(self, **parts: torch.nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    def odd() -> torch.nn.Module:
        torch.manual_seed(0)
        inner = Odd(lin=torch.nn.Linear(2, 2))
        return Odd(module=Odd(lin=torch.nn.Linear(2, 2)), _orig_mod=inner, lin=torch.nn.Linear(2, 2))

    config = inlay.LoraConfig(r=1, target_modules=["lin"])
    first = inlay.get_peft_model(odd(), config)
    values = {key: torch.full_like(v, i) for i, (key, v) in enumerate(get_peft_model_state_dict(first).items())}
    assert len(values) == 6
    second = inlay.get_peft_model(odd(), config)
    inlay.set_peft_model_state_dict(second, values)
    found = get_peft_model_state_dict(second)
    assert all(torch.equal(found[key], value) for key, value in values.items())


@pytest.mark.parametrize("release", ["0.17.1", "0.19.0", "0.19.1", "0.21.2"])
@pytest.mark.parametrize(
    "case", ["lora_parameters", "lora_two_parameters", "lora_square_parameters", "oft", "oft_exact", "tied_gpt2"]
)
def test_saved_again_they_say_the_same(release, case, tmp_path):
    """Old forms become present ones in memory; what Inlay then writes must be read as what it is."""
    if case not in saved_by(release):
        pytest.skip("written by later releases only")
    first = inlay.PeftModel.from_pretrained(base(CASES[case].base), folder(release, case))
    first.save_pretrained(tmp_path)
    second = inlay.PeftModel.from_pretrained(base(CASES[case].base), tmp_path)
    close(logits(second), answers(release)[case], case)
    inlay.set_peft_model_state_dict(second, get_peft_model_state_dict(second))
    close(logits(second), answers(release)[case], case)
