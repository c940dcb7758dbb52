"""``add_weighted_adapter`` for every method: against the weighted sum of what each adapter changes, in float64."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from cells import METHODS, Cell, method_of, works
from combine_pairs import made_layer
from peft.utils import merge_utils
from subject import Subject, written
from torch import Tensor

import inlay
from inlay.combine import add_weighted
from inlay.combine.rules import COMBINATION_TYPES
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State
from inlay.errors import CombinationError, ConfigError, NoCombinationError

KINDS = ["linear", "conv1d_hf", "conv2d", "conv2d_grouped", "convtranspose2d", "embedding", "layernorm", "attention"]
OWN_FORM = [name for name in METHODS if method_of(name).linear]
# LoRA's and (IA)^3's combinations have rules and tests of their own
OTHERS = [name for name in METHODS if not name.startswith(("lora", "dora", "ia3")) and method_of(name).mergeable]
INTO_LORA = [name for name in OTHERS if name not in OWN_FORM]
MATRIX = [name for name in COMBINATION_TYPES if name.endswith("svd")]
FACTORS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
WEIGHTS = {"one": 0.7, "two": -1.3}
OPERATORS: dict[str, Any] = {
    "svd": lambda found, weights: merge_utils.task_arithmetic(found, weights),
    "linear": lambda found, weights: merge_utils.task_arithmetic(found, weights),
    "magnitude_prune": lambda found, weights: merge_utils.magnitude_prune(found, weights, 0.6),
    "ties": lambda found, weights: merge_utils.ties(found, weights, 0.6),
    # with a density of 1 nothing is drawn
    "dare_linear": lambda found, weights: merge_utils.dare_linear(found, weights, 1.0),
    "dare_ties": lambda found, weights: merge_utils.dare_ties(found, weights, 1.0),
}


def some(names: list[str], share: int, kinds: list[str]) -> list[tuple[str, str]]:
    """Return every method with each ``share``-th of its kinds, every kind among them."""
    cells = []
    for i, name in enumerate(names):
        fitting = [kind for kind in kinds if works(name, kind)]
        cells += [(name, kind) for j, kind in enumerate(fitting) if (i + j) % share == 0 or len(fitting) == 1]
    return cells


def two(method: str, kind: str, other: str | None = None) -> Subject:
    subject = Subject(Cell(method, kind, "plain_fp64"))
    subject.add("two", other or method)
    return subject


def combine(subject: Subject, combination: str, **options: Any) -> str:
    add_weighted(subject.model, subject.state, list(WEIGHTS), list(WEIGHTS.values()), "new", combination, **options)
    return str(subject.state.record("new").config.peft_type.value)


def changes(subject: Subject, name: str) -> dict[str, Tensor]:
    """Return what an adapter makes of the weights, by merging it."""
    subject.activate(name)
    before = dict(subject.untouched.named_parameters())
    return {key: p.detach() - before[key] for key, p in written(subject.model).named_parameters()}


def adapted(state: State, name: str) -> list[tuple[AdaptedLayer, Any]]:
    layers = [layer for layer in state.layers() if isinstance(layer, AdaptedLayer)]
    return [(layer, entry) for layer in layers for entry in layer.entries.get(name, ())]


def outputs(subject: Subject, name: str) -> Tensor:
    """Return what the first layer adds to its output with an adapter; it is affine."""
    subject.activate(name)
    with torch.no_grad():
        return subject.model.first(subject.x) - subject.untouched.first(subject.x)


@pytest.mark.parametrize(("method", "kind"), some(OTHERS, 3, KINDS))
def test_side_by_side_is_the_weighted_sum(method, kind):
    subject = two(method, kind)
    made = combine(subject, "cat")
    assert (made == "LORA") == (method in INTO_LORA)
    if kind == "conv2d_grouped" or subject.cell.unmergeable:  # no weight holds a LoRA that crosses groups
        found, parts = {"": outputs(subject, "new")}, {name: {"": outputs(subject, name)} for name in WEIGHTS}
    else:
        found, parts = changes(subject, "new"), {name: changes(subject, name) for name in WEIGHTS}
    for key, change in found.items():
        expected = sum(weight * parts[name][key] for name, weight in WEIGHTS.items())
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)
    assert any(bool((change.abs() > 1e-3).any()) for change in found.values())
    assert not subject.state.record("new").frozen


@pytest.mark.parametrize(("turn", "method"), enumerate(OTHERS))
def test_whole_updates(turn, method):
    """All types that decompose, at full rank, where they are what PEFT's operators make of the changes."""
    combination = MATRIX[turn % len(MATRIX)]
    if method.startswith(("c3a", "miss")):
        combination = "svd"  # equal entries are thinned out in an order that rounding decides
    fitting = [kind for kind in ("linear", "conv2d", "embedding", "conv1d_hf") if works(method, kind)]
    subject = two(method, fitting[turn % len(fitting)])
    density = 1.0 if "dare" in combination else 0.6
    assert combine(subject, combination, density=density, svd_rank=12) == "LORA"
    found, parts = changes(subject, "new"), [changes(subject, name) for name in WEIGHTS]
    operator = OPERATORS[combination.removesuffix("_svd")]
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    for layer in {layer for layer, _ in adapted(subject.state, "new")}:
        key = f"{layer.site.name}.weight"
        expected = operator([part[key] for part in parts], weights)
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("turn", "method"), enumerate(OWN_FORM))
@pytest.mark.parametrize("half", [0, 1])
def test_in_their_own_form(turn, method, half):
    """What trains is combined by PEFT's operators, as the difference from what changes nothing."""
    combination = FACTORS[(2 * turn + half) % len(FACTORS)]
    fitting = [kind for kind in KINDS if works(method, kind)]
    subject = two(method, fitting[(turn + half) % len(fitting)])
    copies = method in ("ln_tuning", "frod", "trainable_tokens")  # these start from what the layer has
    if copies:
        from inlay.core.inject import inject
        from inlay.core.plan import plan

        inject(plan(subject.model, subject.cell.config(), "rest"))
    assert combine(subject, combination, density=1.0 if "dare" in combination else 0.6) != "LORA"
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    for layer, entry in adapted(subject.state, "new"):
        held = [layer.params(layer.entries[name][0]) for name in WEIGHTS]
        p = layer.params(entry)
        for role in entry.method.linear:
            if p.get(role) is None:
                continue
            rest = torch.zeros_like(p.get(role))
            if copies:
                rest = getattr(layer.params(layer.entries["rest"][0]), role)
            expected = rest + OPERATORS[combination]([getattr(q, role) - rest for q in held], weights)
            torch.testing.assert_close(p.get(role), expected)


