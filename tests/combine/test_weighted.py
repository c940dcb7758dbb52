"""``add_weighted_adapter`` for LoRA: against PEFT where PEFT is right, against float64 mathematics everywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from combine_pairs import KINDS, Pair, factors, lora, update
from peft.utils import merge_utils
from torch import Tensor

from inlay.combine.rules import COMBINATION_TYPES

FACTOR_TYPES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MATRIX_TYPES = [name for name in COMBINATION_TYPES if name.endswith("svd")]
WEIGHTS = {"positive": [0.7, 0.4], "negative": [0.9, -0.6], "alone": [-1.3]}
OPERATORS = {
    "svd": lambda found, weights: merge_utils.task_arithmetic(found, weights),
    "linear": lambda found, weights: merge_utils.task_arithmetic(found, weights),
    "magnitude_prune": lambda found, weights: merge_utils.magnitude_prune(found, weights, 0.6),
    "ties": lambda found, weights: merge_utils.ties(found, weights, 0.6),
    "dare_linear": lambda found, weights: merge_utils.dare_linear(found, weights, 0.6),
    "dare_ties": lambda found, weights: merge_utils.dare_ties(found, weights, 0.6),
}


def peft_is_wrong(kind: str, combination: str) -> bool:
    """Where PEFT fails, or does something else than the weighted update."""
    if kind == "conv2d_grouped":  # reads its own factors as if there were no groups
        return combination not in FACTOR_TYPES
    return kind in ("conv1d", "conv3d") and combination in MATRIX_TYPES  # decomposes each slice of the kernel


def seeded(pair: Pair, call, monkeypatch) -> None:
    """Combine on both sides from one seed; PEFT's injection draws initial values before, so it is reset there."""
    import peft.tuners.lora.model as module

    freeze = module._freeze_adapter

    def reset(*args, **kwargs):
        freeze(*args, **kwargs)
        torch.manual_seed(21)

    monkeypatch.setattr(module, "_freeze_adapter", reset)
    call(pair.theirs)
    torch.manual_seed(21)
    call(pair.ours)
    for model in (pair.theirs, pair.ours):
        model.set_adapter("new")


def cover(kinds: list[str], fits: Callable[[str, str, str], bool]) -> list[tuple[str, str, tuple[int, int], str]]:
    """Return every pair of kind and combination with one choice of weights, ranks taking turns."""
    cells = []
    for i, kind in enumerate(kinds):
        for j, combination in enumerate(COMBINATION_TYPES):
            signs = [weights for weights in WEIGHTS if fits(kind, combination, weights)]
            if signs:
                weights = signs[(i + j) % len(signs)]
                equal = (combination in FACTOR_TYPES and weights != "alone") or (i + j) % 2
                cells.append((kind, combination, (4, 4) if equal else (4, 2), weights))
    return cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "combination", "ranks", "weights"),
    cover(
        [*KINDS, "attention"],
        lambda kind, combination, weights: weights == "alone" or not peft_is_wrong(kind, combination),
    ),
)
def test_equals_peft_where_peft_is_right(kind, combination, ranks, weights, monkeypatch):
    pair = Pair(kind, *(lora(r=rank, lora_alpha=rank + 2) for rank in ranks))
    given = WEIGHTS[weights]
    names = ["a", "b"][: len(given)]
    seeded(pair, lambda m: m.add_weighted_adapter(names, given, "new", combination, density=0.6), monkeypatch)
    theirs = dict(pair.theirs.named_parameters())
    mine = {name: p for name, p in pair.ours.named_parameters() if ".new" in name}
    assert {name for name in theirs if ".new" in name} == set(mine)
    if combination in MATRIX_TYPES and weights != "alone":  # singular vectors are fixed up to their sign
        for name in mine:
            if "lora_A" in name or "lora_embedding_A" in name:
                other = name.replace("_A.", "_B.")
                found, expected = (
                    parameters[other].flatten(1) @ parameters[name].flatten(1) for parameters in (mine, theirs)
                )
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        for name, parameter in mine.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-5)
    if kind != "attention":  # whose output projection PEFT adapts twice
        for found, expected in zip(*pair.outputs(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


# what is drawn at random is compared with PEFT's draws above
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "combination", "ranks", "weights"),
    cover(KINDS, lambda kind, combination, weights: not combination.startswith("dare")),
)
def test_against_mathematics(kind, combination, ranks, weights):
    given = WEIGHTS[weights]
    names = ["a", "b"][: len(given)]
    pair = Pair(kind, *(lora(r=rank, lora_alpha=rank + 2) for rank in ranks))
    pair.ours.add_weighted_adapter(names, given, "new", combination, density=0.6)
    parts = [factors(pair.ours, name) for name in names]
    numbers = torch.tensor(given, dtype=torch.float64)
    scales = torch.tensor([scale for _, _, scale in parts], dtype=torch.float64)
    if len(given) == 1 or combination == "cat":
        expected = sum(w * update(pair.ours, name) for name, w in zip(names, given, strict=True))
    elif combination in MATRIX_TYPES:
        operator = OPERATORS[combination.removesuffix("_svd")]
        merged = operator([update(pair.ours, name) for name in names], numbers)
        expected = truncated(merged, max(ranks) // parts[0][0].shape[0])
    else:
        sizes = (numbers * scales).abs().sqrt()
        B = OPERATORS[combination]([B for B, _, _ in parts], sizes)
        A = OPERATORS[combination]([A for _, A, _ in parts], sizes * (numbers * scales).sign())
        expected = B @ A
    torch.testing.assert_close(update(pair.ours, "new"), expected, rtol=1e-5, atol=1e-5)
    new = pair.ours.peft_config["new"]
    assert (new.lora_alpha, new.rank_pattern, new.alpha_pattern) == (new.r, {}, {})
    wanted = max(ranks) if combination != "cat" else sum(ranks)
    assert new.r == (ranks[0] if len(given) == 1 else wanted)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "conv2d_grouped"])
