"""A compiled model goes on without being compiled anew while adapters of other rank, alpha and layers take turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotswap_models import Written, close, ids, injected, loaded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import inlay.compat.peft.utils.hotswap as hotswap
from inlay.core.policy import INLAY, PEFT

LAYERS = ["emb", "conv", "conv1d_hf", "lin"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapters(tmp_path, **fields: Any) -> list[Written]:
    """Of different rank and alpha; the third adapts one layer only."""
    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 4},
        {"r": 2, "lora_alpha": 3},
        {"r": 8, "lora_alpha": 12, "target_modules": ["lin"]},
        {"r": 8, "lora_alpha": 7, "rank_pattern": {"lin": 1}},
    ]
    usual = {"target_modules": LAYERS} | fields
    return [Written(tmp_path / str(i), seed=i, **(usual | changed)) for i, changed in enumerate(settings)]


def compiled(model: nn.Module, how: str, backend: Any = "aot_eager") -> Any:
    if how == "wrapped":
        return torch.compile(model, backend=backend, fullgraph=True)
    model.compile(backend=backend, fullgraph=True)
    return model


def take_turns(model: Any, written: list[Written]) -> None:
    """Run every adapter twice on a compiled model; nothing may be compiled but the first forward."""
    with torch.no_grad():
        close(model(ids()), written[0].output)
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for other in [*written[1:], *written]:
            hotswap.hotswap_adapter(model, other.folder, "default")
            close(model(ids()), other.output)


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=lambda policy: policy.name)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_adapters_take_turns(tmp_path, policy, how):
    written = adapters(tmp_path)
    prepared = loaded(written[0], policy)
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    counter = CompileCounterWithBackend("aot_eager")
    take_turns(compiled(prepared, how, counter), written)
    assert counter.frame_count == 1


def test_dora_takes_turns(tmp_path):
    written = adapters(tmp_path, use_dora=True, target_modules=["lin", "conv", "conv1d_hf"])
    prepared = loaded(written[0])
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    take_turns(compiled(prepared, "wrapped"), written)


def test_a_bare_model_as_diffusers_has_it(tmp_path):
    written = adapters(tmp_path)
    model = injected(written[0], "default_0", PEFT)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default_0"])
    fast = compiled(model, "in place")
    with torch.no_grad():
        close(fast(ids()), written[0].output)
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for other in [*written[1:], *written]:
            tensors = other.inserted("default_0", prefix="")
            hotswap.hotswap_adapter_from_state_dict(model, tensors, "default_0", other.ours)
            close(fast(ids()), other.output)


def test_grouped_convolutions_take_turns(tmp_path):
    written = [Written(tmp_path / str(r), seed=r, r=r, lora_alpha=r + 1, target_modules=["grouped"]) for r in (2, 4, 8)]
    prepared = loaded(written[0])
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    take_turns(compiled(prepared, "wrapped"), written)


def test_scales_can_be_changed_too(tmp_path):
    written = adapters(tmp_path)
    prepared, plain = loaded(written[0]), loaded(written[0])
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    fast = compiled(prepared, "wrapped")
    with torch.no_grad():
        fast(ids())
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for model in (prepared, plain):
            model.base_model.model.lin.scale_layer(2.0)
            model.base_model.model.conv.set_scale("default", 3.0)
            model.base_model.model.conv1d_hf.scaling["default"] = 0.5
        close(fast(ids()), plain(ids()))


def _compilations(written: list[Written], *, prepare: bool) -> int:
    model = loaded(written[0])
    if prepare:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter)
    with torch.no_grad():
        for other in written:
            hotswap.hotswap_adapter(model, other.folder, "default")
            close(fast(ids()), other.output)
    return counter.frame_count


def test_without_preparing_everything_is_compiled_again(tmp_path):
    """So the tests above can fail; outputs are right all the same."""
    written = adapters(tmp_path)
    assert _compilations(written, prepare=True) == 1
    torch._dynamo.reset()
    assert _compilations(written, prepare=False) > 1


def test_training_goes_on_after_a_swap(tmp_path):
    """Gradients of a compiled, prepared model are those of the adapter alone."""
    written = adapters(tmp_path)[:2]
    prepared, plain = loaded(written[0]), loaded(written[1])
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    fast = compiled(prepared, "wrapped")
    fast(ids()).square().sum().backward()
    prepared.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap.hotswap_adapter(fast, written[1].folder, "default")
        fast(ids()).square().sum().backward()
    plain(ids()).square().sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in prepared.named_parameters():
        if parameter.requires_grad:
            found: Tensor = parameter.grad
            part = tuple(slice(size) for size in expected[name].shape)
            torch.testing.assert_close(found[part], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_with_the_inductor(tmp_path):
    written = adapters(tmp_path)
    prepared = loaded(written[0])
    hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    take_turns(compiled(prepared, "wrapped", "inductor"), written)
