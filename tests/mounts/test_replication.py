"""``layer_replication``: a deeper model on shared base weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from language_models import TOKENS, llama, logits
from torch import nn

from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.state import find_state
from inlay.errors import ConfigError, MergeError, UnsupportedError
from inlay.methods.lora import LoraConfig


def config(*ranges: tuple[int, int], **options: Any) -> LoraConfig:
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options
    return LoraConfig(layer_replication=list(ranges), **options)


def test_planning_leaves_the_model_alone() -> None:
    model = llama(layers=3)
    before = dict(model.named_modules())
    made = plan(model, config((0, 2), (1, 3)))
    assert [p.site.name for p in made.placements] == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert "model.layers.3" in str(made)
    assert made.trainable == 4 * 2 * 16
    assert dict(model.named_modules()) == before
    assert model.config.num_hidden_layers == 3


def test_repeated_blocks_share_weights_and_have_their_own_adapters() -> None:
    model = llama(layers=3)
    original = dict(model.named_modules())
    untouched = copy.deepcopy(model)
    state = inject(plan(model, config((0, 2), (1, 3))))
    blocks = model.model.layers
    assert len(blocks) == model.config.num_hidden_layers == 4
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3]
    assert blocks[1].mlp.gate_proj.weight is blocks[2].mlp.gate_proj.weight
    assert blocks[1].self_attn.q_proj.base_layer.weight is blocks[2].self_attn.q_proj.base_layer.weight
    assert blocks[1].self_attn.config is model.config
    A = [block.self_attn.q_proj.lora_A["default"].weight for block in blocks]
    assert not torch.equal(A[1], A[2])
    # the same model, written out block by block, with the updates added to weights of their own
    deep = llama(layers=4)
    deep.load_state_dict(untouched.state_dict(), strict=False)
    with torch.no_grad():
        for place, source in enumerate((0, 1, 1, 2)):
            deep.model.layers[place].load_state_dict(untouched.model.layers[source].state_dict())
            B = blocks[place].self_attn.q_proj.lora_B["default"].weight
            deep.model.layers[place].self_attn.q_proj.weight += 4 * B @ A[place]
    torch.testing.assert_close(logits(model), logits(deep))
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3), deep.generate(TOKENS, max_new_tokens=3))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        found = find_state(other)
        assert found is not None
        eject(other, found)
        assert torch.equal(logits(other), logits(untouched))
    eject(model, state)
    assert dict(model.named_modules()) == original
    assert model.config.num_hidden_layers == 3
    assert torch.equal(logits(model), logits(untouched))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_is_refused() -> None:
    model = llama(layers=3)
    state = inject(plan(model, config((0, 2), (1, 3))))
    with pytest.raises(MergeError, match="blocks that share their weights"):
        merge(state)


def test_later_adapters_find_the_blocks_as_they_are() -> None:
    model = llama(layers=3)
    state = inject(plan(model, config((0, 2), (1, 3))))
    inject(plan(model, config((0, 2), (1, 3)), "same"))
    inject(plan(model, LoraConfig(target_modules=["v_proj"]), "none"))
    assert len(model.model.layers) == 4
    with pytest.raises(UnsupportedError, match=r"layer_replication=\[\(0, 1\)\].*replication: \[\(0, 2\), \(1, 3\)\]"):
        plan(model, config((0, 1)), "other")
    for name in ("default", "none", "same"):
        assert len(model.model.layers) == 4
        delete(model, state, name)
    assert len(model.model.layers) == 3
    model = llama(layers=3)
    inject(plan(model, LoraConfig(target_modules=["v_proj"])))
    with pytest.raises(UnsupportedError, match="the first adapter must bring it"):
        plan(model, config((0, 2)), "late")


def test_failure_puts_the_list_back() -> None:
    model = llama(layers=3)
    before = dict(model.named_modules())

    def fail(state: Any) -> None:
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        inject(plan(model, config((0, 2), (1, 3))), then=fail)
    assert dict(model.named_modules()) == before
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("bad", [(0, 5), (2, 1), (-1, 2), (1, 1)])
def test_ranges_outside_the_model(bad: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"within the 3 blocks of 'layers', found \({bad[0]}, {bad[1]}\)"):
        plan(llama(layers=3), config((0, 1), bad))


def test_models_without_one_list_of_blocks() -> None:
    with pytest.raises(UnsupportedError, match="found none"):
        plan(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), config((0, 1)))
    two = nn.ModuleDict({side: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}) for side in ("a", "b")})
    with pytest.raises(UnsupportedError, match=r"found 'a.layers', 'b.layers'"):
        plan(two, config((0, 1)))
    with pytest.raises(UnsupportedError, match="bias='all'"):
        plan(llama(layers=3), config((0, 2), bias="all"))


def test_bert_and_falcon_call_their_blocks_otherwise() -> None:
    from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(intermediate_size=10, **sizes)).eval()
    inject(plan(bert, config((0, 2), (0, 2), target_modules=["query"])))
    assert len(bert.encoder.layer) == 4
    assert bert(TOKENS).last_hidden_state.isfinite().all()
    falcon = FalconForCausalLM(FalconConfig(**sizes)).eval()
    inject(plan(falcon, config((0, 2), (1, 2), target_modules=["query_key_value"])))
    assert len(falcon.transformer.h) == 3
    assert logits(falcon).isfinite().all()
