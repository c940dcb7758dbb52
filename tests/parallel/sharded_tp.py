"""Tensor parallelism: ``parallelize_module`` on the base, then injection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_checks import (
    Reference,
    assert_bitwise,
    assert_close,
    assert_files,
    assert_gradients,
    assert_merges,
    assert_trains,
    checkpoint,
    common_folder,
    trained,
)
from sharded_further import FURTHER, equal_runs
from sharded_model import METHODS, SEED, Net, adapted, batch, build, loss, perturb
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from inlay.checkpoint.load import load_all
from inlay.checkpoint.save import save_adapters
from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.errors import UnsupportedError
from inlay.methods.lora import LoraConfig

Hooks = dict[str, tuple[list[int], list[int]]]


def spread(model: Net | None = None, mesh: Any = None) -> Net:
    """The base model with ``up`` split by output and ``down`` by input."""
    styles = {"up": ColwiseParallel, "down": RowwiseParallel}
    layers = {f"blocks.{i}.{name}": style() for i in range(2) for name, style in styles.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    return parallelize_module(build() if model is None else model, mesh, layers)


def hooks(modules: dict[str, nn.Module]) -> Hooks:
    return {name: (list(m._forward_pre_hooks), list(m._forward_hooks)) for name, m in modules.items()}


def equals(method: str) -> None:
    """Initial values, loading, forward, gradients, saving, merging, ejecting, training."""
    reference = Reference(method)
    model = spread()
    originals = dict(model.named_modules())
    before = hooks(originals)
    state = adapted(model, method)
    assert not model.blocks[0].up.base_layer._forward_pre_hooks, "the hook that spreads the input stayed below"
    assert_bitwise(checkpoint(model), reference.fresh)
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    x = reference.x.detach().clone().requires_grad_()
    y = model(x)
    assert_close(y, reference.y, "output")
    loss(y).backward()
    assert_close(x.grad, reference.x.grad, "gradient of the input")
    assert_gradients(model, reference.gradients)
    assert_files(model, reference)
    assert_merges(model, state, reference)
    assert_trains(model, x.detach(), reference)
    eject(model, state)
    assert dict(model.named_modules()) == originals
    assert hooks(originals) == before
    with torch.no_grad():
        assert_close(model(x), reference.base(x), "output after ejecting")


def further(method: str) -> None:
    reference = Reference(FURTHER[method]())
    model = spread()
    state = adapted(model, FURTHER[method]())
    model.train(reference.model.training)
    equal_runs(model, state, reference, reference.x.detach(), reference.y)


def placements() -> None:
    """Axes of the layer's output or input are split where the base weight is; everything else is whole everywhere."""
    model = spread()
    adapted(model, "dora")
    block = model.blocks[0]
    found = {
        f"{name} {role}": tensor.placements
        for name in ("up", "down")
        for role, tensor in (
            ("A", block.get_submodule(name).lora_A["one"].weight),
            ("B", block.get_submodule(name).lora_B["one"].weight),
            ("magnitude", block.get_submodule(name).lora_magnitude_vector["one"].weight),
        )
    }
    whole = (Replicate(),)
    assert found == {
        "up A": whole,
        "up B": (Shard(0),),
        "up magnitude": (Shard(0),),
        "down A": (Shard(1),),
        "down B": whole,
        "down magnitude": whole,
    }
    assert not isinstance(model.head.lora_A["one"].weight, DTensor)


def unequal_seeds() -> None:
    """Processes that would draw other values get those of the first one."""
    model = spread()
    inject(plan(model, METHODS["vera"](), "one"), seed=dist.get_rank())
    first = build()
    inject(plan(first, METHODS["vera"](), "one"), seed=0)
    expected = dict(first.blocks[0].named_parameters())
    for name, parameter in model.blocks[0].named_parameters():
        assert_close(parameter, expected[name], name)
    copies = [torch.empty(4) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, model.blocks[0].up.vera_lambda_d["one"].to_local().detach())
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def two_adapters() -> tuple[Net, Net, Any, Any]:
    whole, model = build(), spread()
    states = []
    for net in (whole, model):
        state = adapted(net, "lora", "one")
        adapted(net, "dora", "two")
        states.append(state)
    for name in ("one", "two"):
        perturb(states[0], name)
        set_peft_model_state_dict(model, checkpoint(whole, name), adapter_name=name)
    return whole, model, *states