PAIRS = [("lora", "loha"), ("dora", "vera"), ("ia3", "fourierft"), ("oft", "lora"), ("adalora", "shira")]


@pytest.mark.parametrize(("method", "other"), PAIRS)
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_different_methods_become_one_lora(method, other, combination):
    subject = two(method, "conv2d", other)
    assert combine(subject, combination, svd_rank=8 if combination == "svd" else None) == "LORA"
    found, parts = changes(subject, "new"), {name: changes(subject, name) for name in WEIGHTS}
    for key, change in found.items():
        expected = sum(weight * parts[name][key] for name, weight in WEIGHTS.items())
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)


def test_low_rank_updates_are_never_made_dense(monkeypatch):
    """Bases of VeRA and AdaLoRA are put side by side; no decomposition sees a matrix of the layer's size."""
    seen: list[tuple[int, ...]] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **kw: seen.append(tuple(m.shape)) or svd(m, **kw))
    subject = two("adalora", "linear")
    combine(subject, "svd", svd_rank=4)
    assert set(seen) == {(8, 8)}  # twice the rank of 4
    assert len(seen) == 2


def test_a_rank_is_the_best_of_its_size():
    subject = two("loha", "linear")
    combine(subject, "svd", svd_rank=2)
    found, parts = changes(subject, "new"), {name: changes(subject, name) for name in WEIGHTS}
    whole = sum(weight * parts[name]["first.weight"] for name, weight in WEIGHTS.items())
    U, S, Vh = torch.linalg.svd(whole)
    torch.testing.assert_close(found["first.weight"], (U[:, :2] * S[:2]) @ Vh[:2])


