"""Tensor parallelism and FSDP2 together, on a grid of two by two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sharded_checks import (
    Reference,
    assert_bitwise,
    assert_close,
    assert_gradients,
    assert_merges,
    assert_trains,
    checkpoint,
)
from sharded_fsdp import sharded
from sharded_model import METHODS, adapted, build, loss
from sharded_tp import spread
from torch.distributed.device_mesh import init_device_mesh

from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.eject import eject


def equals(method: str) -> None:
    """Initial values, loading, forward, gradients, saving, merging, ejecting, training."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    reference = Reference(method)
    model = spread(build(), grid["tensor"])
    state = adapted(model, method)
    sharded(model, mesh=grid["data"])
    assert_bitwise(checkpoint(model), reference.fresh)
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    x = reference.x.detach()
    share = grid["data"].get_local_rank()
    y = model(x.chunk(2)[share])
    assert_close(y, reference.y.chunk(2)[share], "output")
    loss(y).backward()
    assert_gradients(model, reference.gradients)
    assert_bitwise(checkpoint(model), reference.saved)
    assert_merges(model, state, reference)
    assert_trains(model, x.chunk(2)[share], reference)
    eject(model, state)
    with torch.no_grad():
        assert_close(model(x), reference.base(x), "output after ejecting")


CASES: dict[str, Callable[[], None]] = {method: partial(equals, method) for method in METHODS}
