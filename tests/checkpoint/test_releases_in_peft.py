"""The same fixtures in real PEFT 0.21.2, and what Inlay makes of them: the oracle's side, failures included."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from releases.bases import base, logits
from releases.cases import CASES
from releases.folders import RELEASES, folder, saved_by
from test_releases import EMPTY, REFUSED, close, expected, rounding
from torch import Tensor

import inlay
from inlay.core.policy import PEFT, default_policy, set_default_policy

BEFORE_BASE_LAYER = {"0.3.0", "0.4.0", "0.5.0", "0.6.2"}
OLD_SERIES = {"oft", "oft_block_size", "oft_neumann", "oft_shared", "oft_seven_terms", "oft_bias_only"}
TURNED = {"lora_parameters", "lora_two_parameters"}  # not square: PEFT sees that the shapes do not fit


def how_peft_reads(release: str, case: str) -> str:
    """Return ``same`` outputs, ``other`` ones in silence, or the name of the exception."""
    if case in REFUSED:
        return "ValueError" if release not in ("0.14.0", "0.15.2") else "other"
    if CASES[case].form == "parallel":
        return "KeyError" if "head" in case else "other"
    if CASES[case].form in ("raw", "compiled"):
        return "KeyError"
    if release in ("0.17.1", "0.18.0", "0.18.1", "0.19.0"):
        if case in TURNED:
            return "RuntimeError"
        if case == "lora_square_parameters":
            return "other"
    if case in OLD_SERIES and release in ("0.16.0", "0.17.1"):
        return "other"
    if case == "tied_llama" and release in ("0.18.0", "0.18.1"):
        return "other"  # the head was not adapted
    if case in ("lora_bias_all", "lora_bias_only") and release in BEFORE_BASE_LAYER:
        return "other"  # biases are under the names that they have in the base
    if case == "oft_conv2d":
        return "other"  # the fixture has the merged model's outputs
    return "same"


def read_by_peft(place: Path, case: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(base(CASES[case].base), str(place)).eval())


@pytest.mark.parametrize("release", RELEASES)
def test_what_peft_makes_of_them(release):
    """Where this says ``same``, PEFT confirms the fixture; elsewhere Inlay reads more than PEFT does."""
    found, wanted = {}, {}
    for case in saved_by(release):
        try:
            within = rounding(case)
            read = read_by_peft(folder(release, case), case)
            same = torch.allclose(read, expected(release, case), within, within)
            found[case] = "same" if same else "other"
        except Exception as error:
            found[case] = type(error).__name__
        wanted[case] = how_peft_reads(release, case)
    assert found == wanted


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("release", ["0.3.0", "0.6.2", "0.11.1", "0.17.1", "0.19.0", "0.21.2"])
def test_peft_reads_what_inlay_makes_of_them(release, safe, tmp_path):
    """Loaded by Inlay and saved again, every one has its outputs in PEFT, also those that PEFT could not read."""
    before = default_policy()
    set_default_policy(PEFT)
    try:
        for case in saved_by(release):
            if case in REFUSED or (release, case) in EMPTY:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = inlay.PeftModel.from_pretrained(base(CASES[case].base), folder(release, case))
            model.save_pretrained(tmp_path / case, safe_serialization=safe)
            version = json.loads((tmp_path / case / "adapter_config.json").read_text())["peft_version"]
            if case in OLD_SERIES and release == "0.17.1":
                assert version == "0.17.1"  # PEFT has no such series; this is what makes it warn
                continue
            assert version == "0.21.2"
            if case == "oft_conv2d":
                continue  # another forward; see tests/against_peft/test_oft_differences.py
            try:
                close(read_by_peft(tmp_path / case, case), expected(release, case), case)
            except AssertionError as error:
                raise AssertionError(f"{release}, {case}: {error}") from None
    finally:
        set_default_policy(before)


def test_peft_warns_of_the_old_series():
    with pytest.warns(UserWarning, match="cayley-neumann"):
        peft.PeftModel.from_pretrained(base("net"), str(folder("0.17.1", "oft")))
