"""L9: inject, train, eject: the very same modules, weights, ``requires_grad`` and training flags."""

from __future__ import annotations

import torch
from cells import Cell
from subject import assert_bitwise, loss, perturb, tensors_of

from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import find_state


def test_eject_gives_back_the_model(cell: Cell) -> None:
    model, witness = cell.model(), cell.model()
    x = cell.batch()
    model.first.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1)
    modules = dict(model.named_modules())
    flags = {name: module.training for name, module in modules.items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    keys = list(model.state_dict())

    state = inject(plan(model, cell.config(), "one"), seed=7)
    perturb(state, "one")
    inject(plan(model, cell.config(cell.companion), "two"), seed=7)
    set_active(state, ["one", "two"], trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = tensors_of(model)
    optimiser = torch.optim.SGD(trained, lr=0.1)
    loss(model(x)).backward()
    optimiser.step()
    assert any(not torch.equal(now, before[name]) for name, now in tensors_of(model).items())
    if "max_norm" in cell.kind and cell.method != "ln_tuning":
        witness(x)  # a lookup writes to the table, adapters or not, unless the base is not read at all

    assert eject(model, state) is model
    assert find_state(model) is None
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is module for name, module in modules.items())
    assert {name: module.training for name, module in found.items()} == flags
    assert all(p is objects[name] for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert list(model.state_dict()) == keys
    assert_bitwise(tensors_of(model), tensors_of(witness))
    assert torch.equal(model(x), witness(x))


def test_an_ejected_model_takes_adapters_again(cell: Cell) -> None:
    model, x = cell.model(), cell.batch()
    outputs = []
    for _ in range(2):
        state = inject(plan(model, cell.config(), "one"), seed=7)
        perturb(state, "one")
        outputs.append(model(x).detach())
        eject(model, state)
    assert torch.equal(*outputs) or "max_norm" in cell.kind
