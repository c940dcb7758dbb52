"""After ``prepare_for_compile`` nothing is compiled again, and a prepared model does what one without slots does."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import inlay
from inlay.checkpoint.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from inlay.errors import CheckpointMismatchError, ConfigError, TargetError, UnsupportedError

LAYERS = ["emb", "conv", "last"]


class Net(nn.Module):
    """Token ids (batch, length) to features (batch, length, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.grouped(torch.relu(self.conv(self.emb(ids).mT))).mT
        return self.last(torch.tanh(self.first(h)))


def ids(seed: int = 1) -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(seed))


def lora(r: int = 4, **fields: Any) -> Any:
    return inlay.LoraConfig(**{"r": r, "lora_alpha": 3, "target_modules": LAYERS} | fields)


def filled(model: Any, seed: int = 3) -> Any:
    """Give every adapter values that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def adapted(**fields: Any) -> Any:
    """Three adapters of different rank, scale and layers."""
    torch.manual_seed(0)
    model = inlay.get_peft_model(Net(), lora(4, **fields), "a")
    model.add_adapter("b", lora(6, lora_alpha=9, **fields))
    model.add_adapter("c", lora(1, **{"target_modules": ["conv", "last"]} | fields))
    return filled(model)


class Pair:
    """A model that is prepared, and one that is not, which undergo the same."""

    def __init__(self, make: Callable[[], Any] = adapted, slots: int = 2) -> None:
        self.model, self.plain = make(), make()
        inlay.prepare_for_compile(self.model, slots=slots, max_rank=8)
        self.fast: Callable[[Tensor], Tensor] = self.as_traced

    def as_traced(self, x: Tensor) -> Tensor:
        """Run what a trace runs, eagerly."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return self.model(x)

    def both(self, act: Callable[[Any], object]) -> None:
        act(self.model)
        act(self.plain)

    def check(self) -> Tensor:
        """Outputs and every gradient are the same."""
        found = []
        for model, call in ((self.model, self.fast), (self.plain, self.plain)):
            model.zero_grad()
            y = call(ids())
            y.square().mean().backward()
            call(ids(2)).square().mean().backward()  # accumulates
            found.append((y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        (y, grads), (expected, right) = found
        torch.testing.assert_close(y, expected)
        assert grads.keys() == right.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, right[name], msg=lambda text, name=name: f"{name}: {text}")
        return expected


@pytest.fixture(scope="module")
def compiled() -> Iterator[Pair]:
    """Compiled once, for all tests that ask for it; they fail where anything is compiled after that."""
    torch._dynamo.reset()
    pair = Pair()
    pair.counter = counter = CompileCounterWithBackend("aot_eager")
    pair.fast = torch.compile(pair.model, backend=counter, fullgraph=True)
    pair.check()
    yield pair
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.fixture
def pair(compiled: Pair) -> Iterator[Pair]:
    """The compiled pair, with the adapters that it began with."""
    values = adapted().state_dict()
    compiled.both(lambda model: model.load_state_dict(values))
    compiled.both(lambda model: model.set_adapter("a"))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.check()
        yield compiled
    for model in (compiled.model, compiled.plain):
        model.set_adapter("a")
        for name in [name for name in model.peft_config if name not in "abc"]:
            model.delete_adapter(name)
        model.base_model.model.last.unscale_layer()


def test_switching_compiles_nothing(pair: Pair) -> None:
    outputs = [pair.check()]
    for name in ("b", "c", "a", "c", "b"):
        pair.both(lambda model, name=name: model.set_adapter(name))
        outputs.append(pair.check())
    assert torch.equal(outputs[1], outputs[5])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-2)


def test_any_number_up_to_the_slots_may_be_active(pair: Pair) -> None:
    for names in (["a", "b"], ["c", "a"], [], ["b"]):
        pair.both(lambda model, names=names: setattr(model, "active_adapters", names))
        pair.both(lambda model, names=names: model.set_requires_grad(names, True) if names else None)
        if names:
            pair.check()
        else:
            torch.testing.assert_close(pair.fast(ids()), pair.plain(ids()))