def by_sample() -> None:
    """Adapters chosen by sample, gradients included."""
    whole, model, whole_state, state = two_adapters()
    names = ["one", "two", "__base__", "two", "one", "__base__"]
    for net, owner in ((whole, whole_state), (model, state)):
        with opened(owner, names=names):
            y = net(batch())
        loss(y).backward()
        if net is whole:
            expected = y.detach()
    assert_close(y, expected, "output")
    assert_gradients(model, {name: p.grad for name, p in trained(whole).items()})


def several() -> None:
    """Two adapters of different methods at once, and none at all."""
    from inlay.core.active import set_active

    whole, model, whole_state, state = two_adapters()
    for owner in (whole_state, state):
        set_active(owner, ["one", "two"])
    assert_close(model(batch()), whole(batch()), "output of both")
    with opened(state, disabled=True):
        assert_close(model(batch()), build()(batch()), "output without adapters")


def full_copy() -> None:
    """A full copy of a layer that is spread."""
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    whole, model = build(), spread()
    for net in (whole, model):
        inject(plan(net, config, "one"), seed=SEED)
        with torch.no_grad():
            net.blocks[1].down.modules_to_save["one"].weight.mul_(1.5)
        y = net(batch())
        loss(y).backward()
        if net is whole:
            expected = y.detach()
    assert_close(y, expected, "output")
    assert_gradients(model, {name: p.grad for name, p in trained(whole).items()})
    assert_bitwise(checkpoint(model), checkpoint(whole))


def low_memory() -> None:
    """Tensors that are made by the load take their place as they come."""
    reference = Reference("dora")
    model = spread()
    inject(plan(model, METHODS["dora"](), "one"), low_memory=True)
    assert model.blocks[0].up.lora_A["one"].weight.is_meta
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    assert model.blocks[0].up.lora_B["one"].weight.placements == (Shard(0),)
    assert_close(model(batch()), reference.y, "output")
    assert_bitwise(checkpoint(model), reference.saved)


def read_file() -> None:
    """Every process reads a checkpoint that an unsharded model wrote, and keeps its part."""
    reference = Reference("dora")
    model = spread()
    with common_folder() as folder:
        if dist.get_rank() == 0:
            save_adapters(reference.model, folder)
        dist.barrier()
        load_all(model, folder)
    assert model.blocks[0].up.lora_B["one"].weight.placements == (Shard(0),)
    assert_close(model(batch()), reference.y, "output")


def failed_injection() -> None:
    """The base layers have their hooks back after an injection that failed half way."""
    model = spread()
    originals = dict(model.named_modules())
    before = hooks(originals)
    made = plan(model, METHODS["dora"](), "one")

    def fail(*args: Any) -> None:
        raise RuntimeError("no luck")

    made.method.prepare = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no luck"):
        inject(made)
    assert dict(model.named_modules()) == originals
    assert hooks(originals) == before
    assert_close(model(batch()), build()(batch()), "output")


def unknown_placement() -> None:
    """A weight that is spread in a way that no slot can follow is refused by plan."""
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def partial_sum(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(DTensor.from_local(tensor.detach(), mesh, [Partial()]))

    model.head.weight = partial_sum(model.head.weight)
    with pytest.raises(UnsupportedError, match="'head'"):
        plan(model, METHODS["lora"](), "one")


CASES: dict[str, Callable[[], None]] = {
    **{method: partial(equals, method) for method in METHODS},
    **{method: partial(further, method) for method in FURTHER},
    "placements": placements,
    "unequal_seeds": unequal_seeds,
    "by_sample": by_sample,
    "several": several,
    "full_copy": full_copy,
    "low_memory": low_memory,
    "read_file": read_file,
    "failed_injection": failed_injection,
    "unknown_placement": unknown_placement,
}
