"""Full copies and token rows: constructed by themselves, and as wrappers that users write."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layer_twins import OURS, PEFT, get, twins
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LIBRARIES = [PEFT, OURS]


def copies(library: str) -> Any:
    torch.manual_seed(0)
    return get(library, "utils.other.ModulesToSaveWrapper")(nn.Linear(3, 2), "default")


def test_copies_constructed() -> None:
    theirs, ours = map(copies, LIBRARIES)
    x = torch.randn(2, 3)
    for change in (
        lambda w: w.update("other"),
        lambda w: w.modules_to_save["default"].weight.data.fill_(1.0),
        lambda w: w.modules_to_save["other"].weight.data.fill_(2.0),
        lambda w: w.set_adapter("other"),
        lambda w: w.set_requires_grad(["default"], True),
        lambda w: w.enable_adapters(False),
        lambda w: w.enable_adapters(True),
        lambda w: w.set_adapter("default"),
        lambda w: w.delete_adapter("default", ["other"]),
        lambda w: w.set_adapter("other", inference_mode=True),
    ):
        change(theirs)
        change(ours)
        assert torch.equal(ours(x), theirs(x))
        assert ours.active_adapters == theirs.active_adapters
        assert ours.disable_adapters == theirs.disable_adapters
        assert set(ours.state_dict()) == set(theirs.state_dict())
        assert ours.weight.shape == theirs.weight.shape
        for name in ("default", "other", "absent"):
            assert ours.adapter_state_dict_load_map(name) == theirs.adapter_state_dict_load_map(name)
            mine, other = (w.adapter_state_dict(name, w.state_dict()) for w in (ours, theirs))
            assert set(mine) == set(other)
            assert all(torch.equal(mine[key], other[key]) for key in other)
    gradients = [{n: p.requires_grad for n, p in w.named_parameters()} for w in (theirs, ours)]
    assert gradients[0] == gradients[1]
    assert ours.unload_and_optionally_merge_module(False, False, None) is ours.modules_to_save["other"]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x))
        twin.set_adapter([])
        assert torch.equal(twin(x), twin.original_module(x))


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies_refuse_what_peft_refuses(library: str) -> None:
    wrapper = copies(library)
    wrapper.update("other")
    with pytest.raises(ValueError, match="default"):
        wrapper.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="absent"):
        wrapper.set_adapter("absent")
    with pytest.raises(ValueError, match="one"):
        wrapper.check_set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="at least one"):
        wrapper.check_set_adapter([])
    assert wrapper.check_set_adapter(["absent", "other"]) == "other"
    assert wrapper.check_set_adapter(["absent"]) is None
    with pytest.raises(TypeError, match="ModuleList"):
        get(library, "utils.other.ModulesToSaveWrapper")(nn.ModuleList(), "default")


def test_an_adapter_without_a_copy_here_runs_the_original() -> None:
    theirs, ours = (model.head for model in twins("copies"))
    ours.state.records["other"] = ours.state.records["default"]  # an adapter that has copies elsewhere
    with pytest.raises(ValueError, match="other"):
        theirs.set_adapter("other")
    ours.set_adapter("other")
    x = torch.randn(2, 4)
    assert torch.equal(ours(x), ours.original_module(x))
    assert ours.active_adapters == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_tied_copies_share_the_weight(library: str) -> None:
    table = nn.Embedding(5, 3)
    head = nn.Linear(3, 5, bias=False)
    wrapper = get(library, "utils.other.ModulesToSaveWrapper")(head, "default", tied_module=table)
    assert wrapper.modules_to_save["default"].weight is table.weight
    assert wrapper(torch.randn(2, 3)).shape == (2, 5)


def test_copies_by_sample() -> None:
    wrappers = [copies(library).eval() for library in LIBRARIES]
    x = torch.randn(3, 3)
    outputs = []
    for wrapper in wrappers:
        wrapper.update("other")
        wrapper.modules_to_save["other"].weight.data.fill_(2.0)
        outputs.append(wrapper(x, adapter_names=["default", "other", "__base__"]))
        with pytest.raises(ValueError, match="adapter_names"):
            wrapper(x, adapter_names=["default"])
    assert torch.allclose(*outputs)


def tokens(library: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3)
    head = nn.Linear(3, 6, bias=False)
    head.weight = table.weight
    wrapper = get(library, "utils.other.TrainableTokensWrapper")
    first = wrapper(table, "default", token_indices=[1, 4])
    return first, wrapper(head, "default", token_indices=[1, 4], tied_adapter=first.token_adapter)


def test_token_rows_read_as_a_layer() -> None:
    """``layer.token_adapter`` of the layer with the rows, and of a head that shares them."""
    made = [tokens(library) for library in LIBRARIES]
    for wrappers in made:
        for wrapper in wrappers:
            wrapper.update(
                "other", token_indices=[2], tied_adapter=getattr(wrapper.token_adapter, "tied_adapter", None)
            )
            wrapper.token_adapter.set_adapter(["other"])
        wrappers[0].token_adapter.trainable_tokens_delta.other.data.fill_(2.0)
    for theirs, ours in zip(*([wrapper.token_adapter for wrapper in wrappers] for wrappers in made), strict=True):
        assert isinstance(ours, nn.Module)
        for name in ("default", "other"):
            for held in ("trainable_tokens_delta", "trainable_tokens_original"):
                mine, other = getattr(ours, held), getattr(theirs, held)
                assert sorted(mine.keys()) == sorted(other.keys())
                assert torch.equal(mine[name], other[name])
                assert getattr(mine, name).shape == getattr(other, name).shape
            assert ours.token_indices[name] == theirs.token_indices[name]
        assert "absent" not in ours.token_indices
        assert ours.active_adapter == theirs.active_adapter == ["other"]
        assert ours.active_adapters == theirs.active_adapters
        assert type(ours.base_layer) is type(theirs.base_layer)
        assert ours.get_base_layer() is ours.base_layer
        assert torch.equal(ours.get_merged_weights(["other"]), theirs.get_merged_weights(["other"]))
    for table, head in made:
        assert table.token_adapter is table.token_adapter
        assert table.token_adapter.tied_adapter is None
        assert head.token_adapter.tied_adapter is table.token_adapter
        assert head.token_adapter.trainable_tokens_delta is table.token_adapter.trainable_tokens_delta
    for theirs, ours in zip(
        *([table.token_adapter, copy.deepcopy(table).token_adapter] for table, _ in made), strict=True
    ):
        before = ours.base_layer.weight.clone()
        for layer in (theirs, ours):
            assert not layer.merged
            layer.merge(safe_merge=True)
            assert layer.merged
            assert layer.merged_adapters == ["other"]
        assert torch.equal(ours.base_layer.weight, theirs.base_layer.weight)
        assert not torch.equal(ours.base_layer.weight, before)
        assert torch.equal(ours.trainable_tokens_original["other"], theirs.trainable_tokens_original["other"])
        for layer in (theirs, ours):
            layer.unmerge()
            assert not layer.merged
        assert torch.equal(ours.base_layer.weight, before)
        for layer in (theirs, ours):
            layer.delete_adapter("other")
            assert "other" not in layer.trainable_tokens_delta
            assert "other" not in layer.trainable_tokens_original
            assert "other" not in layer.token_indices


@pytest.mark.parametrize("library", LIBRARIES)
def test_token_rows_of_their_own_that_two_layers_share(library: str) -> None:
    """The head that is tied to an adapted table shows the rows of the table."""
    sizes = {"vocab_size": 6, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True))
    before = model.lm_head.weight.detach().clone()
    config = get(library, "TrainableTokensConfig")(target_modules=["embed_tokens"], token_indices=[1, 4])
    model = get(library, "get_peft_model")(model, config).base_model.model
    table, head = model.model.embed_tokens, model.lm_head
    assert head.trainable_tokens_delta["default"] is table.trainable_tokens_delta["default"]
    for layer in (table, head):
        layer.trainable_tokens_delta.default.data.fill_(2.0)
        assert torch.equal(layer.trainable_tokens_original.default, before[[1, 4]])
        assert set(layer.trainable_tokens_original) == {"default"}


def test_no_token_adapter_without_token_rows() -> None:
    for library in LIBRARIES:
        layer = get(library, "tuners.lora.layer.Linear")(
            nn.Linear(3, 2), "default", config=get(library, "LoraConfig")(), r=2
        )
        assert not hasattr(layer, "token_adapter")


def test_token_rows_constructed() -> None:
    made = [tokens(library) for library in LIBRARIES]
    ids, x = torch.tensor([0, 1, 4]), torch.randn(2, 3)
    for table, _ in made:
        table.token_adapter.trainable_tokens_delta["default"].data.fill_(2.0)
    (theirs, their_head), (ours, our_head) = made
    assert torch.allclose(ours(ids), theirs(ids))
    assert torch.allclose(our_head(x), their_head(x), atol=1e-6)
    assert torch.equal(ours.original_module.weight, theirs.original_module.weight)
    assert ours.adapter_state_dict_load_map("default") == theirs.adapter_state_dict_load_map("default")
    mine, other = (w.adapter_state_dict("default", w.state_dict()) for w in (ours, theirs))
    assert set(mine) == set(other)
    assert all(torch.equal(mine[key], other[key]) for key in other)
    assert our_head.adapter_state_dict_load_map("default") == their_head.adapter_state_dict_load_map("default") == {}
    assert ours.check_set_adapter(["default"]) == theirs.check_set_adapter(["default"]) == "default"
    for wrapper in (theirs, ours):
        base = wrapper.unload_and_optionally_merge_module(True, False, None)
        assert type(base) is nn.Embedding
        assert torch.equal(base(ids)[1:], torch.full((2, 3), 2.0))


def test_users_wrapper() -> None:
    def make(library: str) -> Any:
        class Shift(get(library, "utils.other.AuxiliaryTrainingWrapper")):  # type: ignore[misc]
            adapter_layer_names = ("shifts",)

            def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
                self.shifts = nn.ParameterDict()

            def update(self, adapter_name: str, **kwargs: Any) -> None:
                super().update(adapter_name)
                self.shifts[adapter_name] = nn.Parameter(torch.full((2,), 3.0))

            def _error_message_name(self) -> str:
                return "shift"

            def _forward_wrapped(self, x: torch.Tensor) -> torch.Tensor:
                return self.original_module(x) + self.shifts[self.active_adapters[0]]

            def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str) -> torch.Tensor:
                return self.original_module(x) + self.shifts[active_adapter]

            def _forward_wrapped_passthrough(self, x: torch.Tensor) -> torch.Tensor:
                return self.original_module(x)

        return Shift

    x = torch.randn(2, 3)
    for library in LIBRARIES:
        base = nn.Linear(3, 2)
        wrapper = make(library)(base, "default")
        assert isinstance(wrapper, get(library, "utils.other.AuxiliaryTrainingWrapper"))
        assert torch.equal(wrapper(x), base(x) + 3)
        assert torch.equal(wrapper(x, adapter_names=["__base__", "default"])[0], base(x)[0])
        wrapper.enable_adapters(False)
        assert torch.equal(wrapper(x), base(x))
        assert wrapper.weight is base.weight
        wrapper.enable_adapters(True)
        wrapper.set_requires_grad("default", False)
        assert not wrapper.shifts["default"].requires_grad
        with pytest.raises(AttributeError):
            _ = wrapper.weight
        with pytest.raises(ValueError, match="absent"):
            wrapper.set_adapter(["absent"])
        with pytest.raises(TypeError, match="shift"):
            make(library)(nn.ModuleDict(), "default")


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_transformers_does_to_every_wrapper(library: str) -> None:
    """The loops of ``transformers.integrations.peft``: switching, and names for loading."""
    model = twins("copies")[LIBRARIES.index(library)]
    layer = get(library, "tuners.tuners_utils.BaseTunerLayer")
    wrapper = get(library, "utils.other.ModulesToSaveWrapper")
    auxiliary = get(library, "utils.other.AuxiliaryTrainingWrapper")
    x = torch.randn(3, 6)
    on = model.head(model.lin(x))
    for module in model.modules():
        if isinstance(module, (layer, wrapper)):
            module.enable_adapters(enabled=False)
    off = model.head(model.lin(x))
    plain = model.head.original_module(model.lin.base_layer(x))
    assert torch.equal(off, plain)
    for module in model.modules():
        if isinstance(module, (layer, wrapper)):
            module.enable_adapters(enabled=True)
            module.set_adapter("default")
    assert torch.equal(model.head(model.lin(x)), on)
    names = {
        f"{path}.{source}": f"{path}.{target}"
        for path, module in model.named_modules()
        if isinstance(module, auxiliary)
        for source, target in module.adapter_state_dict_load_map("default").items()
    }
    assert names == {f"head.{leaf}": f"head.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}