def test_changes_of_scale_compile_nothing(pair: Pair) -> None:
    outputs = [pair.check()]
    for change in (
        lambda model: model.base_model.model.last.set_scale("a", 3.0),
        lambda model: model.base_model.model.conv.scale_layer(2.5),
        lambda model: model.base_model.model.emb.scaling.__setitem__("a", 1.25),
        lambda model: model.base_model.model.conv.unscale_layer(),
        lambda model: model.base_model.model.last.set_scale("b", 0.5),
    ):
        pair.both(change)
        outputs.append(pair.check())
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(outputs[:5]))
    assert torch.equal(outputs[4], outputs[5])
    pair.both(lambda model: model.set_adapter("b"))
    pair.check()
    assert pair.model.base_model.model.last.scaling["b"] == pair.plain.base_model.model.last.scaling["b"] == 0.75
    pair.both(lambda model: model.base_model.model.last.unscale_layer())


def test_hot_swaps_of_any_rank_compile_nothing(pair: Pair, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"r": 8}, {"r": 2, "lora_alpha": 5}, {"r": 3, "target_modules": ["conv", "last"]}]
    for i, fields in enumerate(settings):
        filled(inlay.get_peft_model(Net(), lora(**fields)), seed=i).save_pretrained(tmp_path / str(i))
    filled(inlay.get_peft_model(Net(), lora(9))).save_pretrained(tmp_path / "wide")
    pair.both(lambda model: model.add_adapter("d", lora(4)))
    pair.both(lambda model: model.set_adapter("d"))
    for i in (0, 1, 2, 0):
        pair.both(lambda model, i=i: hotswap_adapter(model, tmp_path / str(i), "d"))
        pair.check()
    with pytest.raises(CheckpointMismatchError, match=r"rank 9, and the model was prepared for 8"):
        hotswap_adapter(pair.model, tmp_path / "wide", "d")
    pair.check()
    pair.both(lambda model: model.set_adapter("a"))
    pair.both(lambda model: hotswap_adapter(model, tmp_path / "1", "d"))  # which is not active
    pair.check()
    pair.both(lambda model: model.set_adapter("d"))
    pair.check()


def test_adapters_that_come_and_go_compile_nothing(pair: Pair, tmp_path: Path) -> None:
    filled(inlay.get_peft_model(Net(), lora(5))).save_pretrained(tmp_path)
    for act in (
        lambda model: model.load_adapter(tmp_path, "d", is_trainable=True),
        lambda model: model.set_adapter("d"),
        lambda model: model.load_adapter(tmp_path, "e", is_trainable=True),
        lambda model: model.set_adapter("b"),
        lambda model: model.delete_adapter("d"),
        lambda model: model.set_adapter("e"),
    ):
        pair.both(act)
        pair.both(lambda model: model.train())  # which loading ends
        pair.check()


def test_registered_adapters_take_turns(pair: Pair, tmp_path: Path) -> None:
    for i in range(3):
        filled(inlay.get_peft_model(Net(), lora(i + 2)), seed=i).save_pretrained(tmp_path / str(i))
    stores = [inlay.AdapterStore(model, lora(6), max_resident=2) for model in (pair.model, pair.plain)]
    for store in stores:
        for i in range(3):
            store.register(f"customer {i}", tmp_path / str(i))
    for name in ("customer 0", "customer 1", "customer 2", "customer 0", "b"):
        pair.both(lambda model, name=name: model.set_adapter(name))
        torch.testing.assert_close(pair.fast(ids()), pair.plain(ids()))
    for store in stores:
        store.close()


