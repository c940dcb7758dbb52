"""``nn.MultiheadAttention`` against the same module with its weights written by hand, in float64."""

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
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import State, find_state
from inlay.errors import RoutingError, UnsupportedError
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig

E, HEADS, N, L, S = 8, 2, 3, 4, 5


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(E, HEADS, **options)
        if self.mha.in_proj_bias is not None:
            nn.init.normal_(self.mha.in_proj_bias)
            nn.init.normal_(self.mha.out_proj.bias)

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        return self.mha(*args, **kwargs)


def config(r: int = 2, **options: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=3, target_modules=["mha"], init_lora_weights=False, **options)


def adapted(*names: str, **options: Any) -> tuple[Model, Model, State]:
    """Return a model with adapters, the untouched one, and the state; everything in float64."""
    torch.manual_seed(0)
    model = Model(**options).double()
    untouched = copy.deepcopy(model)
    for i, name in enumerate(names or ("default",)):
        state = inject(plan(model, config(2 + i), name), seed=i)
    return model, untouched, state


def written(model: Model, untouched: Model, *names: str) -> Model:
    """Return the plain module with ``W + 3/r B A`` computed here."""
    result = copy.deepcopy(untouched)
    layer: Any = model.mha
    with torch.no_grad():
        for part, weight in ((layer, result.mha.in_proj_weight), (layer.output, result.mha.out_proj.weight)):
            for name in names or ("default",):
                A, B = part.lora_A[name].weight, part.lora_B[name].weight
                weight += 3 / A.shape[0] * B @ A
    return result


def inputs(batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(N, n, E, generator=generator, dtype=torch.float64) for n in (L, S, S))
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def padding() -> Tensor:
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


