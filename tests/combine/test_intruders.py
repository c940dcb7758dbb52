"""``reduce_intruder_dimension``: beside PEFT's, and against its definition in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from combine_pairs import Pair, layer_of, lora, update
from peft.tuners.lora.intruders import reduce_intruder_dimension as their_reduce

from inlay.combine.intruders import reduce_intruder_dimension
from inlay.errors import AdapterNameError, ConfigError, UnknownAdapterError, UnsupportedError


def both(pair: Pair, **options: Any) -> None:
    for model, reduce in ((pair.theirs, their_reduce), (pair.ours, reduce_intruder_dimension)):
        reduce(model, "a", "new", logging_sink=None, **options)


def test_the_signature_is_pefts():
    mine, theirs = (inspect.signature(call).parameters for call in (reduce_intruder_dimension, their_reduce))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize(
    "options",
    [{}, {"mitigation_lambda": 0.0}, {"mitigation_lambda": 0.3, "top_k": 2}, {"threshold_epsilon": 0.9}, {"top_k": 1}],
)
@pytest.mark.parametrize("fields", [{"lora_alpha": 24}, {"lora_alpha": 9, "use_rslora": True}, {"lora_alpha": 0.01}])
def test_equals_peft_on_linear_layers(options, fields):
    pair = Pair("linear", lora(r=4, target_modules=["layer", "other"], **{"lora_alpha": 6, **fields}))
    both(pair, **options)
    assert pair.ours.active_adapters == pair.theirs.active_adapters == ["new"]
    theirs = dict(pair.theirs.named_parameters())
    for path in ("layer", "other"):
        A, B = (f"base_model.model.{path}.lora_{part}.new.weight" for part in "AB")
        mine = dict(pair.ours.named_parameters())
        torch.testing.assert_close(mine[B] @ mine[A], theirs[B] @ theirs[A], rtol=1e-4, atol=1e-5)
        assert mine[A].requires_grad
    for found, expected in zip(*pair.outputs(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "conv1d", "conv2d", "conv3d", "embedding", "attention"])
def test_against_the_definition(kind):
    """PEFT reads a Conv1D's and an embedding's weight the wrong way round, and a kernel slice by slice."""
    pair = Pair(kind, lora(r=4, lora_alpha=16))
    reduce_intruder_dimension(
        pair.ours, "a", "new", top_k=3, threshold_epsilon=0.7, mitigation_lambda=0.4, logging_sink=None
    )
    base = layer_of(pair.ours).base_affine().weight.detach().double()
    change = update(pair.ours, "a")[0]
    before, (U, S, Vh) = torch.linalg.svd(base)[0][:, : min(base.shape)], torch.linalg.svd(base + change)
    wanted = change.clone()
    count = 0
    for i in range(3):
        if max(abs(float(U[:, i] @ before[:, j])) for j in range(before.shape[1])) < 0.7:
            wanted -= 0.6 * S[i] * torch.outer(U[:, i], Vh[i])
            count += 1
    U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(update(pair.ours, "new")[0], best, rtol=1e-4, atol=1e-5)
    if kind == "linear":
        assert count


def test_what_peft_makes_of_an_embedding():
    pair = Pair("embedding", lora(r=4, lora_alpha=60))
    their_reduce(pair.theirs, "a", "new", logging_sink=None)
    with pytest.raises(IndexError):  # the two factors have changed places
        pair.theirs(pair.x, pair.y)


def test_biases_and_copies_come_along():
    pair = Pair("linear", lora(r=4, lora_bias=True, modules_to_save=["head"], lora_alpha=16))
    reduce_intruder_dimension(pair.ours, "a", "new", logging_sink=None)
    named = dict(pair.ours.named_parameters())
    prefix = "base_model.model."
    for name in ("layer.lora_B.{}.bias", "head.modules_to_save.{}.weight"):
        mine, old = (named[prefix + name.format(adapter)] for adapter in ("new", "a"))
        assert torch.equal(mine, old)
    assert pair.ours.peft_config["new"] is not pair.ours.peft_config["a"]


def test_lines_are_handed_to_the_sink():
    pair = Pair("linear", lora(r=4, lora_alpha=16, target_modules=["layer", "other"]))
    lines: list[str] = []
    reduce_intruder_dimension(pair.ours, "a", "new", logging_sink=lines.append)
    assert len(lines) == 3
    assert lines[0].startswith("layer: ")
    assert "'new'" in lines[2]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"old_adapter_name": "z"}, UnknownAdapterError),
        ({"new_adapter_name": "a"}, AdapterNameError),
        ({"top_k": 0}, ConfigError),
    ],
)
def test_refusals(options, error):
    pair = Pair("linear", lora(r=4))
    names = {"old_adapter_name": "a", "new_adapter_name": "new", **options}
    before = {name: p.clone() for name, p in pair.ours.named_parameters()}
    with pytest.raises(error) as found:
        reduce_intruder_dimension(pair.ours, **names)
    if "top_k" not in options:
        with pytest.raises(Exception) as expected:
            their_reduce(pair.theirs, **names)
        assert isinstance(found.value, type(expected.value))
    after = dict(pair.ours.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "fields", "method", "match"),
    [
        ("linear", {"r": 4, "target_modules": ["layer"]}, "LoHaConfig", "LOHA"),
        ("linear", lora(r=4, use_dora=True), "LoraConfig", "DoRA"),
        ("conv2d_grouped", lora(r=4), "LoraConfig", "groups"),
    ],
)
def test_what_has_no_matrix_beside_the_weight(kind, fields, method, match):
    pair = Pair(kind, fields, method=method)
    with pytest.raises(UnsupportedError, match=match):
        reduce_intruder_dimension(pair.ours, "a", "new")
    if match == "LOHA":
        with pytest.raises(ValueError):
            their_reduce(pair.theirs, "a", "new")


@pytest.mark.parametrize("options", [{"threshold_epsilon": float("nan")}, {"mitigation_lambda": 2.0}])
def test_numbers_out_of_range_are_refused(options):
    pair = Pair("linear", lora(r=4, target_modules=["layer"]))
    with pytest.raises(ConfigError, match=next(iter(options))):
        reduce_intruder_dimension(pair.ours, "a", "new", logging_sink=None, **options)
    assert "new" not in pair.ours.peft_config


def test_a_scale_of_zero_is_refused():
    pair = Pair("linear", lora(r=4, target_modules=["layer"], lora_alpha=0))
    with pytest.raises(UnsupportedError, match="lora_alpha is 0"):
        reduce_intruder_dimension(pair.ours, "a", "new", logging_sink=None)