def test_layers_whose_update_peft_cannot_decompose(kind):
    """What ``peft_is_wrong`` says: PEFT fails on these, or gives another update than the sum."""
    pair = Pair(kind, lora(r=4), lora(r=4))
    errors = pair.both(lambda m: m.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "svd", svd_rank=8))
    assert errors[1] is None
    assert isinstance(errors[0], RuntimeError)
    exact = update(pair.ours, "a") + update(pair.ours, "b")
    torch.testing.assert_close(update(pair.ours, "new"), exact, rtol=1e-5, atol=1e-5)


def test_side_by_side_in_a_grouped_convolution():
    """PEFT lays the ranks of the two adapters one after the other and so mixes up the groups."""
    pair = Pair("conv2d_grouped", lora(r=4), lora(r=4))
    pair.combine(["a", "b"], [1.0, 1.0], "new", "cat")
    exact = update(pair.ours, "a") + update(pair.ours, "b")
    torch.testing.assert_close(update(pair.ours, "new"), exact, rtol=1e-5, atol=1e-5)
    theirs, mine = pair.outputs()
    assert not torch.allclose(theirs[0], mine[0], atol=1e-2)


def test_more_rank_than_a_layer_has():
    """PEFT's factors then have different inner sizes, which the next forward finds out."""
    pair = Pair("linear", lora(r=6), lora(r=6))
    pair.combine(["a", "b"], [1.0, 0.5], "new", "svd", svd_rank=20)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pair.theirs(pair.x, pair.y)
    exact = update(pair.ours, "a") + 0.5 * update(pair.ours, "b")
    torch.testing.assert_close(update(pair.ours, "new"), exact, rtol=1e-5, atol=1e-5)
    assert factors(pair.ours, "new")[0].shape[-1] == 20


