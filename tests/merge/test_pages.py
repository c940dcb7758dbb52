"""Copies of large tensors: what they hold, and in which memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import inlay
from inlay.core.pages import copied

LARGE = (1 << 11, (1 << 11) + 3)  # 16 MiB of float32


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), LARGE])
@pytest.mark.parametrize("turned", [False, True])
def test_a_copy_has_the_numbers_and_the_strides(shape: tuple[int, int], turned: bool) -> None:
    tensor = torch.randn(shape)
    tensor = nn.Parameter(tensor.t() if turned else tensor)
    copy = copied(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert not copy.requires_grad
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def flags_at(address: int) -> set[str]:
    """What Linux notes of the memory at an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            first, last = (int(part, 16) for part in head[0].split("-"))
            here = first <= address < last
        elif here and head[0] == "VmFlags:":
            return set(head[1:])
    raise AssertionError(f"no memory at {address:#x}")


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="no large pages here",
)
def test_what_a_merge_keeps_may_lie_in_large_pages() -> None:
    linear = nn.Linear(*LARGE, bias=False)
    before = linear.weight.detach().clone()
    model = inlay.get_peft_model(nn.Sequential(linear), inlay.LoraConfig(r=1, target_modules=["0"]))
    model.merge_adapter()
    (kept,) = model.base_model.model[0]._kept.values()
    assert "hg" in flags_at(kept.data_ptr() + kept.numel() * kept.element_size() // 2)
    assert torch.equal(kept, before)
