"""Low-rank merges happen in the memory of the weight: rounded once, within a few rows of extra memory, whole or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import peft
import pytest
import torch
from cell_layers import Experts, hf_conv1d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.core import merge_bound
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.state import State, find_state
from inlay.errors import MergeError

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)


def adapted(model: nn.Module, targets: list[str], size: float = 0.1, **options: Any) -> tuple[nn.Module, State]:
    """Inject a LoRA whose B is not zero."""
    config = inlay.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    inlay.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    state = find_state(model)
    assert state is not None
    return model, state


def two(dtype: torch.dtype = torch.float32, width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)).to(dtype)


def exact(layer: AdaptedLayer) -> Tensor:
    """The merged weight in float64, in its stored shape, from the adapter's own tensors."""
    total = getattr(layer.leaf_layer, layer.kind.weight_name).detach().double()
    for entry in layer.chain():
        p = layer.params(entry)
        A, B = entry.method.factors(entry.site, p.A.double(), p.B.double())
        delta = torch.matmul(B, A) * p.scaling
        total = total + layer.kind.from_matrix(layer.site, delta).reshape(total.shape)
    return total


BUILDS = {
    "linear": lambda: nn.Linear(20, 12),
    "conv1d_hf": hf_conv1d,
    "embedding": lambda: nn.Embedding(11, 12),
    "conv2d": lambda: nn.Conv2d(4, 8, (3, 2)),
    "conv2d_channels_last": lambda: nn.Conv2d(4, 8, (3, 2)).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BUILDS)
def test_every_number_is_rounded_once(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.core.merge_rows._BUFFER", {"cpu": 200})  # chunks of a few rows, the last one smaller
    torch.manual_seed(1)
    _, state = adapted(nn.Sequential(BUILDS[kind]()).to(dtype), ["0"])
    (layer,) = state.layers()
    stored = layer.leaf_layer.weight
    place, expected = stored.data_ptr(), exact(layer)
    merge(state, keep="none")
    assert layer.leaf_layer.weight is stored
    assert stored.data_ptr() == place
    error = (stored.detach().double() - expected).abs()
    if dtype in HALVES:
        nearest = (expected.to(dtype).double() - expected).abs()
        assert bool((error <= nearest * 1.01 + 1e-7).all()), "not the nearest number of the dtype"
    else:
        assert error.max().item() <= 4 * torch.finfo(dtype).eps * expected.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_are_merged_bank_by_bank(dtype: torch.dtype) -> None:
    _, state = adapted(nn.Sequential(Experts()).to(dtype), [], target_parameters=["0.up", "0.down"])
    layers = [layer for layer in state.layers() if isinstance(layer, AdaptedLayer)]
    assert len(layers) == 2
    expected = [exact(layer) for layer in layers]
    merge(state, keep="none")
    for layer, wanted in zip(layers, expected, strict=True):
        stored = getattr(layer.leaf_layer, layer.kind.weight_name).detach()
        torch.testing.assert_close(
            stored.double(), wanted.to(dtype).double(), rtol=0.01 if dtype in HALVES else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_peft(dtype: torch.dtype) -> None:
    model, state = adapted(two(dtype), ["0", "1"])
    expected = [exact(layer) for layer in state.layers()]
    twin = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]), two(dtype))
    peft.set_peft_model_state_dict(twin, inlay.get_peft_model_state_dict(model))
    merge(state, keep="none")
    for index, wanted in enumerate(expected):
        twin[index].merge()
        ours, theirs = ((m[index].base_layer.weight.detach().double() - wanted).norm() for m in (model, twin))
        assert ours.item() <= theirs.item() * 1.05
        if dtype in HALVES:  # PEFT rounds the update before it adds it
            assert ours.item() < theirs.item() * 0.95


def test_several_adapters_are_rounded_together() -> None:
    model, state = adapted(two(torch.bfloat16), ["0"])
    inlay.inject_adapter_in_model(inlay.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), model, "other")
    from inlay.core.active import set_active

    set_active(state, ["default", "other"])
    (layer,) = state.layers()
    expected = exact(layer)
    merge(state, keep="none")
    wrong = layer.leaf_layer.weight.detach() != expected.to(torch.bfloat16)
    assert float(wrong.float().mean()) < 0.01


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_of(action: Any) -> int:
    """Bytes that torch's allocator gave out during an action at most, tensors inside operators included."""
    from torch.autograd.profiler import profile
    from torch.autograd.profiler_util import MEMORY_EVENT_NAME

    with profile(profile_memory=True, use_cpu=True) as recorded:
        action()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == MEMORY_EVENT_NAME
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2**20), (torch.bfloat16, 2**22), (torch.float16, 2**22)])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_peak_of_extra_memory(dtype: torch.dtype, limit: int, kind: str) -> None:
    base = nn.Linear(2048, 2048, bias=False) if kind == "linear" else nn.Embedding(2048, 2048)
    _, state = adapted(nn.Sequential(base).to(dtype), ["0"])
    weight = 2048 * 2048 * dtype.itemsize
    assert limit < weight
    whole = peak_of(lambda: base.weight.detach().clone())
    assert whole >= weight  # the count sees what it has to see
    peak = peak_of(lambda: merge(state, keep="none"))
    assert 0 < peak <= limit
    assert (base.weight.detach()[0] != 0).any()


