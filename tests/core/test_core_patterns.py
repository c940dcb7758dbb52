"""Which layers a config means (claim 3), and which numbers a layer gets."""

from __future__ import annotations

import pytest
import torch
from core_models import net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from inlay.core.inject import inject
from inlay.core.patterns import matcher, pattern_key, pattern_value
from inlay.core.plan import Plan, plan
from inlay.core.policy import PEFT
from inlay.errors import ConfigError, InlayWarning, NoTargetError, TargetError, UnsupportedError
from inlay.methods.lora import LoraConfig


def paths(made: Plan) -> set[str]:
    return {placement.place.path for placement in made.placements}


def planned(blocks: int = 3, **fields: object) -> Plan:
    return plan(net(blocks), LoraConfig(**fields))


BLOCKS = ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q"], {f"{b}.q" for b in BLOCKS}),
        (["k"], {f"{b}.k" for b in BLOCKS}),  # never attn_k
        (["layers.1.q"], {"layers.1.q"}),
        (["1.q", "head"], {"layers.1.q", "head"}),
        (["first"], {"first"}),
        (["twin"], {"first"}),  # a second path of the same module
        (r".*\.k", {f"{b}.k" for b in BLOCKS}),
        (r".*k", {f"{b}.{k}" for b in BLOCKS for k in ("k", "attn_k")}),
        (r"layers\.[01]\.q", {"layers.0.q", "layers.1.q"}),
        ("all-linear", {f"{b}.{n}" for b in BLOCKS for n in ("q", "k", "attn_k")} | {"first"}),
        ("ALL-LINEAR", {f"{b}.{n}" for b in BLOCKS for n in ("q", "k", "attn_k")} | {"first"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_targets(targets: object, expected: set[str]) -> None:
    assert paths(planned(target_modules=targets)) == expected


def test_all_linear_takes_a_classifier_that_is_no_head_unless_the_task_adds_it() -> None:
    model = nn.Sequential()
    model.body, model.classifier = nn.Linear(2, 2), nn.Linear(2, 2)
    assert paths(plan(model, LoraConfig(target_modules="all-linear"))) == {"body", "classifier"}
    assert paths(plan(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))) == {"body"}


def test_all_linear_is_resolved_to_names_that_mean_the_same() -> None:
    config = LoraConfig(target_modules="all-linear")
    made = plan(net(), config)
    assert config.target_modules == "all-linear"  # planning changes nothing
    inject(made)
    assert isinstance(config.target_modules, set)
    assert paths(planned(target_modules=config.target_modules)) == paths(made)


def test_nothing_given_and_no_family_default() -> None:
    with pytest.raises(TargetError, match="target_modules"):
        planned()


@pytest.mark.parametrize("targets", [["attnk"], ["layers.9.q"], "q", "", r"layers\.q"], ids=repr)
def test_nothing_matched_is_an_error_with_suggestions(targets: object) -> None:
    with pytest.raises(NoTargetError, match="attn_k"):
        planned(target_modules=targets)
    with pytest.raises(NoTargetError):
        plan(net(), LoraConfig(target_modules=targets), policy=PEFT)


def test_one_name_of_several_matches_nothing() -> None:
    with pytest.raises(TargetError, match=r"attn_q.*attn_k"):
        planned(target_modules=["q", "attn_q"])
    made = plan(net(), LoraConfig(target_modules=["q", "attn_q"]), policy=PEFT)  # as in PEFT, without a word
    assert paths(made) == {f"{b}.q" for b in BLOCKS}
    assert list(made.unmatched) == ["target_modules: attn_q"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [(["q"], ["k"]), (["layers.1.k"], None), (r"layers\.[12]\..*", None)],
    ids=str,
)
def test_exclude_modules(exclude: object, left: list[str] | None) -> None:
    found = paths(planned(target_modules=["q", "k"], exclude_modules=exclude))
    excluded = matcher(exclude)
    assert found == {f"{b}.{n}" for b in BLOCKS for n in ("q", "k") if excluded(f"{b}.{n}") is None}
    assert 0 < len(found) < 6


def test_exclude_modules_that_exclude_nothing() -> None:
    with pytest.raises(TargetError, match="exclude_modules: attn_q"):
        planned(target_modules=["q"], exclude_modules=["attn_q"])


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {1}),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, {1}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_layers_to_transform(fields: dict[str, object], blocks: set[int]) -> None:
    assert paths(planned(target_modules=["q"], **fields)) == {f"layers.{b}.q" for b in blocks}


def test_layers_to_transform_beyond_the_last_block() -> None:
    with pytest.raises(TargetError):
        planned(target_modules=["q"], layers_to_transform=[7])


def test_a_module_that_is_no_layer() -> None:
    with pytest.raises(TargetError, match="Block"):
        planned(target_modules=["layers.0"])