def test_other_places_are_no_common_form():
    """Spectra at other frequencies do not add up entry by entry, and what they change does."""
    torch.manual_seed(0)
    layer, x = made_layer("linear")
    fields: dict[str, Any] = {"target_modules": ["0"], "n_frequency": 9, "scaling": 30.0}
    model = inlay.get_peft_model(torch.nn.Sequential(layer), inlay.FourierFTConfig(**fields), "a")
    model.add_adapter("b", inlay.FourierFTConfig(**fields, random_loc_seed=3))
    with pytest.raises(NoCombinationError, match="'a' and 'b' differ in fourierft_places at '0'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "linear")
    assert list(model.peft_config) == ["a", "b"]
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    outputs = []
    for name in ("a", "b", "new"):
        model.set_adapter(name)
        outputs.append(model(x) - layer(x))
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1], rtol=1e-4, atol=1e-4)


def test_scales_count():
    layer, x = made_layer("linear")
    fields: dict[str, Any] = {"target_modules": ["0"], "n_frequency": 9}
    model = inlay.get_peft_model(torch.nn.Sequential(layer), inlay.FourierFTConfig(**fields, scaling=30.0), "a")
    model.add_adapter("b", inlay.FourierFTConfig(**fields, scaling=60.0))
    model.add_weighted_adapter(["a", "b"], [1.0, -2.0], "new", "linear")
    outputs = []
    for name in ("a", "b", "new"):
        model.set_adapter(name)
        outputs.append(model(x) - layer(x))
    torch.testing.assert_close(outputs[2], outputs[0] - 2.0 * outputs[1], rtol=1e-4, atol=1e-4)


def test_rows_of_different_tokens():
    table = torch.nn.Embedding(9, 4)
    config = inlay.TrainableTokensConfig(target_modules=["0"], token_indices=[1, 5])
    model = inlay.get_peft_model(torch.nn.Sequential(table), config, "a")
    model.add_adapter("b", inlay.TrainableTokensConfig(target_modules=["0"], token_indices=[5, 2]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn(parameter.shape))
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", "linear")
    found = []
    for name in ("a", "b", "new"):
        model.set_adapter(name)
        found.append(model(torch.arange(9)) - table.weight)
    assert model.peft_config["new"].token_indices == [1, 5, 2]
    torch.testing.assert_close(found[2], 0.5 * found[0] + 2.0 * found[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "combination"),
    [
        (lambda: inlay.FourierFTConfig(n_frequency=9, target_modules=["0"]), "ties"),
        (lambda: inlay.LoHaConfig(r=2, target_modules=["0"], init_weights=False), "cat"),
    ],
)
def test_a_saved_result_loads_in_peft(config, combination, tmp_path):
    layer, x = made_layer("linear")
    model = inlay.get_peft_model(torch.nn.Sequential(layer), config(), "a")
    model.add_adapter("b", config())
    model.add_weighted_adapter(["a", "b"], [0.5, -1.5], "new", combination, density=0.5)
    model.set_adapter("new")
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = peft.PeftModel.from_pretrained(torch.nn.Sequential(layer), tmp_path / "new")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "combination", "error", "why"),
    [
        ("loha", "linear", "linear", NoCombinationError, "LoHa is not linear in its tensors; 'cat'"),
        ("oft", "linear", "ties", NoCombinationError, "OFT is not linear"),
        ("loha", "linear", "svd", ConfigError, "svd_rank.* LOHA, whose update has no rank of its own"),
        ("poly", "linear", "cat", NoCombinationError, "Poly, which depends on the data"),
        ("lily", "linear", "svd", NoCombinationError, "Lily, which depends on the data"),
        ("loha", "experts", "cat", CombinationError, "bare parameters"),
    ],
)
def test_what_is_refused_and_changes_nothing(method, kind, combination, error, why):
    subject = two(method, kind)
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    with pytest.raises(error, match=why):
        combine(subject, combination, density=0.6)
    after = dict(subject.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], p) for name, p in after.items())
    assert list(subject.state.records) == ["one", "two"]