@pytest.mark.parametrize("clamp", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("combination", ["svd", "ties_svd"])
def test_clamped_factors_equal_pefts(combination, clamp):
    pair = Pair("linear", lora(r=4), lora(r=3))
    pair.combine(["a", "b"], [1.0, 0.5], "new", combination, density=0.7, svd_clamp=clamp, svd_rank=3)
    theirs = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        if ".new." in name:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_scales_that_users_set_count(combination):
    """The new adapter is the weighted sum of what runs, also where the scale was changed on the layer."""
    pair = Pair("linear", lora(r=4, use_rslora=True), lora(r=2, lora_alpha=12))
    for model in (pair.theirs, pair.ours):
        next(m for m in model.modules() if hasattr(m, "base_layer")).scaling["b"] = 0.25
    pair.ours.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", combination, svd_rank=6)
    B, A, scale = factors(pair.ours, "b")
    assert scale == 0.25
    exact = 0.5 * update(pair.ours, "a") + 2.0 * (B @ A) * 0.25
    torch.testing.assert_close(update(pair.ours, "new"), exact, rtol=1e-5, atol=1e-5)


def test_rslora():
    """PEFT keeps rsLoRA's scale, alpha / sqrt(r), with alpha = r, so that the result is sqrt(r) too large."""
    pair = Pair("linear", lora(r=4, use_rslora=True), lora(r=4, use_rslora=True))
    pair.combine(["a", "b"], [0.5, 0.5], "new", "cat")
    exact = 0.5 * (update(pair.ours, "a") + update(pair.ours, "b"))
    torch.testing.assert_close(update(pair.ours, "new"), exact, rtol=1e-5, atol=1e-5)
    layer = next(m for m in pair.theirs.modules() if hasattr(m, "base_layer"))
    torch.testing.assert_close(layer.get_delta_weight("new").double(), exact[0] * math.sqrt(8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", COMBINATION_TYPES)
def test_rank_patterns_give_layers_of_one_rank(combination, tmp_path):
    """PEFT leaves tensors of the layers' own ranks under a configuration that says otherwise: no load takes them."""
    import inlay

    fields = {"target_modules": ["layer", "other"], "r": 4, "rank_pattern": {"other": 2}}
    pair = Pair("linear", lora(**fields), lora(**fields))
    pair.ours.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", combination, density=0.6, svd_rank=None)
    pair.ours.set_adapter("new")
    rank = 8 if combination == "cat" else 4
    for path in ("layer", "other"):
        assert factors(pair.ours, "new", path)[0].shape[-1] == rank
        if combination == "cat":
            exact = update(pair.ours, "a", path) + 0.5 * update(pair.ours, "b", path)
            torch.testing.assert_close(update(pair.ours, "new", path), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = pair.ours(pair.x, pair.y)
    pair.ours.save_pretrained(tmp_path, selected_adapters=["new"])
    again = inlay.PeftModel.from_pretrained(Pair("linear", lora()).ours.unload(), tmp_path / "new").eval()
    with torch.no_grad():
        for found, wanted in zip(again(pair.x, pair.y), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "combination"), itertools.product([*KINDS, "attention"], ["cat", "svd", "linear"]))
def test_a_saved_result_loads_in_peft(kind, combination, tmp_path):
    import copy

    import peft

    pair = Pair(kind, lora(r=4), lora(r=4))
    bare = copy.deepcopy(pair.ours).unload()
    pair.ours.add_weighted_adapter(["a", "b"], [0.8, -0.5], "new", combination)
    pair.ours.set_adapter("new")
    pair.ours.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "new").eval()
    mine = {n.replace(".new", ".default"): p for n, p in pair.ours.named_parameters() if ".new" in n}
    theirs = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name])
    if kind != "attention":
        with torch.no_grad():
            for found, expected in zip(pair.ours(pair.x, pair.y), loaded(pair.x, pair.y), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "attention"])
def test_under_the_policy_of_peft(kind, combination):
    """There the outputs are PEFT's also where it adapts the output projection of attention twice."""
    import copy

    import inlay
    from inlay.compat.entry import get_peft_model

    pair = Pair(kind, lora(r=4), lora(r=4))
    bare = copy.deepcopy(pair.ours).unload()
    pair.ours = get_peft_model(bare, inlay.LoraConfig(**lora(r=4)), "a").eval()
    pair.ours.add_adapter("b", inlay.LoraConfig(**lora(r=4)))
    theirs = dict(pair.theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in pair.ours.named_parameters():
            parameter.copy_(theirs[name])
    pair.combine(["a", "b"], [0.8, -0.5], "new", combination)
    for found, expected in zip(*pair.outputs(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