def test_an_optimiser_trains_the_adapters_themselves(pair: Pair) -> None:
    """Momentum goes with the parameters: two adapters that train by turns end where they do without slots."""
    start = {name: value.clone() for name, value in pair.plain.named_parameters()}
    parameters = [[p for name, p in m.named_parameters() if "lora_" in name] for m in (pair.model, pair.plain)]
    optimisers = [torch.optim.AdamW(own, lr=0.05) for own in parameters]
    pair.both(lambda model: model.zero_grad())
    for name in ("a", "b", "a", "c", "b"):
        pair.both(lambda model, name=name: model.set_adapter(name))
        for _ in range(2):
            for optimiser, call in zip(optimisers, (pair.fast, pair.plain), strict=True):
                call(ids()).square().mean().backward()
                optimiser.step()
                optimiser.zero_grad()
    for (name, found), (_, expected) in zip(pair.model.named_parameters(), pair.plain.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if "lora_" in name:
            assert not torch.equal(found, start[name])


def test_parameters_that_were_replaced_are_taken_in(pair: Pair) -> None:
    before = pair.check()
    values = filled(adapted(), seed=9).state_dict()
    adapters = {name: value for name, value in values.items() if "lora_" in name}
    pair.both(lambda model: model.load_state_dict(copy.deepcopy(adapters), assign=True, strict=False))
    pair.both(lambda model: model.set_adapter("a"))
    assert not torch.allclose(pair.check(), before)
    pair.both(lambda model: model.set_adapter("b"))
    pair.check()
    pair.both(lambda model: model.to("cpu", torch.float32))
    pair.check()


def test_refused_adapters_leave_the_model_as_it_is(pair: Pair) -> None:
    pair.both(lambda model: model.add_adapter("wide", lora(9)))
    pair.both(lambda model: model.add_adapter("ia3", inlay.IA3Config(target_modules=["last"], feedforward_modules=[])))
    for names, words in ((["wide"], "rank 9"), (["ia3"], "IA3 is something else"), (["a", "b", "c"], "3 adapters")):
        with pytest.raises(UnsupportedError, match=words):
            pair.model.active_adapters = names
        assert pair.model.active_adapters == ["a"]
        pair.check()


# -- what needs no compiling to be seen --------------------------------------------------------------------------------


def test_files_are_those_of_the_adapters(tmp_path: Path) -> None:
    pair = Pair(slots=2)
    pair.both(lambda model: setattr(model, "active_adapters", ["c", "a"]))
    pair.model.save_pretrained(tmp_path / "prepared")
    pair.plain.save_pretrained(tmp_path / "plain")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "prepared" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    found, expected = pair.model.state_dict(), pair.plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("merged", [False, True])
def test_taking_the_adapters_out(merged: bool) -> None:
    pair = Pair()
    pair.check()
    left, right = ((m.merge_and_unload() if merged else m.unload()).state_dict() for m in (pair.model, pair.plain))
    assert list(left) == list(right) == list(Net().state_dict())
    for name, value in right.items():
        torch.testing.assert_close(left[name], value)


def test_merged_adapters_leave_their_slots() -> None:
    pair = Pair()
    right = pair.plain(ids())
    pair.both(lambda model: model.merge_adapter())
    torch.testing.assert_close(pair.fast(ids()), right)
    pair.both(lambda model: model.unmerge_adapter())
    torch.testing.assert_close(pair.fast(ids()), right)


def test_disabling_and_sets_of_single_layers() -> None:
    pair = Pair()
    right = pair.plain(ids())
    with pair.model.disable_adapter(), pair.plain.disable_adapter():
        torch.testing.assert_close(pair.fast(ids()), pair.plain(ids()))
        assert not torch.allclose(pair.fast(ids()), right)
    pair.both(lambda model: model.base_model.model.last.set_adapter("b"))
    torch.testing.assert_close(pair.fast(ids()), pair.plain(ids()))
    assert not torch.allclose(pair.fast(ids()), right)


def test_other_dtypes() -> None:
    pair = Pair()
    pair.both(lambda model: model.double())
    assert pair.check().dtype == torch.float64
    pair.both(lambda model: model.set_adapter("b"))
    pair.check()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_for_themselves(again: Callable[[Any], Any]) -> None:
    pair = Pair()
    twin, right = again(pair.model), pair.plain(ids()).detach()
    filled(pair.model, seed=8)
    torch.testing.assert_close(twin(ids()), right)
    assert not torch.allclose(pair.fast(ids()), right)
    twin.set_adapter("b")
    assert pair.model.active_adapters == ["a"]
    inlay.prepare_for_compile(twin, max_rank=8)
    pair.model = twin
    pair.plain.set_adapter("b")
    pair.check()


def test_dropout_follows_the_mode() -> None:
    pair = Pair(lambda: adapted(lora_dropout=0.9).eval())
    right = pair.check()
    pair.model.train()
    assert not torch.allclose(pair.fast(ids()), right)
    pair.both(lambda model: model.eval().set_adapter("b"))
    pair.check()


def test_preparing_again_with_other_numbers() -> None:
    pair = Pair(slots=1)
    pair.check()
    inlay.prepare_for_compile(pair.model, slots=2, max_rank=6)
    pair.check()
    pair.both(lambda model: setattr(model, "active_adapters", ["b", "a"]))
    pair.both(lambda model: model.set_requires_grad(["a", "b"], True))
    pair.check()


def test_a_model_that_was_prepared_for_hot_swaps(tmp_path: Path) -> None:
    filled(inlay.get_peft_model(Net(), lora(3))).save_pretrained(tmp_path)

    def make() -> Any:
        model = adapted()
        prepare_model_for_compiled_hotswap(model, target_rank=7)
        return model

    pair = Pair(make)
    pair.check()
    pair.both(lambda model: hotswap_adapter(model, tmp_path, "a"))
    pair.check()
    pair.both(lambda model: model.base_model.model.last.set_scale("a", 0.5))
    pair.check()


def refusals() -> Iterator[Any]:
    def model(**fields: Any) -> Any:
        return inlay.get_peft_model(Net(), lora(**fields), "a")

    def beside(config: Any) -> Any:
        made = model()
        made.add_adapter("b", config)
        return made

    def two_active() -> Any:
        made = adapted()
        made.active_adapters = ["a", "b"]
        return made

    yield "rank", adapted, {"max_rank": 5}, r"adapter 'b' at 'emb'.* has rank 6, and the slots have room for 5"
    yield "slots", two_active, {"max_rank": 8}, r"2 adapters are to be active .*prepared for 1"
    yield "dora", lambda: model(use_dora=True, target_modules=["last"]), {"max_rank": 8}, "DoRA is something else"
    ia3 = inlay.IA3Config(target_modules=["last"], feedforward_modules=[])
    yield "other method", lambda: beside(ia3), {"max_rank": 8}, "adapter 'b'.*IA3 is something else"
    loha = inlay.LoHaConfig(target_modules=["last"], r=4)
    yield "hadamard", lambda: beside(loha), {"max_rank": 8}, "adapter 'b'.*LoHa is something else"
    yield "groups", lambda: model(target_modules=["grouped"]), {"max_rank": 8}, "grouped convolutions have no slots"
    yield "copies", lambda: model(modules_to_save=["last"], target_modules=["first"]), {"max_rank": 8}, "'last'.*more"
    yield "dropout", lambda: beside(lora(lora_dropout=0.5)), {"max_rank": 8}, "a dropout of 0.0, and this .* 0.5"
    yield "bias", lambda: beside(lora(lora_bias=True, target_modules=["last"])), {"max_rank": 8}, "and this .* bias"


@pytest.mark.parametrize(("make", "numbers", "words"), [pytest.param(*r[1:], id=r[0]) for r in refusals()])
def test_what_has_no_place_is_refused(make: Callable[[], Any], numbers: dict[str, int], words: str) -> None:
    model = make()
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=f"(?s){words}"):
        inlay.prepare_for_compile(model, **numbers)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].data_ptr() == at for name, (value, at) in before.items())


