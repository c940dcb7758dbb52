"""Layers that share one weight: adapted together, trained once, merged once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from language_models import TOKENS, llama, logits
from torch import Tensor, nn

from inlay.checkpoint.keys import adapter_slots
from inlay.core.active import adapter_parameters, set_active
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import State, find_state
from inlay.errors import ConfigError, InlayWarning, MergeError, TargetError, UnsupportedError
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig

TIED = ("model.embed_tokens", "lm_head")


def adapted(config: Any, tied: bool = True, name: str = "default", model: Any = None) -> tuple[Any, State]:
    model = model or llama(tied)
    state = inject(plan(model, config, name))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(state, [name]):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, state


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | options))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "q_proj" not in name}


def with_table(table: Tensor, model: Any) -> Any:
    """Return an untouched model whose embedding and head both hold ``table``, beside the adapted ``q_proj``."""
    other = copy.deepcopy(model)
    state = find_state(other)
    assert state is not None
    for layer in state.layers():
        if "q_proj" not in layer.site.name:
            layer.override(enabled=False)
    other.lm_head.get_base_layer().weight.data.copy_(table)
    other.model.embed_tokens.get_base_layer().weight.data.copy_(table)
    return other


def assert_roundtrip(model: Any, state: State, tied: bool = True) -> None:
    """Merge, switch off, unmerge, copy, pickle, merge for good."""
    y = logits(model)
    plain = logits(llama(tied))
    scale = {"rtol": 1e-4, "atol": 1e-4 * float(y.abs().max())}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(other), y, rtol=0, atol=0)
    assert not torch.allclose(y, plain, **scale)
    merge(state)
    torch.testing.assert_close(logits(model), y, **scale)
    with opened(state, disabled=True):
        torch.testing.assert_close(logits(model), plain, **scale)
    unmerge(state)
    torch.testing.assert_close(logits(model), y, rtol=0, atol=0)
    untouched = dict(llama(tied).named_parameters())
    merge(state, keep="none")
    eject(model, state, restore=False)
    torch.testing.assert_close(logits(model), y, **scale)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert dict(model.named_parameters()).keys() == untouched.keys()


@pytest.mark.parametrize("indices", [[1, 3], {"embed_tokens": [1, 3]}, {"lm_head": [1, 3], "embed_tokens": [1, 3]}])
def test_token_rows_train_once_for_embedding_and_head(indices: Any) -> None:
    model, state = adapted(lora(trainable_token_indices=indices))
    assert trained(model) == {"model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
    keys = {key for key in adapter_slots(model) if "q_proj" not in key}
    assert keys == {"model.embed_tokens.token_adapter.trainable_tokens_delta"}
    table = llama().lm_head.weight.detach().clone()
    table[[1, 3]] = model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].detach()
    torch.testing.assert_close(logits(model), logits(with_table(table, model)))
    assert_roundtrip(model, state)


def test_token_rows_of_an_untied_model() -> None:
    model, state = adapted(lora(trainable_token_indices=[1, 3]), tied=False)
    assert not hasattr(model.lm_head, "base_layer")
    assert_roundtrip(model, state, tied=False)


def test_token_rows_alone_and_with_their_own_method() -> None:
    for config in (lora(target_modules=[], trainable_token_indices=[2]), TrainableTokensConfig(token_indices=[2])):
        model, state = adapted(config)
        assert len(trained(model)) == 1
        assert_roundtrip(model, state)


def test_gradient_of_a_token_row_is_the_sum_over_its_uses() -> None:
    model, _ = adapted(lora(target_modules=[], trainable_token_indices=[1, 3]))
    plain = copy.deepcopy(model)
    state = find_state(plain)
    assert state is not None
    merge(state, keep="none")
    eject(plain, state, restore=False)
    plain.requires_grad_(False)
    plain.lm_head.weight.requires_grad_(True)
    for one in (model, plain):
        (logits(one) ** 2).sum().backward()
    delta = model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    torch.testing.assert_close(delta.grad, plain.lm_head.weight.grad[[1, 3]])


def test_different_tokens_stay_apart() -> None:
    indices = {"embed_tokens": [1, 3], "lm_head": [2]}
    model, state = adapted(lora(trainable_token_indices=indices))
    assert len(trained(model)) == 2
    with pytest.raises(MergeError, match=r"shares its weight with"):
        merge(state)
    assert not any(layer.merged for layer in state.layers())
    with pytest.raises(ConfigError, match=r"'model.embed_tokens' and 'lm_head' share one weight"):
        plan(llama(), lora(trainable_token_indices=indices, ensure_weight_tying=True))


@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head"], ["lm_head", "embed_tokens"], r".*embed_tokens"]
)
def test_update_of_the_embedding_is_the_transposed_update_of_the_head(targets: Any) -> None:
    config = lora(target_modules=targets, ensure_weight_tying=True)
    model, state = adapted(config)
    assert trained(model) == {f"model.embed_tokens.lora_embedding_{m}.default" for m in "AB"}
    embedding = model.model.embed_tokens
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    table = llama().lm_head.weight.detach() + 4 * (B @ A).T.detach()
    torch.testing.assert_close(logits(model), logits(with_table(table, model)), rtol=1e-4, atol=1e-3)
    logits(model).sum().backward()
    assert B.grad is not None
    assert_roundtrip(model, state)


def test_any_additive_method_can_be_tied() -> None:
    """The field is LoRA's; what follows from it is not."""
    config = LoHaConfig(r=2, target_modules=["embed_tokens"])
    config.ensure_weight_tying = True  # type: ignore[attr-defined]
    model, state = adapted(config)
    assert_roundtrip(model, state)


