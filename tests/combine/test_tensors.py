"""The functions of ``peft.utils.merge_utils``, against PEFT itself and against the papers' words."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from peft.utils import merge_utils as theirs

from inlay.combine import tensors as ours
from inlay.errors import CombinationError, ConfigError, InlayWarning

FUNCTIONS = [name for name, value in vars(theirs).items() if inspect.isfunction(value)]


def tasks(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 5), count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator) for _ in range(count)]
    found[0][0] = 0.0  # entries that vote for no sign
    return [tensor.to(dtype) for tensor in found]


def test_every_function_is_there_with_its_signature():
    assert set(FUNCTIONS) == set(ours.__all__)
    for name in FUNCTIONS:
        mine = inspect.signature(getattr(ours, name)).parameters
        wanted = inspect.signature(getattr(theirs, name)).parameters
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in wanted.values()
        ], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.3, 0.55, 0.99, 1.0])
@pytest.mark.parametrize("weights", [[0.5, 0.2, 1.3], [1.0, -0.7, 0.4]])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("task_arithmetic", set()),
        ("magnitude_prune", {"density"}),
        ("dare_linear", {"density"}),
        ("ties", {"density", "total"}),
        ("ties", {"density", "frequency"}),
        ("dare_ties", {"density", "total"}),
        ("dare_ties", {"density", "frequency"}),
    ],
)
def test_combinations_equal_pefts_from_the_same_seed(name, extra, weights, density, dtype):
    keywords = {"density": density} if "density" in extra else {}
    for word in extra - {"density"}:
        keywords["majority_sign_method"] = word
    results = []
    for module in (theirs, ours):
        torch.manual_seed(11)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(getattr(module, name)(tasks(dtype), torch.tensor(weights), **keywords))
    assert torch.equal(*results)
    assert results[0].dtype == results[1].dtype


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.7])
def test_pruning_equals_pefts(layout, density):
    tensor = tasks()[1]
    tensor = tensor.mT if layout == "transposed" else tensor
    assert torch.equal(theirs.magnitude_based_pruning(tensor, density), ours.magnitude_based_pruning(tensor, density))
    for rescale in (True, False) if density else (False,):
        found = []
        for module in (theirs, ours):
            torch.manual_seed(5)
            found.append(module.random_pruning(tensor, density, rescale))
            found.append(torch.rand(()))  # the stream stands where PEFT leaves it
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])


def test_nothing_kept_is_nothing_and_not_nan():
    tensor = tasks()[1]
    assert theirs.random_pruning(tensor, 0.0, True).isnan().any()
    assert torch.equal(ours.random_pruning(tensor, 0.0, True), torch.zeros_like(tensor))


def test_random_pruning_keeps_the_mean():
    torch.manual_seed(0)
    pruned = ours.random_pruning(torch.ones(200, 200), 0.25, rescale=True)
    assert set(pruned.unique().tolist()) == {0.0, 4.0}
    assert pruned.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_signs_and_disjoint_mean_equal_pefts_and_the_definition(method):
    stacked = torch.stack(tasks())
    mask = ours.calculate_majority_sign_mask(stacked, method)
    assert torch.equal(mask, theirs.calculate_majority_sign_mask(stacked, method))
    merged = ours.disjoint_merge(stacked, mask)
    assert torch.equal(merged, theirs.disjoint_merge(stacked, mask))
    column = stacked[:, 2, 3].double().tolist()
    votes = sum(column) if method == "total" else sum(1 if value > 0 else -1 for value in column)
    agreeing = [value for value in column if (value > 0) == (votes >= 0)]
    assert merged[2, 3].item() == pytest.approx(sum(agreeing) / max(1, len(agreeing)), rel=1e-6)


def test_reshape_weight_task_tensors():
    stacked = torch.stack(tasks())
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(
        ours.reshape_weight_task_tensors(stacked, weights), theirs.reshape_weight_task_tensors(stacked, weights)
    )


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.prune(torch.ones(3), -0.1, "magnitude"), ConfigError),
        (lambda m: m.prune(torch.ones(3), 0.5, "size"), ConfigError),
        (lambda m: m.calculate_majority_sign_mask(torch.ones(2, 3), "votes"), CombinationError),
    ],
)
def test_errors_are_pefts(call, error):
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(error) as found:
        call(ours)
    assert isinstance(found.value, type(expected.value))


def test_a_density_of_one_warns_as_in_peft():
    for module, category in ((theirs, UserWarning), (ours, InlayWarning)):
        with pytest.warns(category):
            assert torch.equal(module.prune(torch.ones(3), 1.0, "random"), torch.ones(3))
