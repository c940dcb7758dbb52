"""Models with experts beside PEFT, with equal weights: outputs and gradients."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

import inlay
from inlay.core.nest import why_generic
from inlay.core.state import find_state

_SIZES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
}
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def model(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        **_SIZES[family],
    )
    config._experts_implementation = "eager"  # which knows float64 too
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return made.double().eval()


@pytest.mark.parametrize("family", _SIZES)
def test_model_of_experts(family: str) -> None:
    options: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "init_lora_weights": False,
    }
    theirs = peft.get_peft_model(model(family), peft.LoraConfig(**options))
    ours = inlay.get_peft_model(model(family), inlay.LoraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    state = find_state(ours)
    assert state is not None
    paths = {layer.site.parameter: why_generic(layer) for layer in state.layers() if layer.site.parameter}
    assert paths == {"gate_up_proj": None, "down_proj": None}
    outputs = []
    for one in (theirs, ours):
        logits = one(IDS).logits
        logits.square().mean().backward()
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    with ours.disable_adapter():
        assert (ours(IDS).logits - outputs[1]).abs().max() > 1e-3
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-5)


def test_adapters_by_sample_in_a_model() -> None:
    """PEFT has no mixed batches there."""
    options: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj"], "init_lora_weights": False}
    whole = inlay.get_peft_model(model("Mixtral"), inlay.LoraConfig(target_modules=[], **options), adapter_name="a")
    whole.add_adapter("b", inlay.LoraConfig(r=2, target_modules=[], **options))
    mixed = whole(IDS, adapter_names=["b", "a"]).logits
    for i, name in enumerate(["b", "a"]):
        whole.set_adapter(name)
        torch.testing.assert_close(mixed[i], whole(IDS[i : i + 1]).logits[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], whole(IDS).logits[0])
