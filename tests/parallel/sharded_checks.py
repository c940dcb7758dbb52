"""What every way of sharding is held against: the same model in one process."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharded_model import adapted, batch, build, loss, perturb
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inlay.checkpoint.load import load_all
from inlay.checkpoint.merged import iter_merged
from inlay.checkpoint.save import save_adapters
from inlay.checkpoint.state_dict import get_peft_model_state_dict
from inlay.core.merge import merge, unmerge
from inlay.core.state import State, find_state
from inlay.parallel.tensors import gather

TOLERANCE = 1e-6


class Reference:
    """The unsharded model with a perturbed adapter: its output, gradients and checkpoints (fresh and perturbed)."""

    def __init__(self, config: str | Any, shares: int = 1) -> None:
        """``config`` of an adapter, or its name; the batch runs in so many parts, which some methods do not mix."""
        self.model = build()
        self.base = copy.deepcopy(self.model)
        self.state = adapted(self.model, config)
        if self.state.records["one"].method.samples:
            self.model.eval()  # without noise
        self.fresh = checkpoint(self.model)
        perturb(self.state)
        self.saved = checkpoint(self.model)
        self.x = batch().requires_grad_()
        outputs = [self.model(x) for x in self.x.chunk(shares)]
        (sum(map(loss, outputs)) / shares).backward()
        self.y = torch.cat(outputs).detach()
        self.gradients = {name: p.grad for name, p in trained(self.model).items()}


def checkpoint(model: nn.Module, name: str = "one") -> dict[str, Tensor]:
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_close(
    found: Tensor | None, expected: Tensor | None, what: str, tolerance: float = TOLERANCE, size: float = 1.0
) -> None:
    """Fail if ``found`` is off by more than ``tolerance`` of the largest magnitude, or of ``size`` if that is more."""
    assert found is not None, f"{what} is missing"
    assert expected is not None, f"{what} is missing in the unsharded model"
    found = gather(found)
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = float((found - expected).detach().abs().max())
    scale = max(size, float(expected.detach().abs().max()))
    assert error <= tolerance * scale, f"{what} is off by {error:.3g} at a size of {scale:.3g}"


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_gradients(
    model: nn.Module, expected: dict[str, Tensor | None], tolerance: float = TOLERANCE, size: float = 1.0
) -> None:
    found = trained(model)
    names = {name.removeprefix("module."): p for name, p in found.items()}
    assert names.keys() == expected.keys(), sorted(names.keys() ^ expected.keys())
    for name, parameter in names.items():
        if expected[name] is None:  # what only noise reads
            assert parameter.grad is None, name
            continue
        assert_close(parameter.grad, expected[name], f"gradient of {name}", tolerance, size)


def assert_merges(model: nn.Module, state: State, reference: Reference) -> None:
    """Merging gives the weights of the unsharded merge; unmerging gives every part back bitwise.

    So does ``iter_merged``, whose tensors are whole, and which writes nothing.
    """
    whole = copy.deepcopy(reference.model)
    whole_state = find_state(whole)
    assert whole_state is not None
    merge(whole_state)
    streamed = dict(iter_merged(reference.model))
    before = {name: part(p).clone() for name, p in model.named_parameters()}
    gathered = dict(iter_merged(model))
    assert gathered.keys() == streamed.keys()
    for name, tensor in streamed.items():
        assert_close(gathered[name], tensor, f"streamed {name}")
    for name, parameter in model.named_parameters():
        assert torch.equal(part(parameter), before[name]), f"{name} after streaming"
    merge(state)
    with torch.no_grad():
        assert_close(model(reference.x.detach()), reference.y, "merged output")
    expected = {name: p for name, p in whole.named_parameters() if "base_layer" in name}
    assert expected
    found = dict(model.named_parameters())
    for name, parameter in expected.items():
        assert_close(found[name], parameter, f"merged {name}")
    unmerge(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(part(parameter), before[name]), f"{name} after unmerging"


def assert_trains(model: nn.Module, x: Tensor, reference: Reference, wrapped: nn.Module | None = None) -> None:
    """Three optimiser steps end where they end unsharded."""
    ends = []
    for net, inputs in ((wrapped or model, x), (reference.model, reference.x.detach())):
        for parameter in net.parameters():
            parameter.grad = None
        # torch's fused and foreach steps take no mixture of plain and distributed tensors
        optimizer = torch.optim.AdamW(trained(net).values(), lr=0.01, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            loss(net(inputs)).backward()
            optimizer.step()
        ends.append(checkpoint(net))
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[1].items():
        # Adam divides by the gradient's own size, which lifts rounding of tiny gradients
        assert_close(ends[0][key], value, f"{key} after training", 2e-5)


@contextmanager
def common_folder() -> Iterator[Path]:
    """A folder that every process knows; the first one makes it and takes it away."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(path)
    try:
        yield Path(path[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path[0])


def assert_files(model: nn.Module, reference: Reference) -> None:
    """Every process gathers and one writes; the file is the one of the unsharded model, which can read it."""
    with common_folder() as folder:
        save_adapters(model, folder / "sharded", is_main_process=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            save_adapters(reference.model, folder / "whole")
        dist.barrier()
        names = ("sharded/one", "whole/one")
        found, expected = (load_file(folder / name / "adapter_model.safetensors") for name in names)
        assert_bitwise(found, expected)
        fresh = build()
        load_all(fresh, folder / "sharded")
        with torch.no_grad():
            assert torch.equal(fresh(reference.x), reference.y)


def my_share(x: Tensor) -> Tensor:
    """The samples that this process has under data parallelism."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]
