"""``iter_merged`` yields what merging and unloading would leave, and leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from cell_cover import family_cover
from cells import Cell
from subject import Subject, assert_bitwise, tensors_of
from torch import Tensor, nn

import inlay
from inlay.core import storage
from inlay.core.eject import eject
from inlay.core.merge import merge, unmerge
from inlay.core.state import State, find_state
from inlay.errors import MergeError, StateError, UnknownAdapterError

CELLS = [cell for cell in family_cover(("plain_fp32", "plain_bf16"), 3) if cell.unmergeable is None]


def merged_copy(model: nn.Module, names: list[str] | None = None, keep: str = "none") -> dict[str, Tensor]:
    """The state dict of a copy that was merged and unloaded."""
    twin = copy.deepcopy(model)
    state = find_state(twin)
    assert state is not None
    merge(state, names, keep=keep)
    return eject(twin, state, restore=False).state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the last place: chunked products may be summed in another order."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        exact = {"rtol": 0.0, "atol": 0.0}
        near = {"rtol": 2 * torch.finfo(tensor.dtype).eps, "atol": 1e-6} if tensor.is_floating_point() else exact
        torch.testing.assert_close(found[name], tensor, **near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_merging_a_copy(cell: Cell) -> None:
    subject = Subject(cell)
    before = tensors_of(subject.model)
    modules = {name: id(module) for name, module in subject.model.named_modules()}
    found = dict(inlay.iter_merged(subject.model))
    assert_bitwise(tensors_of(subject.model), before)
    assert {name: id(module) for name, module in subject.model.named_modules()} == modules
    assert not any(layer.merged for layer in subject.state.layers())
    same(found, merged_copy(subject.model))
    assert list(found) == list(subject.untouched.state_dict())
    assert not any(tensor.requires_grad for tensor in found.values())


def small(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, State]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.norm = nn.BatchNorm1d(8)
            self.up = nn.Linear(8, 8)
            self.head = nn.Linear(8, 13, bias=False)
            self.register_buffer("table", torch.arange(4))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(self.norm(self.embed(x))))

    torch.manual_seed(0)
    model = Net().to(dtype)
    options = {"target_modules": ["up"], "init_lora_weights": False, "r": 3} | options
    inlay.inject_adapter_in_model(inlay.LoraConfig(**options), model)
    state = find_state(model)
    assert state is not None
    return model, state


def test_peft_merges_to_the_same() -> None:
    """The oracle is PEFT's own merged and unloaded model, full copies included."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 5), "head": nn.Linear(5, 3)})
    config: dict[str, Any] = {
        "r": 3,
        "target_modules": ["a", "b"],
        "modules_to_save": ["head"],
        "init_lora_weights": False,
    }
    ours = inlay.get_peft_model(copy.deepcopy(base), inlay.LoraConfig(**config))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    with torch.no_grad():
        ours.base_model.model["head"].modules_to_save["default"].weight.mul_(3)
    peft.set_peft_model_state_dict(theirs, inlay.get_peft_model_state_dict(ours))
    found = dict(inlay.iter_merged(ours))
    same(found, theirs.merge_and_unload().state_dict())
    assert not torch.equal(found["head.weight"], base["head"].weight)


def test_untouched_tensors_are_the_models_own() -> None:
    model, _ = small()
    found = dict(inlay.iter_merged(model))
    names = {"embed.weight", "head.weight", "norm.weight", "norm.running_mean", "norm.num_batches_tracked", "table"}
    assert names < found.keys()
    assert "scratch" not in found
    for name in names:
        assert found[name].data_ptr() == model.state_dict()[name].data_ptr(), name
    assert found["up.weight"].data_ptr() != model.up.base_layer.weight.data_ptr()


def test_tied_weights_come_once() -> None:
    torch.manual_seed(0)
    model, _ = small()
    plain = inlay.get_base_model_state_dict(model)
    model.head.weight = model.embed.weight
    found = list(dict(inlay.iter_merged(model)))
    assert found == [name for name in plain if name != "head.weight"]
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["embed"], init_lora_weights=False), model, "e")
    with pytest.raises(MergeError, match="shares its weight with 'head'"):
        inlay.iter_merged(model, ["e"])


def test_a_tied_update_is_yielded_merged() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"embed": nn.Embedding(13, 8), "head": nn.Linear(8, 13, bias=False)})
    net["head"].weight = net["embed"].weight
    config = inlay.LoraConfig(target_modules=["embed", "head"], ensure_weight_tying=True, init_lora_weights=False)
    inlay.inject_adapter_in_model(config, net)
    found = dict(inlay.iter_merged(net))
    assert list(found) == ["embed.weight"]
    expected = merged_copy(net)
    torch.testing.assert_close(found["embed.weight"], expected["embed.weight"])
    assert torch.equal(expected["head.weight"], expected["embed.weight"])


