"""Which layers have a tensor in common under Lily, as in PEFT; OSF's silence; AdaMSS in training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from twins import close, ours_of

import inlay


class Block(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.q = nn.Linear(8, out)
        self.v = nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x)) * self.v(x)


class Stack(nn.Module):
    """Five blocks; the last one has other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([*[Block(8) for _ in range(4)], Block(6)])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean(), y=x)


def base() -> Stack:
    torch.manual_seed(0)
    return Stack()


X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


def equalised(config: Any, size: float = 0.2) -> tuple[Any, Any]:
    ours = inlay.get_peft_model(base(), ours_of(config))
    theirs = peft.get_peft_model(base(), config)
    own = dict(ours.named_parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
                own[name].copy_(parameter)
    return theirs, ours


def lily() -> Any:
    return peft.LilyConfig(r=3, stride_A=2, num_B=2, target_modules=["q", "v"])


def test_layers_share_what_peft_lets_them_share(tmp_path) -> None:
    theirs, ours = equalised(lily())
    names = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == names
    assert sum("lily_A" in name for name in names) == 6  # pairs of four blocks, and the fifth, for q and v
    assert sum("lily_B" in name for name in names) == 4
    for model in (theirs, ours):
        model.zero_grad()
        model(X).loss.backward()
    close(ours(X).y, theirs(X).y)
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            close(mine[name].grad, parameter.grad)
    expected, found = peft.get_peft_model_state_dict(theirs), inlay.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    close(peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))(X).y, ours(X).y)
    for low in (False, True):
        close(inlay.PeftModel.from_pretrained(base(), tmp_path / "theirs", low_cpu_mem_usage=low)(X).y, ours(X).y)


def test_a_copy_shares_within_itself_and_counting_counts_once() -> None:
    _, ours = equalised(lily())
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.base_model.model.blocks[1].q.lily_A["default"].weight.zero_()
    assert not twin.base_model.model.blocks[0].q.lily_A["default"].weight.any()
    assert ours.base_model.model.blocks[0].q.lily_A["default"].weight.any()
    made = inlay.plan(base(), ours_of(lily()))
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert made.trainable == sum(p.numel() for p in trained)
    ours.add_adapter("other", ours_of(lily()))
    ours.delete_adapter("default")
    ours.set_adapter("other")
    assert torch.isfinite(ours(X).y).all()
    assert sum("lily_A" in name for name, _ in ours.named_parameters()) == 6


def test_policy_peft_draws_lilys_start_from_the_same_stream() -> None:
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base(), lily())
    from inlay.core.inject import inject
    from inlay.core.plan import plan
    from inlay.core.policy import PEFT

    model = base()
    torch.manual_seed(3)
    base()  # PEFT's model was made from the stream as well
    inject(plan(model, ours_of(lily()), policy=PEFT))
    mine = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "lily_" in name:
            assert torch.equal(mine[name.removeprefix("base_model.model.")], parameter), name


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)
        self.table = nn.Embedding(6, 4)
        self.lin = nn.Linear(4, 4)


def test_osf_adapts_each_layer_that_it_is_asked_for_or_says_why_not() -> None:
    """PEFT leaves a convolution and an embedding as they are, without a word; docs/differences.md."""
    targets = ["conv", "table", "lin"]
    theirs = peft.get_peft_model(Mixed(), peft.OSFConfig(target_modules=targets))
    assert {name.split(".")[2] for name, p in theirs.named_parameters() if p.requires_grad} == {"lin"}
    ours = inlay.get_peft_model(Mixed(), inlay.OSFConfig(target_modules=targets))
    assert {name.split(".")[2] for name, p in ours.named_parameters() if p.requires_grad} == set(targets)
    with pytest.raises(inlay.InlayError, match="leaves none of its 4 singular directions"):
        inlay.get_peft_model(Mixed(), inlay.OSFConfig(target_modules=["lin"], effective_rank=4))


def test_osf_unmerges_exactly_and_peft_does_not_at_all() -> None:
    config = peft.OSFConfig(target_modules=["q"])
    theirs, ours = equalised(config)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    ours.merge_adapter()
    assert not torch.equal(
        dict(ours.named_parameters())["base_model.model.blocks.0.q.base_layer.weight"],
        before["base_model.model.blocks.0.q.base_layer.weight"],
    )
    ours.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    theirs.merge_adapter()
    with pytest.raises(NotImplementedError):
        theirs.unmerge_adapter()


def test_osf_adds_up_several_adapters_where_peft_runs_the_first() -> None:
    theirs, ours = equalised(peft.OSFConfig(target_modules=["q"]))
    for model, config in ((theirs, peft.OSFConfig), (ours, inlay.OSFConfig)):
        model.add_adapter("other", config(target_modules=["q"], effective_rank=2))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".other." in name:
                    p.mul_(0.5)
    alone = ours(X).y
    theirs.base_model.set_adapter(["default", "other"])
    ours.set_adapter(["default", "other"])
    close(theirs(X).y, alone)
    assert not torch.allclose(ours(X).y, alone, atol=1e-3)


def asa(**fields: Any) -> Any:
    given = {"use_asa": True, "asa_target_subspaces": 4, "init_warmup": 1, "final_warmup": 9, "mask_interval": 2}
    return peft.AdamssConfig(r=4, num_subspaces=2, target_modules=["q", "v"], **{**given, **fields})


def train(model: Any, steps: range) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in steps:
        optimiser.zero_grad()
        model(X + 0.1 * step).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)


def training(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_adamss_switches_off_the_groups_that_peft_switches_off_but_for_one() -> None:
    """PEFT keeps one group fewer than its schedule says; docs/differences.md."""
    theirs, ours = equalised(asa())
    assert training(ours) == training(theirs)
    for step in range(3):  # the first choice is made at step 2
        train(theirs, range(step, step + 1))
        train(ours, range(step, step + 1))
    more = training(ours) - training(theirs)
    assert training(theirs) < training(ours)
    assert len(more) == 2  # A and B of one group
    wanted = int(4 + (20 - 4) * (1 - 1 / 8) ** 3)
    assert len(training(ours)) == 2 * wanted
    train(ours, range(3, 12))
    assert len(training(ours)) == 2 * 4
    with torch.no_grad():
        assert torch.isfinite(ours(X).y).all()
