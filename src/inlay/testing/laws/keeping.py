"""Laws of what is kept: L3 (merging and back), L4 (checkpoints), L5 (copies), L9 (taking adapters out)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from inlay.core.active import adapter_parameters, set_active
from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.state import find_state
from inlay.testing.subject import (
    Subject,
    Trial,
    assert_bitwise,
    assert_close,
    assert_same_outcome,
    hold,
    loss,
    outcome,
    perturb,
    same_keys,
    state_of,
    tensors_of,
)

__all__ = [
    "COPIES",
    "copy_is_equal_and_independent",
    "eject_gives_back_the_model",
    "merge_then_unmerge_is_the_original",
    "merged_and_switched_off_is_the_base",
    "pickled_is_equal_and_independent",
    "saved_is_all_that_trains",
    "state_dict_into_an_adapter_of_another_name",
]

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def merge_then_unmerge_is_the_original(cell: Trial) -> None:
    """L3: merging changes the weights and no output; unmerging restores every bit."""
    if cell.unmergeable:
        return
    subject = Subject(cell)
    unmerged = subject.model(subject.x).detach()
    before = tensors_of(subject.model)  # after a first forward: a lookup with max_norm writes to the table
    hold(merge(subject.state) == ["one"], "merging reports something else than the adapter")
    merged = tensors_of(subject.model)
    hold(any(not torch.equal(merged[name], before[name]) for name in before), "merging changes no tensor")
    assert_close(subject.model(subject.x), unmerged, cell.dtype, "merged output", ulps=32, size=subject.largest())
    hold(bool(unmerge(subject.state)), "unmerging finds nothing to do")
    assert_bitwise(tensors_of(subject.model), before)
    if not cell.renormalises:
        hold(torch.equal(subject.model(subject.x), unmerged), "the output after unmerging is not the one before")
    hold(not unmerge(subject.state), "unmerging a second time does something")


def merged_and_switched_off_is_the_base(cell: Trial) -> None:
    """L3: a merged model that is switched off gives the base's output, and keeps its merged weights."""
    if cell.unmergeable:
        return
    subject = Subject(cell)
    base = subject.bare_output()
    merge(subject.state)
    merged = tensors_of(subject.model)
    with opened(subject.state, disabled=True):
        assert_close(subject.model(subject.x), base, cell.dtype, "merged and switched off")
    assert_bitwise(tensors_of(subject.model), merged)  # forward never changes state


def state_dict_into_an_adapter_of_another_name(cell: Trial) -> None:
    """L4: a twin that starts with other values, under another name and seed, ends with the same output, bitwise."""
    subject = Subject(cell)
    saved = get_peft_model_state_dict(subject.model, adapter_name="one")
    hold(bool(saved), "nothing is saved")
    hold(not any(".one" in key for key in saved), "the adapter's name is in the keys of its checkpoint")
    twin = cell.model()
    inject(plan(twin, cell.config(), "other"), seed=99)
    loaded = set_peft_model_state_dict(twin, saved, adapter_name="other")
    hold(not loaded.missing_keys, f"loading leaves out {loaded.missing_keys}")
    hold(not loaded.unexpected_keys, f"loading does not know {loaded.unexpected_keys}")
    again = get_peft_model_state_dict(twin, adapter_name="other")
    hold(list(again) == list(saved), "the keys come back in another order")
    assert_bitwise(again, saved)
    hold(torch.equal(twin(subject.x), subject.model(subject.x)), "the loaded adapter gives another output")


def saved_is_all_that_trains(cell: Trial) -> None:
    """L4: every parameter that gets a gradient is in the checkpoint, so nothing that was learned is lost."""
    subject = Subject(cell)
    pointers = {t.data_ptr() for t in get_peft_model_state_dict(subject.model, adapter_name="one").values()}
    trained = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    hold(bool(trained), "nothing trains")
    lost = [name for name, p in trained.items() if p.data_ptr() not in pointers]
    hold(not lost, f"{lost} train and are not saved")


