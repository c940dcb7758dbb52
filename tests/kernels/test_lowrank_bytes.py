"""What low-rank layers keep for backward, to the byte, and beside PEFT."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay
import inlay.core.sharing as sharing

ROWS, WIDTH, RANK = 96, 128, 8


class Attention(nn.Module):
    """Three layers that read one tensor; the sum keeps nothing of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def model_of(package: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = package.LoraConfig(r=RANK, target_modules=["q", "k", "v"], init_lora_weights=False, **options)
    return package.get_peft_model(copy.deepcopy(Attention()).to(dtype), config).train()


def kept(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the storages that autograd saves in one forward, parameters and buffers aside."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(storage.nbytes() for storage in saved.values())
    del y
    return total


@pytest.fixture
def as_without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on saved tensors may be a gradient checkpoint's, so nothing is shared under them; the count is one."""
    monkeypatch.setattr(sharing, "may_be_checkpointed", lambda training: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lora_keeps_each_input_once_and_the_narrow_product(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    assert kept(model_of(inlay, dtype), dtype) == ROWS * WIDTH * size + 3 * ROWS * RANK * size


def test_joined_products_keep_the_same(as_without_hooks: None) -> None:
    model = model_of(inlay)
    state = model.base_model.model.q.state
    state.policy = dataclasses.replace(state.policy, share_inputs=True)
    for _ in range(3):
        assert kept(model) == ROWS * WIDTH * 2 + 3 * ROWS * RANK * 2


def test_dropout_adds_one_byte_an_element() -> None:
    plain = ROWS * WIDTH * 2 + 3 * ROWS * RANK * 2
    assert kept(model_of(inlay, lora_dropout=0.1)) == plain + ROWS * WIDTH


def test_dora_adds_what_its_magnitude_is_multiplied_with() -> None:
    found = kept(model_of(inlay, use_dora=True))
    vectors = 3 * WIDTH * 4 * 4  # norms and quotients, in float32
    assert found <= ROWS * WIDTH * 2 + 3 * ROWS * RANK * 2 + 3 * ROWS * WIDTH * 2 + vectors


@pytest.mark.parametrize(("options", "least"), [({}, 3.5), ({"use_dora": True}, 5.0)], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_beside_peft(options: dict[str, Any], least: float, p: float, as_without_hooks: None) -> None:
    ours = kept(model_of(inlay, lora_dropout=p, **options))
    theirs = kept(model_of(peft, lora_dropout=p, **options))
    assert theirs >= least * ours, (theirs, ours)