def test_dtype_is_rounded_once() -> None:
    model, state = small(torch.bfloat16)
    (layer,) = state.layers()
    p = layer.params(layer.entries["default"][0])
    exact = layer.weight.detach().double() + p.B.double() @ p.A.double() * p.scaling
    wide = dict(inlay.iter_merged(model, dtype=torch.float32))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(wide["up.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    half = dict(inlay.iter_merged(model, dtype=torch.float16))
    assert torch.equal(half["up.weight"], wide["up.weight"].half())
    with pytest.raises(inlay.InlayError, match="expected a floating dtype"):
        inlay.iter_merged(model, dtype=torch.int8)


def test_which_adapters() -> None:
    model, _ = small()
    config = inlay.LoraConfig(target_modules=["head"], init_lora_weights=False)
    inlay.inject_adapter_in_model(config, model, "other")
    for names in (["default"], ["other"], ["other", "default"], []):
        same(dict(inlay.iter_merged(model, names)), merged_copy(model, names))
    same(dict(inlay.iter_merged(model, "other")), merged_copy(model, ["other"]))
    with pytest.raises(UnknownAdapterError, match="Did you mean 'other'"):
        inlay.iter_merged(model, "othr")
    with pytest.raises(StateError, match="has no adapters"):
        inlay.iter_merged(nn.Linear(2, 2))


def test_beside_what_is_merged_already() -> None:
    model, state = small()
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["up"], init_lora_weights=False), model, "other")
    both = dict(inlay.iter_merged(model, ["default", "other"]))
    merge(state, ["default"])
    same(dict(inlay.iter_merged(model, ["default", "other"])), both)
    with pytest.raises(MergeError, match="'default' is merged into the weight"):
        inlay.iter_merged(model, ["other"])
    unmerge(state)
    same(dict(inlay.iter_merged(model, ["default", "other"])), both)


def test_a_forward_between_two_tensors() -> None:
    model, _ = small()
    model.eval()
    x = torch.tensor([1, 5, 2])
    expected, output = dict(inlay.iter_merged(model)), model(x)
    found = {}
    for name, tensor in inlay.iter_merged(model):
        torch.testing.assert_close(model(x), output, rtol=0, atol=0)
        found[name] = tensor
    same(found, expected)


def test_numbers_that_are_not_finite() -> None:
    model, state = small(torch.float16)
    (layer,) = state.layers()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(300.0)
        layer.lora_B["default"].weight.fill_(300.0)
    with pytest.raises(MergeError, match=r"'up': merging 'default' gives a weight that is not finite in torch.float16"):
        dict(inlay.iter_merged(model))
    assert dict(inlay.iter_merged(model, dtype=torch.float32))["up.weight"].isfinite().all()


def test_memory_is_that_of_one_tensor() -> None:
    from test_merge_in_place import peak_of

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(768, 768, bias=False) for _ in range(4))).bfloat16()
    config = inlay.LoraConfig(r=4, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    inlay.inject_adapter_in_model(config, model)

    def consume() -> None:
        for _, tensor in inlay.iter_merged(model):
            del tensor

    assert peak_of(consume) <= 768 * 768 * 2 + 2**20


class Eighths(storage.Storage):
    """A toy quantised form: int8 in eighths; cannot be written."""

    name = "eighths"
    writable = False

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, EighthsLinear)

    def read(self, module: nn.Module, name: str) -> Tensor:
        tensor = getattr(module, name)
        return tensor if tensor.is_floating_point() else tensor.to(torch.float32) / 8


class EighthsLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.weight = nn.Parameter(torch.randint(-20, 20, (6, 6), dtype=torch.int8), requires_grad=False)
        self.register_buffer("bookkeeping", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() / 8, self.bias)


def test_quantised_weights_come_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_storages", [Eighths(), storage.PLAIN])
    model = nn.Sequential(EighthsLinear(), EighthsLinear())
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"], init_lora_weights=False), model)
    found = dict(inlay.iter_merged(model, dtype=torch.float64))
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    (layer,) = find_state(model).layers()
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(found["0.weight"].float(), layer.base_layer.weight.float() / 8 + delta)
    assert torch.equal(found["1.weight"].float(), model[1].weight.float() / 8)


def test_meta_tensors_have_no_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"]), model)
    with pytest.raises(StateError, match=r"'0.weight' is on the meta device"):
        next(inlay.iter_merged(model))


def test_adapter_tensors_are_the_checkpoint_without_copies() -> None:
    model, state = small()
    found = inlay.adapter_tensors(model)
    expected = inlay.get_peft_model_state_dict(model)
    assert list(found) == list(expected) == ["up.lora_A.weight", "up.lora_B.weight"]
    (layer,) = state.layers()
    assert found["up.lora_A.weight"].data_ptr() == layer.lora_A["default"].weight.data_ptr()
    assert not found["up.lora_A.weight"].requires_grad
    wrapped = inlay.get_peft_model(nn.Sequential(nn.Linear(3, 3)), inlay.LoraConfig(target_modules=["0"]))
    twin = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
    assert inlay.adapter_tensors(wrapped).keys() == peft.get_peft_model_state_dict(twin).keys()
    with pytest.raises(UnknownAdapterError):
        inlay.adapter_tensors(model, "defalt")