def copy_is_equal_and_independent(cell: Trial, way: str = "deepcopy") -> None:
    """L5: a copy has equal tensors, a state of its own, and shares nothing."""
    subject = Subject(cell)
    subject.add("two")
    subject.activate("one", "two")
    model, state = subject.model, subject.state
    twin = COPIES[way](model)
    own = state_of(twin)
    hold(own is not state, "the copy shares the state")
    hold(own.active == state.active == ("one", "two"), "the copy has other active adapters")
    hold(list(own.records) == list(state.records), "the copy has other adapters")
    shared = {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    hold(not shared, "the copy shares tensors")
    before = tensors_of(model)
    assert_bitwise(tensors_of(twin), before)
    flags = [[(n, p.requires_grad) for n, p in one.named_parameters()] for one in (twin, model)]
    hold(flags[0] == flags[1], "other parameters train in the copy")
    assert_same_outcome(outcome(twin, subject.x), outcome(model, subject.x), cell.dtype, ulps=0)

    # the copy is trained, switched, merged and emptied; the original does not notice
    before = tensors_of(model)
    with torch.no_grad():
        for parameter in adapter_parameters(own, ["one"]):
            parameter.mul_(0.5)
    set_active(own, ["one"])
    hold(state.active == ("one", "two"), "switching the copy switches the original")
    y = model(subject.x).detach()
    if not cell.unmergeable:
        merge(own)
        hold(not any(layer.merged for layer in state.layers()), "merging the copy merges the original")
        unmerge(own)
    eject(twin, own)
    hold(not any(isinstance(module, AdaptedLayer) for module in twin.modules()), "the copy cannot be emptied")
    if not cell.renormalises:
        assert_bitwise(tensors_of(model), before)
        hold(torch.equal(model(subject.x), y), "the original gives another output")
    hold(find_state(model) is state, "the original has lost its state")


def pickled_is_equal_and_independent(cell: Trial) -> None:
    """L5, for a model that is pickled and read again."""
    copy_is_equal_and_independent(cell, "pickle")


def eject_gives_back_the_model(cell: Trial) -> None:
    """L9: inject, train a step, eject: the very same modules, weights, ``requires_grad`` and training flags."""
    model, witness, x = cell.model(), cell.model(), cell.batch()
    model.first.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1)
    modules, objects, keys = dict(model.named_modules()), dict(model.named_parameters()), list(model.state_dict())
    flags = {name: module.training for name, module in modules.items()}
    grads = {name: p.requires_grad for name, p in objects.items()}

    state = inject(plan(model, cell.config(), "one"), seed=7)
    perturb(state, "one")
    inject(plan(model, cell.config(cell.companion), "two"), seed=7)
    set_active(state, ["one", "two"], trainable=True)
    before = tensors_of(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model(x)).backward()
    optimiser.step()
    hold(
        any(not torch.equal(now, before[n]) for n, now in tensors_of(model).items()), "a step of training does nothing"
    )

    hold(eject(model, state) is model, "ejecting gives another object")
    hold(find_state(model) is None, "a state is left after ejecting")
    found: dict[str, nn.Module] = dict(model.named_modules())
    same_keys(found, modules, "modules after ejecting")
    hold(all(found[name] is module for name, module in modules.items()), "other modules stand in the model")
    hold({name: module.training for name, module in found.items()} == flags, "training flags have changed")
    hold(all(p is objects[name] for name, p in model.named_parameters()), "other parameters stand in the model")
    hold({n: p.requires_grad for n, p in model.named_parameters()} == grads, "requires_grad has changed")
    hold(list(model.state_dict()) == keys, "the state dict has other keys")
    y, expected = model(x), witness(x)
    if cell.renormalises:  # a lookup writes to the table, and rounds what it has written once more
        assert_close(y, expected, cell.dtype)
    else:
        assert_bitwise(tensors_of(model), tensors_of(witness))
        hold(torch.equal(y, expected), "the output is not the one of before")
