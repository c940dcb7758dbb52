"""Data parallelism: injection, then ``DistributedDataParallel``."""

from __future__ import annotations

from collections import Counter
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
from sharded_model import METHODS, SEED, TARGETS, adapted, batch, build, loss, perturb
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import inlay
from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.active import set_active
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


def graph_nodes(y: Tensor) -> Counter[str]:
    """Count the nodes of the graph that ``y`` was made by, by name."""
    found: Counter[str] = Counter()
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[node.name()] += 1
            left.extend(following for following, _ in node.next_functions)
    return found


def fused(*ranks: int) -> None:
    """The autograd function of the fused path gives the mean of the processes' gradients, in two steps running.

    Held against the generic path on the whole batch, in one process, in float64.

    Args:
        ranks: of one adapter each; all are active. No dropout, or the processes would draw other masks than one alone.
    """
    whole, model = build().double(), build().double()
    for net in (whole, model):
        for i, r in enumerate(ranks):
            config = LoraConfig(r=r, lora_alpha=6, lora_dropout=0.0, **TARGETS)
            state = inject(plan(net, config, f"adapter{i}"), seed=SEED)
            perturb(state, f"adapter{i}")
        set_active(state, [f"adapter{i}" for i in range(len(ranks))], trainable=True)
    assert {layer.path for layer in inlay.explain(model)} == {"fused"}
    wrapped = DistributedDataParallel(model)
    layers = len(inlay.explain(model))
    for _ in range(2):
        for parameter in (*trained(whole).values(), *trained(model).values()):
            parameter.grad = None
        with inlay.without_fast_paths():
            expected = whole(batch().double())
        loss(expected).backward()
        y = wrapped(my_share(batch().double()))
        nodes = graph_nodes(y)
        assert nodes["_LowRankLinearBackward"] == layers, nodes
        assert_close(y, my_share(expected), "output", 1e-12)
        loss(y).backward()
        gradients = {name: p.grad for name, p in trained(whole).items()}
        assert len(gradients) == 2 * layers * len(ranks)
        assert_gradients(wrapped, gradients, 1e-12)


CASES: dict[str, Callable[[], None]] = {
    **{method: partial(equals, method) for method in METHODS},
    "full_copy": full_copy,
    "fused": partial(fused, 4),
    "fused_two": partial(fused, 4, 3),
}
