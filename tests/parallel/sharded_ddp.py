"""Data parallelism: injection, then ``DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sharded_checks import (
    Reference,
    assert_bitwise,
    assert_close,
    assert_gradients,
    assert_trains,
    checkpoint,
    my_share,
    trained,
)
from sharded_model import METHODS, SEED, adapted, batch, build, loss, perturb
from torch.nn.parallel import DistributedDataParallel

from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.methods.lora import LoraConfig


def equals(method: str) -> None:
    """Loading through the wrapper, forward, mean gradients, saving, merging, training."""
    reference = Reference(method)
    model = build()
    state = adapted(model, method)
    wrapped = DistributedDataParallel(model)
    set_peft_model_state_dict(wrapped, reference.saved, adapter_name="one")
    x = my_share(reference.x.detach())
    y = wrapped(x)
    assert_close(y, my_share(reference.y), "output")
    loss(y).backward()
    assert_gradients(wrapped, reference.gradients)
    assert_bitwise(checkpoint(wrapped), reference.saved)
    merge(state)
    with torch.no_grad():
        assert_close(wrapped(x), my_share(reference.y), "merged output")
    unmerge(state)
    assert_trains(wrapped, x, reference)


def full_copy() -> None:
    """The frozen original beside a full copy is no unused parameter, in two steps running."""
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head", "down"])
    whole, model = build(), build()
    for net in (whole, model):
        perturb(inject(plan(net, config, "one"), seed=SEED))
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        for parameter in (*trained(whole).values(), *trained(model).values()):
            parameter.grad = None
        y, expected = wrapped(my_share(batch())), whole(batch())
        assert_close(y, my_share(expected), "output")
        loss(y).backward()
        loss(expected).backward()
    assert_gradients(wrapped, {name: p.grad for name, p in trained(whole).items()})
    assert_bitwise(checkpoint(wrapped), checkpoint(whole))


CASES: dict[str, Callable[[], None]] = {
    **{method: partial(equals, method) for method in METHODS},
    "full_copy": full_copy,
}
