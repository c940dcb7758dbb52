"""FSDP2: injection, then ``fully_shard`` on every block and the root."""

from __future__ import annotations

import copy
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
    my_share,
    trained,
)
from sharded_further import ALL_CELLS, FEW, FURTHER, equal_runs
from sharded_model import METHODS, SEED, Net, adapted, batch, build, loss, perturb
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.errors import StateError, UnsupportedError
from inlay.methods.lora import LoraConfig


def sharded(model: Net, **options: Any) -> Net:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def equals(method: str) -> None:
    """Initial values, loading, forward, reduced gradients, saving, merging, ejecting, training."""
    reference = Reference(method)
    model = build()
    state = adapted(model, method)
    sharded(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_bitwise(checkpoint(model), reference.fresh)
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    x = reference.x.detach()
    y = model(my_share(x))
    assert_close(y, my_share(reference.y), "output")
    loss(y).backward()
    assert_gradients(model, reference.gradients)
    assert_bitwise(checkpoint(model), reference.saved)
    with torch.no_grad():
        model(x)  # leaves the root's weights gathered, where a merge would be lost
    assert_files(model, reference)
    assert_merges(model, state, reference)
    assert_trains(model, my_share(x), reference)
    with torch.no_grad():
        model(x)
    eject(model, state)
    with torch.no_grad():
        assert_close(model(x), reference.base(x), "output after ejecting")


def further(method: str) -> None:
    reference = Reference(FURTHER[method](), dist.get_world_size())
    model = build()
    state = adapted(model, FURTHER[method]())
    if method == "lily":  # layers of several blocks share tensors, and fully_shard wants them in one unit
        fully_shard(model)
    else:
        sharded(model)
    model.train(reference.model.training)
    equal_runs(model, state, reference, my_share(reference.x.detach()), my_share(reference.y))


def after_sharding() -> None:
    """An adapter that would come too late is refused by plan, and nothing has changed."""
    model = sharded(build())
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedError, match="inject every adapter first"):
        plan(model, METHODS["lora"](), "one")
    copies = LoraConfig(target_modules=["head"], modules_to_save=["up"])
    with pytest.raises(UnsupportedError, match="inject every adapter first"):
        plan(model, copies, "one")
    assert [name for name, _ in model.named_modules()] == names
    assert_close(model(batch()), build()(batch()), "output")


def mixed_precision() -> None:
    """Frozen bfloat16 weights and float32 adapters in one unit of FSDP2."""
    whole, model = build().bfloat16(), build().bfloat16()
    adapted(whole, "lora")
    perturb(adapted(model, "lora"))
    set_peft_model_state_dict(whole, checkpoint(model), adapter_name="one")
    sharded(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    x = batch().bfloat16()
    y, expected = model(my_share(x)), whole(x)
    assert_close(y.float(), my_share(expected.detach()).float(), "output")
    loss(y.float()).backward()
    loss(expected.float()).backward()
    # bfloat16 activations: each half of the batch rounds its own sums
    assert_gradients(model, {name: p.grad for name, p in trained(whole).items()}, tolerance=2e-2, size=0.0)


def kept_weights() -> None:
    """What was kept when merging is gathered where a forward needs the untouched weight."""
    whole, model = build(), build()
    states = []
    for net in (whole, model):
        state = adapted(net, "lora", "one")
        adapted(net, "dora", "two")
        perturb(state, "one")
        perturb(state, "two")
        states.append(state)
    sharded(model)
    x = batch()
    for state in states:
        merge(state, ["one"])
    with opened(states[1], disabled=True):
        assert_close(model(x), build()(x), "output without adapters, one of them merged")
    for state in states:
        set_active(state, ["one", "two"])
    y, expected = model(my_share(x)), whole(x)
    assert_close(y, my_share(expected), "output of DoRA over what is merged")
    loss(y).backward()
    loss(expected).backward()
    found = {name: p for name, p in trained(whole).items() if p.grad is not None}
    assert found
    for name, parameter in trained(model).items():
        if name in found:
            assert_close(parameter.grad, found[name].grad, f"gradient of {name}")
    for state in states:
        unmerge(state)
    assert_close(model(x), whole(x), "output after unmerging")


def full_copy() -> None:
    """A full copy of a module beside its frozen original."""
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    whole, model = build(), build()
    for net in (whole, model):
        inject(plan(net, config, "one"), seed=SEED)
        with torch.no_grad():
            net.head.modules_to_save["one"].weight.mul_(1.5)
    sharded(model)
    x = batch()
    y, expected = model(my_share(x)), whole(x)
    assert_close(y, my_share(expected), "output")
    loss(y).backward()
    loss(expected).backward()
    assert_gradients(model, {name: p.grad for name, p in trained(whole).items()})
    assert_bitwise(checkpoint(model), checkpoint(whole))


def every_layer() -> None:
    """``fully_shard`` on the adapted layers themselves: they work, save and merge, and cannot be taken out."""
    reference = Reference("lora")
    model = build()
    state = adapted(model, "lora")
    for module in list(model.modules()):
        if isinstance(module, AdaptedLayer):
            fully_shard(module)
    fully_shard(model)
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    x = reference.x.detach()
    y = model(my_share(x))
    loss(y).backward()
    assert_gradients(model, reference.gradients)
    assert_merges(model, state, reference)
    with pytest.raises(StateError, match="fully_shard was applied to the adapted layer"):
        eject(model, state)
    assert_close(model(x), reference.y, "output after the refusal")


def trained_bias() -> None:
    """Base biases that trained get their first values back, bitwise."""
    model = build()
    before = copy.deepcopy(model)
    state = adapted(model, "lora_bias")
    sharded(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    loss(model(my_share(batch()))).backward()
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if name.endswith("base_layer.bias")]
    assert changed
    eject(model, state)
    for name, parameter in before.named_parameters():
        found = dict(model.named_parameters())[name]
        assert torch.equal(found.full_tensor(), parameter), name


CASES: dict[str, Callable[[], None]] = {
    **{method: partial(equals, method) for method in METHODS},
    **{method: partial(further, method) for method in (FURTHER if ALL_CELLS else FEW)},
    "after_sharding": after_sharding,
    "mixed_precision": mixed_precision,
    "kept_weights": kept_weights,
    "full_copy": full_copy,
    "every_layer": every_layer,
    "trained_bias": trained_bias,
}