def test_tied_update_and_token_rows_together() -> None:
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True, trainable_token_indices=[1])
    model, state = adapted(config)
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    torch.testing.assert_close(model.model.embed_tokens(torch.tensor([1])), rows)
    assert_roundtrip(model, state)
    with pytest.raises(TypeError, match=r"trainable_token_indices"):  # as in peft
        plan(llama(), config, policy=PEFT)


def test_untied_adapters_warn_and_do_not_merge() -> None:
    with pytest.warns(InlayWarning, match=r"'model.embed_tokens', 'lm_head' share one weight"):
        model, state = adapted(lora(target_modules=["embed_tokens"]))
    y = logits(model)
    with pytest.raises(MergeError, match=r"'model.embed_tokens' shares its weight with 'lm_head'"):
        merge(state)
    torch.testing.assert_close(logits(model), y, rtol=0, atol=0)


def test_several_tied_adapters() -> None:
    first = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    model, state = adapted(first, name="a")
    adapted(lora(target_modules=["lm_head"], ensure_weight_tying=True, r=3), name="b", model=model)
    set_active(state, ["a", "b"])
    y = logits(model)
    merge(state, ["a"])
    merge(state, ["b"])
    scale = {"rtol": 1e-4, "atol": 1e-4 * float(y.abs().max())}
    torch.testing.assert_close(logits(model), y, **scale)
    unmerge(state)
    assert torch.equal(logits(model), y)
    with opened(state, names=["a", "b"]):
        mixed = logits(model)
    for i, name in enumerate(["a", "b"]):
        set_active(state, [name])
        torch.testing.assert_close(mixed[i], logits(model)[i], **scale)
    delete(model, state, "a")
    delete(model, state, "b")
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_full_copies_of_tied_layers_are_tied(modules: list[str]) -> None:
    model, state = adapted(lora(modules_to_save=modules, ensure_weight_tying=True))
    assert trained(model) == {"model.embed_tokens.modules_to_save.default.weight"}
    assert {key for key in adapter_slots(model) if "q_proj" not in key} <= {f"{path}.weight" for path in TIED}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert_roundtrip(model, state)


def test_asking_for_ties_that_are_not_there_warns() -> None:
    with pytest.warns(InlayWarning, match="no layer shares the weight of an embedding"):
        plan(llama(tied=False), lora(ensure_weight_tying=True))
    with pytest.warns(InlayWarning, match=r"'model.embed_tokens', 'lm_head'.*is adapted"):
        plan(llama(), lora(ensure_weight_tying=True))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"trainable_token_indices": {"nope": [1]}}, TargetError, "'nope' matches nothing"),
        ({"trainable_token_indices": {"embed_token": [1]}}, TargetError, "Did you mean 'embed_tokens'"),
        ({"trainable_token_indices": [100]}, UnsupportedError, "token 100 is beyond its 12 rows"),
        ({"trainable_token_indices": {"norm": [1]}}, UnsupportedError, "rows of an embedding"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, TargetError, "trained in full"),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, TargetError, "'lm_head' is trained in full"),
    ],
)
def test_wrong_tokens(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = llama()
    with pytest.raises(error, match=words):
        plan(model, lora(**options))
    assert find_state(model) is None


def test_input_embedding_without_a_getter() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "lin": nn.Linear(3, 3)})
    made = plan(model, LoraConfig(target_modules=["lin"], trainable_token_indices=[1]))
    assert [p.site.name for p in made.placements] == ["lin", "wte"]
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "lin": nn.Linear(3, 3)})
    with pytest.raises(TargetError, match="dict of layer name -> indices"):
        plan(model, LoraConfig(target_modules=["lin"], trainable_token_indices=[1]))


def test_compiled() -> None:
    model, _ = adapted(lora(target_modules=["embed_tokens"], ensure_weight_tying=True, trainable_token_indices=[1]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-3)