def test_a_layer_the_method_refuses_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"'layers\.0\.norm' \(LayerNorm\)"):
        planned(target_modules=["norm"], use_dora=True)


def test_shared_module_is_adapted_once_and_stays_shared() -> None:
    model = net()
    state = inject(plan(model, LoraConfig(r=2, target_modules=["first", "twin"])))
    assert model.first is model.twin
    assert len(list(state.layers())) == 1


# -- numbers by layer -------------------------------------------------------------------------------------------------


def ranks(blocks: int = 12, **fields: object) -> dict[str, int]:
    made = planned(blocks, r=8, target_modules=["q", "k"], **fields)
    return {placement.place.path: placement.options["r"] for placement in made.placements}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("q", lambda path: path.endswith(".q")),
        ("layers.1.q", lambda path: path == "layers.1.q"),
        ("1.q", lambda path: path == "layers.1.q"),  # a dotted suffix: 11.q is none
        (r"layers\.\d\.q", lambda path: path.endswith(".q") and len(path) == len("layers.1.q")),
        (r".*\.[13]\.k", lambda path: path in ("layers.1.k", "layers.3.k")),
        ("layers.1", lambda path: path.startswith("layers.1.")),  # a dotted prefix, never layers.10 or layers.11
        ("^layers.1", lambda path: path.startswith("layers.1.")),
        ("layers", lambda path: True),
        (r"layers\.(2|5)", lambda path: path.startswith(("layers.2.", "layers.5."))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rank_pattern(key: str, meant: object) -> None:
    found = ranks(rank_pattern={key: 3})
    assert {path for path, r in found.items() if r == 3} == {path for path in found if meant(path)}  # type: ignore[operator]
    assert set(found.values()) <= {3, 8}
    assert 3 in found.values()


def test_rank_and_alpha_patterns_give_the_scaling() -> None:
    model = net()
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q"], rank_pattern={"0.q": 2}, alpha_pattern={"layers.1": 5}
    )
    inject(plan(model, config))
    q = [layer.q for layer in model.layers]
    assert [layer.r["default"] for layer in q] == [2, 8, 8]
    assert [layer.lora_alpha["default"] for layer in q] == [16, 5, 16]
    assert [layer.scaling["default"] for layer in q] == [8.0, 0.625, 2.0]
    assert [tuple(layer.lora_A["default"].weight.shape) for layer in q] == [(2, 6), (8, 6), (8, 6)]


def test_the_first_key_that_means_a_layer_wins() -> None:
    assert ranks(3, rank_pattern={"layers.1": 2, "q": 3})["layers.1.q"] == 2
    assert ranks(3, rank_pattern={"q": 3, "layers.1": 2})["layers.1.q"] == 3


def test_a_key_that_means_nothing() -> None:
    with pytest.raises(TargetError, match=r"rank_pattern: layers\.1\.v"):
        planned(target_modules=["q"], rank_pattern={"layers.1.v": 2})


def test_the_dropin_ignores_prefix_keys_with_a_warning_as_peft_does() -> None:
    config = LoraConfig(r=8, target_modules=["q"], rank_pattern={"^layers.1": 2})
    with pytest.warns(InlayWarning, match="rank_pattern"):
        made = plan(net(), config, policy=PEFT)
    assert {placement.options["r"] for placement in made.placements} == {8}


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\('\[a'|\[a"):
        planned(target_modules="[a")
    with pytest.raises(ConfigError):
        planned(target_modules=["q"], rank_pattern={"(": 2})


segment = st.text("abk_1.", min_size=1, max_size=5)


@given(path=st.lists(st.sampled_from(["a", "b", "k", "attn_k", "1", "10", "11"]), min_size=1, max_size=4), key=segment)
@settings(max_examples=300, deadline=None)
def test_names_match_whole_segments_only(path: list[str], key: str) -> None:
    """A list entry means a path exactly if it is a run of whole segments at the path's end."""
    dotted = ".".join(path)
    expected = any(".".join(path[i:]) == key for i in range(len(path)))
    assert (matcher([key])(dotted) is not None) == expected


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_prefix_key_never_means_another_number(i: int, j: int) -> None:
    for key in (f"model.layers.{i}", f"^model.layers.{i}"):
        assert (pattern_key([key], f"model.layers.{j}.q", True) is not None) == (i == j)
    assert pattern_value({f"{i}.q": 1}, f"layers.{j}.q", 0, True) == (1 if i == j else 0)


def test_planning_allocates_nothing_and_draws_nothing() -> None:
    model = net()
    stream = torch.get_rng_state()
    inject(plan(model, LoraConfig(target_modules=["q"])), seed=1)
    assert torch.equal(torch.get_rng_state(), stream)
