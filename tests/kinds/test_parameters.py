"""Bare parameters: which one is adapted where, against weights written by hand in float64."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.parameter import parameter_layers
from inlay.core.plan import plan
from inlay.core.policy import PEFT, Policy
from inlay.core.state import State, find_state
from inlay.errors import NoTargetError, TargetError, UnsupportedError
from inlay.methods.lora import LoraConfig


class Bank(nn.Module):
    """Three experts; ``zeta`` is registered before ``alpha``, and ``mixer`` is a plain matrix."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(3, 10, 8), torch.randn(3, 8, 5)
        self.zeta = nn.Parameter(up.mT.contiguous().mT if is_transposed else up)
        self.mixer = nn.Parameter(torch.randn(8, 8))
        self.alpha = nn.Parameter(down)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8); experts run side by side and are averaged."""
        x = x @ self.mixer.T
        if self.is_transposed:  # (experts, in, out)
            hidden = torch.einsum("bi,eio->ebo", x, self.zeta.mT)
        else:
            hidden = torch.einsum("bi,eoi->ebo", x, self.zeta)
        return torch.einsum("ebi,eoi->bo", hidden.tanh()[..., :5] * self.scale, self.alpha)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"bank": Bank(), "lin": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["bank"](block["lin"](x).tanh()).tanh()  # type: ignore[index]
        return x


def config(*parameters: str, **options: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "init_lora_weights": False} | options
    return LoraConfig(target_parameters=list(parameters), **options)


def model_of(*configs: LoraConfig, policy: Policy | None = None) -> tuple[Model, Model, State]:
    torch.manual_seed(0)
    model = Model().double()
    untouched = copy.deepcopy(model)
    for i, one in enumerate(configs):
        state = inject(plan(model, one, "abc"[i], policy=policy), seed=i)
    return model, untouched, state


def written(model: Model, untouched: Model, *names: str) -> Model:
    """Add ``3/r B_e A_e`` for every expert: A has experts slowest in its rows, B fastest in its columns."""
    result = copy.deepcopy(untouched)
    for block, plain in zip(model.blocks, result.blocks, strict=True):
        for layer in parameter_layers(block["bank"]):  # type: ignore[index]
            weight = getattr(plain["bank"], layer.parameter_name)  # type: ignore[index]
            experts = weight.shape[0] if weight.dim() == 3 else 1
            for name in set(names) & layer.entries.keys():
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                r = A.shape[0] // experts
                for e in range(experts):
                    with torch.no_grad():
                        part = weight[e] if weight.dim() == 3 else weight
                        part += 3 / r * B[:, e::experts] @ A[e * r : (e + 1) * r]
    return result


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_nesting_follows_the_module_not_the_config() -> None:
    for targets in (["alpha", "zeta", "mixer"], ["mixer", "bank.zeta", "blocks.0.bank.alpha", "blocks.1.bank.alpha"]):
        model, untouched, _ = model_of(config(*targets))
        for block in model.blocks:
            nest = list(parameter_layers(block["bank"]))  # type: ignore[index]
            assert [layer.parameter_name for layer in nest] == ["alpha", "mixer", "zeta"]
            shapes = [(tuple(n.lora_A["a"].weight.shape), tuple(n.lora_B["a"].weight.shape)) for n in nest]
            assert shapes == [((6, 5), (8, 6)), ((2, 8), (8, 2)), ((6, 8), (10, 6))]
        assert_same(model(X), written(model, untouched, "a")(X))
        assert not torch.allclose(model(X), untouched(X))


def test_several_adapters_merged_and_not() -> None:
    model, untouched, state = model_of(config("zeta", "alpha"), config("alpha", "zeta", r=3))
    set_active(state, ["a", "b"])
    y = model(X)
    assert_same(y, written(model, untouched, "a", "b")(X))
    merge(state, ["a"])
    assert_same(model(X), y)
    with opened(state, disabled=True):
        assert_same(model(X), untouched(X))
    merge(state)
    assert_same(model(X), y)
    unmerge(state)
    set_active(state, ["b"])
    assert_same(model(X), written(model, untouched, "b")(X))
    with opened(state, names=["a", "__base__", "b", "a"]):
        y = model(X)
    for i, names in enumerate([["a"], [], ["b"], ["a"]]):
        assert_same(y[i], written(model, untouched, *names)(X)[i])


def test_merged_into_the_module_for_good() -> None:
    model, untouched, state = model_of(config("zeta", "alpha"))
    expected = written(model, untouched, "a")
    merge(state, keep="none")
    eject(model, state, restore=False)
    assert_same(model(X), expected(X))
    assert model.state_dict().keys() == untouched.state_dict().keys()


def test_eject_unmerges_every_parameter_of_a_nest() -> None:
    model, untouched, state = model_of(config("zeta", "mixer", "alpha"))
    merge(state)
    eject(model, state)
    for (name, found), (_, expected) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_eject_gives_back_the_very_objects() -> None:
    torch.manual_seed(0)
    model = Model()
    before, tensors = dict(model.named_modules()), dict(model.named_parameters())
    state = inject(plan(model, config("zeta", "alpha")))
    assert not any(tensor.requires_grad for tensor in tensors.values())
    eject(model, state)
    assert dict(model.named_modules()) == before
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())
    assert all(tensor.requires_grad for tensor in tensors.values())


def test_the_shared_module_is_never_written_to() -> None:
    """Swapping a parameter for the time of a forward would show its neighbours' weights to other threads."""
    model, untouched, state = model_of(config("zeta", "alpha"), config("zeta", "alpha"))
    expected = {name: written(model, untouched, *([name] if name else []))(X) for name in ("a", "b", "")}
    wrong: list[str] = []
    barrier = threading.Barrier(3)

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(60):
            with opened(state, names=[name] * 4 if name else None, disabled=not name):
                if not torch.allclose(model(X), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(way: Callable[[Model], Model]) -> None:
    model, untouched, _ = model_of(config("zeta", "alpha"))
    other = way(model)
    assert_same(other(X), model(X))
    state = find_state(other)
    assert state is not None
    eject(other, state)
    assert_same(other(X), untouched(X))
    assert not torch.allclose(model(X), untouched(X))


def test_compiled_in_one_graph() -> None:
    model, _, state = model_of(config("zeta", "alpha", "mixer"), config("zeta", "alpha", "mixer"))
    set_active(state, ["a", "b"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(X), model(X))
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_matrix_of_a_linear_layer_equals_the_layer() -> None:
    """The same map, whether the layer or its parameter is named."""
    torch.manual_seed(0)
    one = nn.ModuleDict({"lin": nn.Linear(6, 4)})
    two = copy.deepcopy(one)
    inject(plan(one, config("lin.weight")))
    inject(plan(two, config(target_modules=["lin"])))
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in two.named_parameters()}
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(one["lin"](x), two["lin"](x))


def test_transposed_bank() -> None:
    """(experts, in, out), as a module that says ``is_transposed`` stores it."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"bank": Bank()}).double()
    holder["bank"].is_transposed = True  # type: ignore[assignment]
    inject(plan(holder, config("alpha")))
    layer: Any = holder["bank"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (tuple(A.shape), tuple(B.shape)) == ((6, 8), (5, 6))
    expected = layer.get_base_layer().alpha + 1.5 * torch.einsum("ore,eri->eio", B.view(5, 2, 3), A.view(3, 2, 8))
    torch.testing.assert_close(layer.merged_tensors(layer.chain())["alpha"], expected)


def test_patterns_name_the_parameter() -> None:
    made = plan(Model(), config("zeta", "alpha", rank_pattern={"bank.alpha": 5}, alpha_pattern={"zeta": 8}))
    assert {
        p.site.name: (p.options["r"], p.options["lora_alpha"]) for p in made.placements if ".0." in p.site.name
    } == {
        "blocks.0.bank.zeta": (2, 8),
        "blocks.0.bank.alpha": (5, 3),
    }


def test_only_chosen_blocks() -> None:
    made = plan(Model(), config("alpha", layers_to_transform=[1]))
    assert [p.site.name for p in made.placements] == ["blocks.1.bank.alpha"]
    made = plan(Model(), config("alpha", exclude_modules=["blocks.1.bank"]))
    assert [p.site.name for p in made.placements] == ["blocks.0.bank.alpha"]
    assert len(plan(Model(), config("alpha", layers_to_transform=[1]), policy=PEFT).placements) == 2


@pytest.mark.parametrize("second", [["alpha"], ["zeta"], ["alpha", "mixer"], ["alpha", "zeta", "mixer"]])
def test_other_parameters_of_the_same_module_are_refused(second: list[str]) -> None:
    model, _, state = model_of(config("zeta", "alpha"))
    names = set(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"'alpha', 'zeta' of 'blocks.0.bank' and this .*nesting"):
        plan(model, config(*second), "b")
    assert set(model.state_dict()) == names
    delete(model, state, "a")
    inject(plan(model, config(*second), "b"))  # nothing is left that would disagree
    bank = model.blocks[0]["bank"]  # type: ignore[index]
    assert {layer.parameter_name for layer in parameter_layers(bank)} == set(second)


def test_other_modules_may_differ() -> None:
    model, untouched, state = model_of(config("blocks.0.bank.alpha"), config("blocks.1.bank.zeta"))
    set_active(state, ["a", "b"])
    assert_same(model(X), written(model, untouched, "a", "b")(X))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout=0.1 acts on a forward pass"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
@pytest.mark.parametrize("policy", [None, PEFT], ids=["inlay", "peft"])
def test_what_has_no_place_there_is_refused_by_name(options: dict[str, Any], words: str, policy: Policy | None) -> None:
    with pytest.raises(UnsupportedError, match=words):
        plan(Model(), config("alpha", **options), policy=policy)


def test_wrong_targets() -> None:
    with pytest.raises(UnsupportedError, match=r"blocks.0.bank.scale.*1 axes"):
        plan(Model(), config("scale"))
    with pytest.raises(TargetError, match=r"alhpa.*near: .*alpha"):
        plan(Model(), config("alpha", "alhpa"))
    with pytest.raises(NoTargetError, match=r"alhpa"):
        plan(Model(), config("alhpa"))
    with pytest.raises(TargetError, match=r"'blocks.0.lin' is adapted as a layer"):
        plan(Model(), config("lin.weight", target_modules=["lin"]))
    with pytest.raises(UnsupportedError, match=r"belongs to the model itself"):
        plan(nn.Linear(3, 3), config("weight"))
    model, _, _ = model_of(config(target_modules=["lin"]))
    with pytest.raises(TargetError, match=r"'blocks.0.lin' is adapted as a layer"):
        plan(model, config("lin.weight"), "b")
    model, _, _ = model_of(config("lin.weight"))
    with pytest.raises(TargetError, match=r"'blocks.0.lin'.*parameter"):
        plan(model, config(target_modules=["lin"]), "b")
    model, _, _ = model_of(config("lin.weight", modules_to_save=["bank"]))
    with pytest.raises(TargetError, match=r"trained in full|matches nothing"):
        plan(model, config("alpha"), "b")
    with pytest.raises(TargetError, match=r"modules_to_save.*'blocks.0.bank'"):
        plan(Model(), config("alpha", modules_to_save=["bank"]))
