"""Every method on slices of fused projections, beside the same method on layers that have just those rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cells import ALL_CELLS, METHODS, family, method_of
from safetensors.torch import load_file
from sliced_models import SLICES, adapters, configs, disturb, models

import inlay
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.lifecycle import penalty_of, step_of
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.errors import UnsupportedError

# methods that have no meaning on a slice, and why
REFUSED = {"trainable_tokens": "so a slice has no numbers of them"}
WORKING = [method for method in METHODS if method not in REFUSED]
FIRSTS = {family(method): method for method in reversed(WORKING)}.values()  # one of each family
# both ways of storing a weight where all cells run, and one of them for each method otherwise
CELLS = [(m, t) for i, m in enumerate(WORKING) for t in (False, True) if ALL_CELLS or t == bool(i % 3 == 0)]


@pytest.mark.parametrize(("method", "transposed"), CELLS, ids=lambda value: str(value).lower())
def test_a_slice_is_a_layer_of_its_own(method: str, transposed: bool) -> None:
    """Tensors, forward, gradients, terms of the loss, steps, merged weights; unmerging is exact."""
    x = torch.randn(4, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    outputs, states = [], []
    both = models(transposed)
    starts = {name: p.clone() for name, p in both[0].named_parameters()}
    rows = {name: p.clone() for name, p in both[1].named_parameters()}
    base = both[0](x).detach()
    for model, config in zip(both, configs(method), strict=True):
        states.append(inject(plan(model, config), seed=1))
    mine, theirs = both
    assert {n: p.shape for n, p in adapters(mine)} == {n: p.shape for n, p in adapters(theirs)}
    for name, tensor in theirs.state_dict().items():
        if "default" in name or ".default" in name:
            torch.testing.assert_close(mine.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    for model, state in zip(both, states, strict=True):
        disturb(model)
        torch.manual_seed(7)  # of noise
        y = model(x)
        loss, further = y.square().sum(), penalty_of(state)
        (loss if further is None else loss + further).backward()
        outputs.append(y.detach())
    torch.testing.assert_close(outputs[0], outputs[1])
    changed = (outputs[0] != base).flatten(0, -2).any(0)
    wanted = torch.zeros(40, dtype=torch.bool)
    wanted[[*SLICES["first"], *(20 + row for row in SLICES["last"])]] = True
    assert changed.any()
    assert not (changed & ~wanted).any()
    found = {name: p.grad for name, p in adapters(mine) if p.grad is not None}
    expected = {name: p.grad for name, p in adapters(theirs) if p.grad is not None}
    torch.testing.assert_close(found, expected)
    for state in states:
        step_of(state, 5)  # which some methods have
    torch.testing.assert_close(dict(adapters(mine)), dict(adapters(theirs)))
    for model in both:
        model.eval()
    y = theirs(x)
    torch.testing.assert_close(mine(x), y)
    if not method_of(method).mergeable:
        return
    before = {n: p.clone() for n, p in mine.named_parameters()}
    merge(states[0])
    torch.testing.assert_close(mine(x), y)
    unmerge(states[0])
    assert all(torch.equal(p, before[n]) for n, p in mine.named_parameters())
    for model, state in zip(both, states, strict=True):
        eject(model, state)
    assert all(torch.equal(p, starts[n]) for n, p in mine.named_parameters())
    assert all(torch.equal(p, rows[n]) for n, p in theirs.named_parameters())


@pytest.mark.parametrize("method", WORKING if ALL_CELLS else FIRSTS)
def test_its_files_are_those_of_a_layer_of_its_own(method: str, tmp_path: Path) -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    files, outputs = [], []
    for i, (model, config) in enumerate(zip(models(False), configs(method), strict=True)):
        peft_model = inlay.get_peft_model(model.float(), config)
        disturb(peft_model)
        outputs.append(peft_model.eval()(x))
        peft_model.save_pretrained(tmp_path / str(i))
        tensors = load_file(tmp_path / str(i) / "adapter_model.safetensors")
        files.append({key: tensor for key, tensor in tensors.items() if "base_layer" not in key})  # base biases
    torch.testing.assert_close(files[0], files[1], rtol=1e-4, atol=1e-5)
    again = inlay.PeftModel.from_pretrained(models(False)[0].float(), tmp_path / "0").eval()
    torch.testing.assert_close(again(x), outputs[0])


@pytest.mark.parametrize("method", REFUSED)
def test_what_has_no_meaning_on_a_slice_is_refused(method: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[method]):
        plan(models(False)[0], configs(method)[0])
