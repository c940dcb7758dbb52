"""Adapters of transformers 4 on stacked experts, where PEFT loses something: each test shows both sides.

The oracle adds each update to its expert's own matrix, in float64. What both do alike is tested below
``tests/integrations/transformers``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations import experts, tiny

import inlay

pytest.importorskip("transformers", minversion="5.0")
IDS = tiny.tokens()
EXPERTS = ["q_proj", "w1", "w2", "w3"]
SWIGLU = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def error(library: Any, family: str, folder: Path, **changes: Any) -> float:
    """Return by how much the outputs of an adapter that was loaded miss the oracle's, over the adapter's own size."""
    want = experts.merged_by_hand(tiny.decoder(family, **changes), family, folder)(IDS).logits
    model = tiny.decoder(family, **changes).double()
    base = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = library.PeftModel.from_pretrained(model, folder)
    return float(((loaded(IDS).logits - want).abs().max() / (want - base).abs().max()).detach())


@pytest.mark.parametrize(
    ("family", "changes", "targets", "options"),
    [
        pytest.param("Mixtral", {}, ["w1", "w3"], {}, id="gate and up without down: not loaded"),
        pytest.param("Mixtral", {}, EXPERTS, {"use_rslora": True}, id="rslora: sqrt(2) too large"),
        pytest.param("Qwen2Moe", {}, SWIGLU, {}, id="qwen2_moe itself: experts not loaded"),
        pytest.param("Qwen3Moe", {"mlp_only_layers": [0]}, SWIGLU, {}, id="dense layers beside experts: not loaded"),
    ],
)
def test_peft_loses_what_inlay_keeps(
    family: str, changes: dict[str, Any], targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    experts.write_old_adapter(tmp_path, tiny.decoder(family, **changes), family, targets, **options)
    assert error(peft, family, tmp_path, **changes) > 1e-3
    assert error(inlay, family, tmp_path, **changes) < 1e-6


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        pytest.param(EXPERTS, {"lora_dropout": 0.1}, id="dropout"),
        pytest.param(EXPERTS, {"ranks": {"w1": 2, "w3": 2}}, id="rank_pattern"),
        pytest.param(["w1"], {}, id="gate without up"),
        pytest.param(["experts.1.w2", "experts.2.w1"], {}, id="some experts"),
    ],
)
def test_peft_refuses_what_inlay_loads(targets: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", targets, **options)
    with pytest.raises((ValueError, RuntimeError)):
        error(peft, "Mixtral", tmp_path)
    assert error(inlay, "Mixtral", tmp_path) < 1e-6


def test_dora_of_experts(tmp_path: Path) -> None:
    """PEFT refuses it; that Inlay's numbers are right is tested in ``check_experts.py``."""
    tensors = experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", ["w2"], use_dora=True)
    for path, (*_, matrix) in experts.old_shapes(tiny.mixtral(), "Mixtral", ["w2"]).items():
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = matrix.norm(dim=1).detach()
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="use_dora"):
        peft.PeftModel.from_pretrained(tiny.mixtral(), tmp_path)
    loaded = inlay.PeftModel.from_pretrained(tiny.mixtral(), tmp_path)
    assert torch.isfinite(loaded(IDS).logits).all()


def test_dropout_of_experts_that_train() -> None:
    """PEFT rewrites the weight, where there is no input to drop; Inlay drops it of the rows of each expert."""
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(tiny.mixtral(), peft.LoraConfig(target_modules=["w2"], lora_dropout=0.1))
    config = inlay.LoraConfig(target_modules=["w2"], lora_dropout=0.5, init_lora_weights=False)
    model = inlay.get_peft_model(tiny.mixtral(), config)
    assert not torch.allclose(model.train()(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(model.eval()(IDS).logits, model(IDS).logits)


def test_old_adapter_saved_anew_is_read_by_peft(tmp_path: Path) -> None:
    experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", [*EXPERTS, "gate"])
    loaded = inlay.PeftModel.from_pretrained(tiny.mixtral(), tmp_path)
    loaded.save_pretrained(tmp_path / "anew")
    theirs = peft.PeftModel.from_pretrained(tiny.mixtral(), tmp_path / "anew")
    torch.testing.assert_close(theirs(IDS).logits, loaded(IDS).logits)


def test_layers_that_have_another_name_now(tmp_path: Path) -> None:
    """``query`` and ``value`` of a ViT are ``q_proj`` and ``v_proj`` in transformers 5."""
    from safetensors.torch import load_file, save_file

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    now = peft.get_peft_model(tiny.vit(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    tiny.scramble(now, scale=0.3)
    now.save_pretrained(tmp_path)
    names = {"vit.layers": "vit.encoder.layer", "q_proj": "attention.query", "v_proj": "attention.value"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for new, old in names.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.target_modules = {"query", "value"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target"):
        peft.PeftModel.from_pretrained(tiny.vit(), tmp_path)
    loaded = inlay.PeftModel.from_pretrained(tiny.vit(), tmp_path)
    torch.testing.assert_close(loaded(images).logits, now.eval()(images).logits)