def test_wrong_numbers_and_models() -> None:
    with pytest.raises(ConfigError, match="max_rank"):
        inlay.prepare_for_compile(adapted(), max_rank=0)
    with pytest.raises(ConfigError, match="slots"):
        inlay.prepare_for_compile(adapted(), slots=True, max_rank=4)
    with pytest.raises(TargetError, match="no adapter"):
        inlay.prepare_for_compile(Net(), max_rank=4)


def test_without_preparing_each_active_set_is_compiled_once() -> None:
    """So the tests above can fail. A set that was seen before is not compiled again, up to torch's own limit of graphs
    for one function, ``recompile_limit``: beyond it torch refuses, or without ``fullgraph`` runs eagerly."""
    torch._dynamo.reset()
    model = adapted()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for name, graphs in (("a", 1), ("b", 2), ("a", 2), ("b", 2)):
            model.set_adapter(name)
            torch.testing.assert_close(fast(ids()), model(ids()))
            assert counter.frame_count == graphs
        model.set_adapter("c")
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            fast(ids())
        loose = torch.compile(model, backend=counter)
        torch.testing.assert_close(loose(ids()), model(ids()))
    torch._dynamo.reset()


@pytest.mark.slow
def test_with_the_inductor() -> None:
    torch._dynamo.reset()
    pair = Pair()
    pair.fast = torch.compile(pair.model, fullgraph=True)
    pair.check()
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in (["b"], ["a", "c"], ["c"]):
            pair.both(lambda model, names=names: setattr(model, "active_adapters", names))
            pair.check()
    torch._dynamo.reset()