def test_a_copy_is_all_that_keeping_costs() -> None:
    base = nn.Linear(1024, 1024, bias=False)
    _, state = adapted(nn.Sequential(base), ["0"])
    assert peak_of(lambda: merge(state, keep="copy")) <= 1024 * 1024 * 4 + 2**20


# -- finiteness ------------------------------------------------------------------------------------------------------


def reads(state: State, names: list[str] | None = None) -> list[str]:
    """The operators with which a merge looks at its weights."""
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        merge(state, names, keep="none")
    return seen


def test_small_updates_are_proved_by_one_read() -> None:
    _, state = adapted(two(), ["0"])
    seen = reads(state)
    assert seen.count("mv") == 1
    assert "abs" not in seen, "torch.isfinite, which makes tensors of the weight's size"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_base_weight_is_refused(dtype: torch.dtype, value: float) -> None:
    model, state = adapted(two(dtype), ["0", "1"])
    with torch.no_grad():
        model[1].base_layer.weight[3, 5] = value
    before = copy.deepcopy(model.state_dict())
    for keep in ("none", "copy"):
        with pytest.raises(MergeError, match="not finite"):
            merge(state, keep=keep)
        assert not any(layer.merged for layer in state.layers())
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_no_reason_to_refuse(dtype: torch.dtype) -> None:
    """A mask's largest number stays what it is when a small update is added."""
    model, state = adapted(two(dtype), ["0"], size=0.01)
    largest = torch.finfo(dtype).max
    with torch.no_grad():
        model[0].base_layer.weight[3, 5] = largest
        model[0].base_layer.weight[3, 6] = largest
    merge(state)
    assert float(model[0].base_layer.weight[3, 5]) == largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_that_overflows_is_refused(dtype: torch.dtype) -> None:
    model, state = adapted(two(dtype), ["0"])
    with torch.no_grad():
        model[0].base_layer.weight[3, 5] = torch.finfo(dtype).max
        root = torch.finfo(dtype).max ** 0.5 / 4
        model[0].lora_A["default"].weight.fill_(root)
        model[0].lora_B["default"].weight.fill_(root)
    with pytest.raises(MergeError, match="not finite"):
        merge(state, keep="none")


def test_what_was_seen_to_be_finite_is_not_read_again() -> None:
    model, state = adapted(two(), ["0"])
    assert "mv" in reads(state)
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"]), model, "next")
    assert "mv" not in reads(state, ["next"])  # the merged weight was proved
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"]), model, "last")
    with torch.no_grad():
        model[0].base_layer.weight[0, 0] = 1.0
    assert "mv" in reads(state, ["last"])


def test_unmerging_gives_back_what_was_known() -> None:
    model, state = adapted(two(), ["0"])
    merge(state)
    unmerge(state)
    assert merge_bound.known_finite(model[0].base_layer.weight)
    with torch.no_grad():
        model[0].base_layer.weight[0, 0] = float("nan")
    assert not merge_bound.known_finite(model[0].base_layer.weight)
    assert not merge_bound.is_finite(model[0].base_layer.weight)


# -- interruptions ---------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(after: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt where call number ``after`` that may write to memory returns, as a signal would."""
    writes: list[str] = []

    class Interrupt(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.__name__ in ("copy_", "addmm_", "addmm"):
                writes.append(func.__name__)
                if len(writes) == after:
                    raise KeyboardInterrupt
            return result

    with Interrupt():
        yield writes


@pytest.mark.parametrize("keep", ["copy", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_interrupt_leaves_whole_layers(keep: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it hits: with copies nothing has changed; without, each layer is as it says it is."""
    monkeypatch.setattr("inlay.core.merge_rows._BUFFER", {"cpu": 10 * 24 * 4})  # three chunks a layer
    model, state = adapted(two(dtype), ["0", "1"])
    original = [layer.weight.detach().clone() for layer in state.layers()]
    merge(state)
    merged = [layer.weight.detach().clone() for layer in state.layers()]
    unmerge(state)
    x = torch.randn(3, 24, dtype=dtype)
    output = model(x)
    places = 0
    while True:
        places += 1
        with interrupted(places) as writes, suppress(KeyboardInterrupt):
            merge(state, keep=keep)
        finished = len(writes) < places
        for layer, before, after in zip(state.layers(), original, merged, strict=True):
            assert torch.equal(layer.weight, after if layer.merged else before), (places, writes[-1])
            if keep == "copy" and not finished:
                assert not layer.merged
        torch.testing.assert_close(model(x), output, rtol=0.05, atol=0.05)
        with torch.no_grad():
            for layer, before in zip(state.layers(), original, strict=True):
                layer.write({}, (), {})
                layer.weight.copy_(before)
        if finished:
            break
    assert places > (2 if dtype == torch.float32 else 2 * 3 * 3)


def test_an_interrupt_between_tied_layers_counts_the_update_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    torch.manual_seed(0)
    model, state = adapted(Tied(), ["embed", "head"], ensure_weight_tying=True)
    x = torch.arange(11)
    expected = model(x).detach()
    with interrupted(1), pytest.raises(KeyboardInterrupt):
        merge(state, keep="none")
    assert all(layer.merged for layer in state.layers())
    torch.testing.assert_close(model(x), expected)