FORMS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "plain": ({}, dict),
    "batch_first": ({"batch_first": True}, dict),
    "no_bias": ({"batch_first": True, "bias": False}, dict),
    "bias_kv": ({"add_bias_kv": True, "add_zero_attn": True}, dict),
    "no_weights": ({"batch_first": True}, lambda: {"need_weights": False}),
    "by_head": ({}, lambda: {"average_attn_weights": False}),
    "padding": ({"batch_first": True}, lambda: {"key_padding_mask": padding()}),
    "mask": ({}, lambda: {"attn_mask": torch.ones(L, S).triu(2).bool()}),
    "mask_by_sample": (
        {"batch_first": True},
        lambda: {"attn_mask": torch.rand(N * HEADS, L, S, generator=torch.Generator().manual_seed(1)) > 0.7},
    ),
}


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_written_weights(form: str, mode: str) -> None:
    options, extra = FORMS[form]
    model, untouched, _ = adapted(**options)
    reference = written(model, untouched)
    for module in (model, untouched, reference):
        module.train(mode == "train")
    args = inputs(options.get("batch_first", False))
    with torch.set_grad_enabled(mode != "no_grad"):
        y = model(*args, **extra())
        assert_same(y, reference(*args, **extra()))
        assert not torch.allclose(y[0], untouched(*args, **extra())[0], equal_nan=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_fused_self_attention_does_not_skip_the_adapter(batch_first: bool) -> None:
    """In eval mode without gradients, torch hands the weights of self-attention to one fused function."""
    model, untouched, _ = adapted(batch_first=batch_first)
    reference = written(model, untouched).eval()
    model.eval()
    x = inputs(batch_first)[0]
    with torch.no_grad():
        assert_same(model(x, x, x), reference(x, x, x))


def test_unbatched() -> None:
    model, untouched, state = adapted()
    x = torch.randn(L, E, dtype=torch.float64)
    assert_same(model(x, x, x), written(model, untouched)(x, x, x))
    with opened(state, names=["default", "__base__"]), pytest.raises(RoutingError, match="no batch axis"):
        model(x, x, x)


def test_gradients_equal_those_through_written_weights() -> None:
    model, untouched, _ = adapted()
    args = [a.requires_grad_() for a in inputs(False)]
    (model(*args)[0] ** 2).sum().backward()
    x_grads = [a.grad.clone() for a in args]
    reference = written(model, untouched)
    fresh = [a.detach().requires_grad_() for a in args]
    (reference(*fresh)[0] ** 2).sum().backward()
    for found, expected in zip(x_grads, fresh, strict=True):
        torch.testing.assert_close(found, expected.grad, rtol=1e-9, atol=1e-12)
    layer: Any = model.mha
    for part, weight in ((layer, reference.mha.in_proj_weight), (layer.output, reference.mha.out_proj.weight)):
        A, B = part.lora_A["default"].weight, part.lora_B["default"].weight
        torch.testing.assert_close(B.grad, 1.5 * weight.grad @ A.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(A.grad, 1.5 * B.T @ weight.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in layer.get_base_layer().parameters() if not p.requires_grad)


@pytest.mark.parametrize("form", FORMS)
def test_mixed_batch_equals_each_sample_alone(form: str) -> None:
    options, extra = FORMS[form]
    model, untouched, state = adapted("a", "b", **options)
    args = inputs(options.get("batch_first", False))
    names = ["b", "__base__", "a"]
    with opened(state, names=names):
        y, weights = model(*args, **extra())
    references = {
        "a": written(model, untouched, "a"),
        "b": written(model, untouched, "b"),
        "__base__": untouched,
    }
    axis = 0 if options.get("batch_first") else 1
    for i, name in enumerate(names):
        alone_y, alone_weights = references[name](*args, **extra())
        torch.testing.assert_close(y.select(axis, i), alone_y.select(axis, i), equal_nan=True)
        assert (weights is None) == (alone_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights[i], alone_weights[i], equal_nan=True)


def test_shared_mask_with_as_many_rows_as_samples_is_not_split() -> None:
    model, untouched, state = adapted("a", "b", batch_first=True)
    x = torch.randn(L, L, E, dtype=torch.float64)  # as many samples as positions
    mask = torch.ones(L, L).triu(1).bool()
    names = ["a", "b", "a", "b"]
    with opened(state, names=names):
        y, _ = model(x, x, x, attn_mask=mask)
    for i, name in enumerate(names):
        alone = written(model, untouched, name)(x, x, x, attn_mask=mask)[0]
        torch.testing.assert_close(y[i], alone[i])


def test_merge_unmerge_and_disable() -> None:
    model, untouched, state = adapted("a", "b", batch_first=True)
    set_active(state, ["a", "b"])
    args = inputs(True)
    both = model(*args)
    assert_same(both, written(model, untouched, "a", "b")(*args))
    merge(state)
    layer: Any = model.mha
    torch.testing.assert_close(
        layer.get_base_layer().in_proj_weight, written(model, untouched, "a", "b").mha.in_proj_weight
    )
    assert_same(model(*args), both)
    with opened(state, disabled=True):
        assert_same(model(*args), untouched(*args))
    unmerge(state)
    for name, tensor in untouched.mha.state_dict().items():
        path = name.replace("out_proj.", "out_proj.base_layer.")
        assert torch.equal(layer.base_layer.state_dict()[path], tensor)


def test_parts_follow_their_own_switches() -> None:
    model, untouched, _ = adapted(batch_first=True)
    args = inputs(True)
    layer: Any = model.mha
    layer.output.override(enabled=False)
    half = copy.deepcopy(untouched)
    half.mha.in_proj_weight.data.copy_(written(model, untouched).mha.in_proj_weight)
    assert_same(model(*args), half(*args))


def test_compiled_in_one_graph() -> None:
    model, _untouched, state = adapted("a", "b", batch_first=True)
    args = inputs(True)
    for active in (["a"], ["a", "b"]):
        set_active(state, active)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*args), model(*args))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_apart(way: Callable[[Model], Model]) -> None:
    model, untouched, state = adapted(batch_first=True)
    args = inputs(True)
    y = model(*args)
    other = way(model)
    assert_same(other(*args), y)
    found = find_state(other)
    assert found is not None
    assert found is not state
    set_active(found, [])
    assert_same(other(*args), untouched(*args))
    assert_same(model(*args), y)


