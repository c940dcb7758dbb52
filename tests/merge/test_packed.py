"""keep="packed": the original comes back bitwise, from a few hundredths of its bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cell_cover import family_cover
from cells import Cell
from subject import Subject, assert_bitwise, assert_close, tensors_of
from test_merge_in_place import BUILDS, adapted, interrupted, two
from torch import nn

from inlay.core.call import opened
from inlay.core.merge import merge, unmerge
from inlay.core.packed import PackedKept
from inlay.core.state import find_state
from inlay.errors import StateError

PACKABLE = (torch.bfloat16, torch.float16, torch.float32)
CELLS = [cell for cell in family_cover(("plain_bf16", "plain_fp32", "plain_fp64"), 7) if cell.unmergeable is None]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_merge_then_unmerge_is_the_original(cell: Cell) -> None:
    subject = Subject(cell)
    base, unmerged = subject.base_output(), subject.model(subject.x).detach()
    before = tensors_of(subject.model)
    merge(subject.state, keep="packed")
    size = float(base.abs().max())
    assert_close(subject.model(subject.x), unmerged, cell.dtype, "merged", ulps=32, size=size)
    with opened(subject.state, disabled=True):
        assert_close(subject.model(subject.x), base, cell.dtype, "switched off")
    assert unmerge(subject.state)
    assert_bitwise(tensors_of(subject.model), before)


@pytest.mark.parametrize("dtype", PACKABLE, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in BUILDS if kind != "conv2d_channels_last"])
def test_low_rank_updates_are_packed(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that cancel, of either sign and of every size, in blocks of which the last is smaller."""
    monkeypatch.setattr("inlay.core.packed._BLOCK", 100)
    torch.manual_seed(1)
    _, state = adapted(nn.Sequential(BUILDS[kind]()).to(dtype), ["0"])
    (layer,) = state.layers()
    with torch.no_grad():
        flat = layer.weight.view(-1)
        flat[:8] = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 1e-30, 100.0, -100.0, 1e4]).to(dtype)
    before = tensors_of(layer)
    merge(state, keep="packed")
    assert isinstance(layer._kept, PackedKept)
    unmerge(state)
    assert_bitwise(tensors_of(layer), before)


@pytest.mark.parametrize(("size", "limit"), [(0.00005, 0.05), (0.0005, 0.08)])
def test_what_is_kept_is_small(size: float, limit: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16()
    _, state = adapted(model, ["0"])
    (layer,) = state.layers()
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(std=1.0)
        layer.lora_B["default"].weight.normal_(std=size)
    delta = layer.get_delta_weight("default")
    share = float(delta.detach().abs().mean() / layer.weight.detach().abs().mean())
    before = layer.weight.detach().clone()
    merge(state, keep="packed")
    kept = layer._kept.nbytes / (before.numel() * before.element_size())  # the factors included
    assert share > size * 10
    assert 0 < kept <= limit, (share, kept)
    unmerge(state)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", PACKABLE, ids=str)
def test_a_block_that_would_be_larger_is_kept_as_it_is(dtype: torch.dtype) -> None:
    """Random bits: nothing can be guessed, and nothing compressed."""
    from inlay.core.packed import _packed, _unpacked

    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 256, (64, 64 * dtype.itemsize), dtype=torch.uint8, generator=generator)
    original, guess = content.view(dtype), torch.zeros(64, 64, dtype=dtype)
    block = _packed(original, guess)
    assert block.others is None
    assert block.nbytes == content.numel()
    assert torch.equal(_unpacked(block, guess).view(torch.uint8), content)


def test_an_update_that_drowns_the_weight() -> None:
    _, state = adapted(two(torch.bfloat16, width=64), ["0"], size=300.0)
    (layer,) = state.layers()
    before = layer.weight.detach().clone()
    merge(state, keep="packed")
    assert layer._kept.nbytes <= before.numel() * 2 + 4 * (4 * 64 * 2)
    unmerge(state)
    assert torch.equal(layer.weight, before)


def test_copies_and_pickles_come_apart() -> None:
    model, state = adapted(two(torch.bfloat16), ["0"])
    before = tensors_of(model)
    merge(state, keep="packed")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[0].lora_A["default"].weight.zero_()  # the pack has factors of its own
            before_twin = {**before, "0.lora_A.default.weight": torch.zeros(4, 24)}
        unmerge(find_state(twin))
        assert_bitwise(tensors_of(twin), before_twin)
    unmerge(state)
    assert_bitwise(tensors_of(model), before)


def test_a_changed_weight_is_noticed() -> None:
    model, state = adapted(two(torch.bfloat16), ["0"])
    merge(state, keep="packed")
    with torch.no_grad():
        model[0].base_layer.weight[0, 0] += 1.0
    held = tensors_of(model)
    with pytest.raises(StateError, match=r"'0': the original weight cannot be restored .* merged weight was changed"):
        unmerge(state)
    assert_bitwise(tensors_of(model), held)


def test_a_second_merge_above_a_packed_one() -> None:
    import inlay

    model, state = adapted(two(torch.bfloat16), ["0"])
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"], init_lora_weights=False), model, "other")
    before = tensors_of(model)
    merge(state, ["default"], keep="packed")
    merge(state, ["other"], keep="packed")
    unmerge(state)
    assert_bitwise(tensors_of(model), before)


def test_an_interrupt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.core.packed._BLOCK", 10 * 24)
    model, state = adapted(two(torch.bfloat16), ["0", "1"])
    before = tensors_of(model)
    for place in (1, 2, 3, 5, 8, 9):
        with interrupted(place), pytest.raises(KeyboardInterrupt):
            merge(state, keep="packed")
        assert not any(layer.merged for layer in state.layers())
        assert_bitwise(tensors_of(model), before)
    merge(state, keep="packed")
    unmerge(state)
    assert_bitwise(tensors_of(model), before)


def test_other_numbers_of_threads_restore_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 500, bias=False))
    _, state = adapted(model, ["0"])
    before = model[0].weight.detach().clone()
    merge(state, keep="packed")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        unmerge(state)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(model[0].weight, before)


def test_keep_is_checked_and_reaches_the_merge() -> None:
    import inlay

    config = inlay.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = inlay.get_peft_model(two(torch.bfloat16), config)
    before = model.base_model.model[0].weight.detach().clone()
    with pytest.raises(inlay.InlayError, match="keep: expected 'copy', 'packed' or 'none', found 'pack'"):
        model.merge_adapter(keep="pack")
    model.merge_adapter(keep="packed")
    assert isinstance(model.base_model.model[0]._kept, PackedKept)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].weight, before)