def test_threads_with_different_calls() -> None:
    model, untouched, state = adapted("a", "b", batch_first=True)
    args = inputs(True)
    expected = {name: written(model, untouched, name)(*args)[0] for name in ("a", "b")} | {"": untouched(*args)[0]}
    wrong: list[str] = []
    barrier = threading.Barrier(3)

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(60):
            with opened(state, names=[name] * N if name else None, disabled=not name):
                if not torch.allclose(model(*args)[0], expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_eject_gives_back_the_very_objects() -> None:
    torch.manual_seed(0)
    model = Model()
    before = dict(model.named_modules())
    tensors = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = inject(plan(model, config(bias="lora_only")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "mha.base_layer.out_proj.base_layer.bias" in trained  # as in peft: of the biases, the one called bias
    assert "mha.base_layer.in_proj_bias" not in trained
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(*(torch.randn(3, 2, E) for _ in range(3)))[0].sum().backward()
    optimiser.step()
    eject(model, state)
    assert dict(model.named_modules()) == before
    for name, parameter in model.named_parameters():
        known, value, grad = tensors[name]
        assert parameter is known
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is grad


def test_other_query_and_key_sizes_are_refused() -> None:
    model = Model(kdim=6, vdim=7)
    with pytest.raises(UnsupportedError, match=r"'mha'.*kdim=6 or vdim=7.*embed_dim=8"):
        plan(model, config())
    assert find_state(model) is None


def test_dropout_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"'mha'.*lora_dropout=0.5"):
        plan(Model(), config(lora_dropout=0.5))
    with pytest.raises(UnsupportedError, match=r"module_dropout=0.2"):
        plan(Model(), LoHaConfig(r=2, target_modules=["mha"], module_dropout=0.2))


def test_policy_peft_takes_dropout_and_never_applies_it() -> None:
    torch.manual_seed(0)
    model = Model()
    state = inject(plan(model, config(lora_dropout=0.9), policy=PEFT))
    args = tuple(a.float() for a in inputs(False))
    y = model.train()(*args)
    assert_same(model.eval()(*args), y)
    set_active(state, [])
    assert not torch.allclose(model(*args)[0], y[0])


def test_output_projection_alone_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="never calls it; target 'mha' instead"):
        plan(Model(), LoraConfig(target_modules=["out_proj"]))


def test_named_beside_its_attention_the_output_projection_is_adapted_once() -> None:
    made = plan(Model(), LoraConfig(target_modules=["mha", "out_proj"]))
    assert [p.site.name for p in made.placements] == ["mha", "mha.out_proj"]


def test_patterns_reach_both_parts() -> None:
    pattern = {"mha": 4}
    assert [p.options["r"] for p in plan(Model(), config(rank_pattern=pattern)).placements] == [4, 4]
    assert [p.options["r"] for p in plan(Model(), config(rank_pattern=pattern), policy=PEFT).placements] == [4, 4]
    assert [p.options["r"] for p in plan(Model(), config(rank_pattern={"out_proj": 5})).placements] == [2, 5]


# -- code that reads the weights of layers and never calls them -----------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 12, batch_first=True)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()


def run(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model["encoder"](x, src_key_padding_mask=mask)  # type: ignore[index]


SOURCES: list[Any] = [["linear1"], ["linear2"], ["self_attn"], "all-linear", ["norm1"], r".*layers\.1\.linear1"]


@pytest.mark.parametrize("targets", SOURCES, ids=str)
def test_every_adapted_layer_of_an_encoder_is_reached(targets: Any) -> None:
    model = encoder()
    untouched = copy.deepcopy(model)
    x = torch.randn(2, 4, E)
    mask = torch.tensor([[False] * 4, [False, False, True, True]])
    state = inject(plan(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)))
    never_called = {id(m.output) for m in model.modules() if getattr(m, "output", None) is not None}
    reached: set[int] = set()
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer) and id(m) not in never_called]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: reached.add(id(module)))
    run(model, x, mask)
    assert reached == {id(layer) for layer in layers}
    for layer in layers:
        layer._forward_hooks.clear()
    merged = copy.deepcopy(model)
    found = find_state(merged)
    assert found is not None
    merge(found, keep="none")
    eject(merged, found, restore=False)
    assert merged["encoder"].layers[0].activation_relu_or_gelu == 1  # type: ignore[index]
    torch.testing.assert_close(run(model, x), run(merged, x), rtol=1e-4, atol=1e-5)
    kept = ~mask
    torch.testing.assert_close(run(model, x, mask)[kept], run(merged, x, mask)[kept], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(model, x), run(untouched, x))
    eject(model, state)
    assert torch.equal(run(model, x, mask), run(untouched, x, mask))


def switches(model: nn.Module) -> list[Any]:
    stack: Any = model["encoder"]  # type: ignore[index]
    return [stack.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in stack.layers)]


def test_switches_come_back_on_eject_delete_and_failure_and_live_in_copies() -> None:
    model = encoder()
    before = switches(model)
    some = LoraConfig(r=2, target_modules=r".*layers\.1\.linear1")
    state = inject(plan(model, some))
    assert switches(model) == [False, before[1], 0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert switches(other) == [False, before[1], 0]
        found = find_state(other)
        assert found is not None
        eject(other, found)
        assert switches(other) == before
    delete(model, state, "default")
    assert switches(model) == before
    inject(plan(model, some))
    assert switches(model) == [False, before[1], 0]
    eject(model, state)
    assert switches(model) == before

    def fail(state: State) -> None:
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        inject(plan(model, some), then=fail)
    assert switches(model) == before
    assert not any("_inlay" in name for module in model.modules() for name in module.__dict__)
