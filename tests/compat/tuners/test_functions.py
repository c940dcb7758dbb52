"""Functions of ``peft.tuners.tuners_utils`` beside PEFT's."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn
from worlds import BOTH, OURS, Net, fill, inputs, run

from inlay.compat import namespace

SOURCE = """
import peft
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
"""


@pytest.fixture(params=BOTH)
def world(request):
    return run(SOURCE, request.param)


def alike(use):
    theirs, ours = (use(run(SOURCE, root)) for root in BOTH)
    assert ours == theirs


@pytest.mark.parametrize("name", sorted(namespace.table()["tuners.tuners_utils"]))
def test_every_name_is_there_with_its_parameters(name):
    theirs, ours = (getattr(run(SOURCE, root).tuners_utils, name) for root in BOTH)
    if inspect.isfunction(theirs) and not name.startswith("__"):
        parameters = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(parameters)] == parameters


CASES = [
    ({"target_modules": ["q"]}, ["q", "a.q", "aq", "q.a", "layers.1.q"]),
    ({"target_modules": ["a.q"]}, ["a.q", "b.a.q", "ba.q", "q"]),
    ({"target_modules": r".*\.q"}, ["a.q", "q", "a.qq"]),
    ({"target_modules": ["q"], "exclude_modules": ["a.q"]}, ["a.q", "b.q", "q"]),
    ({"target_modules": ["q"], "exclude_modules": r"a\..*"}, ["a.q", "b.q"]),
    ({"target_modules": ["q"], "modules_to_save": ["head"]}, ["head.q", "a.head", "headed.q", "a.q", "a.head.b.q"]),
    ({"target_modules": ["q"], "layers_to_transform": [1, 2]}, ["m.layers.1.q", "m.layers.3.q", "q", "m.q"]),
    ({"target_modules": ["q"], "layers_to_transform": 1}, ["m.layers.1.q", "m.layers.11.q", "m.layers.1.x.2.q"]),
    (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"},
        ["m.h.1.q", "m.layers.1.q", "h.1.q", "m.h.2.q"],
    ),
    ({"target_modules": [], "target_parameters": ["w"]}, ["q", "w"]),
    ({"target_modules": None, "target_parameters": ["w"]}, ["q", "w"]),
]


@pytest.mark.parametrize(("options", "keys"), CASES)
def test_which_modules_are_meant(options, keys):
    def use(world):
        config = world.LoraConfig(**options)
        check = world.tuners_utils.check_target_module_exists
        return [(bool(found), type(found).__name__ == "_ExcludedModule") for found in (check(config, k) for k in keys)]

    alike(use)


def test_blocks_are_counted_from_the_first_segment_here():
    def use(world):
        config = world.LoraConfig(target_modules=["q"], layers_to_transform=[1])
        keys = ["layers.1.q", "layers.2.q", "m.layers.1.q"]
        return [bool(world.tuners_utils.check_target_module_exists(config, key)) for key in keys]

    theirs, ours = (use(run(SOURCE, root)) for root in BOTH)
    assert theirs == [False, False, True]
    assert ours == [True, False, True]


def test_full_copies_are_added_by_themselves():
    def use(world):
        from importlib import import_module

        add = import_module(f"{world.peft.__name__}.utils.other").set_additional_trainable_modules
        model, config = Net(), world.LoraConfig(modules_to_save=["head"])
        add(model, config, {}, "x", activate_adapter=True)
        return type(model.head).__name__, sorted(name for name, _ in model.named_parameters())

    theirs, ours = (use(run(SOURCE, root)) for root in BOTH)
    assert ours[1] == theirs[1]
    assert theirs[0] == "ModulesToSaveWrapper"


def test_matched_modules_are_listed():
    def use(world):
        model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
        found = world.tuners_utils.inspect_matched_modules(model.base_model)
        return found["matched"], {key: name for key in found for name in found[key]}["unmatched"] is not None

    alike(use)


TARGETS = [
    ([f"m.{i}.q" for i in range(4)], [f"m.{i}.k" for i in range(4)]),
    (["a.q", "b.q"], ["c.q", "q2"]),
    (["x.a.q", "y.a.q", "k"], ["x.b.q"]),
    (["block.lin", "lin"], ["other"]),
]


@pytest.mark.parametrize(("targets", "others"), TARGETS)
def test_minimal_targets_mean_the_same(targets, others):
    def use(world):
        short = world.tuners_utils._find_minimal_target_modules(targets, others)
        meant = lambda name: any(name == s or name.endswith(f".{s}") for s in short)  # noqa: E731
        return all(map(meant, targets)), any(map(meant, others)), len(short)

    alike(use)


@pytest.mark.parametrize("wrong", [("q", []), ([], []), (["", "a"], []), (["a"], ["a"])])
def test_minimal_targets_refuse(world, wrong):
    with pytest.raises(ValueError):
        world.tuners_utils._find_minimal_target_modules(*wrong)


def test_all_linear(world):
    config = world.LoraConfig(target_modules="all-linear")
    assert world.tuners_utils._maybe_include_all_linear_layers(config, Net()) is config
    assert config.target_modules == {"first", "block.0", "block.2", "head"}


def test_adapters_to_merge(world):
    model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
    layer = model.base_model.model.first
    check = world.tuners_utils.check_adapters_to_merge
    assert check(layer) == ["default"]
    with pytest.raises(TypeError):
        check(layer, "default")
    layer.merge()
    with pytest.warns(UserWarning, match="merged"):
        assert check(layer) == []
    with pytest.warns(UserWarning, match="merged"):
        assert check(layer, ["default", "b"]) == ["b"]


@pytest.mark.parametrize(
    ("key", "name"),
    [("a.lora_A.x.weight", "x"), ("a.lora_E.x", "x"), ("x.a.lora_A.x.weight", "x"), ("a.b.weight", "x"), ("x", "x"),
     ("a.x.b.c", "x"), ("x.weight", "x")],
)  # fmt: skip
def test_names_leave_keys(key, name):
    alike(lambda world: world.tuners_utils._remove_adapter_name_from_state_dict_key(key, name))


def test_prefixes_of_an_adapters_tensors():
    def use(world):
        model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"], modules_to_save=["head"]))
        model.add_adapter("b", world.LoraConfig(target_modules=["2"]))
        utils = world.tuners_utils
        prefixes = utils._get_tuner_state_dict_key_prefixes(model, "default")
        kept = utils._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        every = utils._get_tuner_state_dict_key_prefixes(model)
        return sorted(kept), sorted(utils._filter_state_dict_by_key_prefixes(model.state_dict(), every))

    alike(use)


def test_activating_deleting_and_gradients():
    def use(world):
        utils, seen = world.tuners_utils, []
        model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first", "2"], modules_to_save=["head"]))
        model.add_adapter("b", world.LoraConfig(target_modules=["first"]))
        utils.set_adapter(model, "b")
        flags = lambda: {name: p.requires_grad for name, p in model.named_parameters() if "lora" in name}  # noqa: E731
        seen.append(flags())
        utils.set_adapter(model, ["default", "b"], inference_mode=True)
        seen += [flags(), model.base_model.model.first.active_adapters]
        utils.set_requires_grad(model, ["b", "nowhere"])
        seen.append(flags())
        utils.set_adapter(model, "default")
        seen.append(utils.delete_adapter(model, "b", "lora_"))
        return [*seen, sorted(flags())]

    alike(use)


def test_deleting_what_is_merged_is_refused(world):
    model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="default"):
        world.tuners_utils._check_adapters_not_merged(model, "default")


def test_casting():
    def use(world):
        config = world.LoraConfig(target_modules=["first"])
        model = world.get_peft_model(Net().half(), config, autocast_adapter_dtype=False)
        before = [str(p.dtype) for p in model.parameters()]
        world.tuners_utils.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
        same = [str(p.dtype) for p in model.parameters()]
        world.tuners_utils.cast_adapter_dtype(model, "default")
        return before, same, [str(p.dtype) for p in model.parameters()]

    alike(use)


def test_features_names_and_devices():
    def use(world):
        utils = world.tuners_utils
        layers = [nn.Linear(2, 3), nn.Embedding(5, 2), nn.Conv2d(4, 6, 1), nn.MultiheadAttention(4, 2)]
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd = utils._get_in_out_features(nn.Tanh())
        names = ["b", "a"]
        utils._extend_unique(names, ["a", "c", "c"])
        return (
            [tuple(utils._get_in_out_features(layer)) for layer in layers],
            odd,
            utils.find_parameter_name_by_module(model, model.block[2]),
            utils.find_parameter_name_by_module(model, nn.Linear(1, 1)),
            utils.get_device_map(model),
            names,
        )

    alike(use)


def test_clones_and_replicated_blocks(world):
    layer = nn.Sequential(nn.Linear(2, 2))
    shared = world.tuners_utils.clone_module(layer, share_weights=True)
    apart = world.tuners_utils.clone_module(layer)
    assert shared[0].weight is layer[0].weight
    assert apart[0].weight is not layer[0].weight
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    )
    world.tuners_utils.replicate_layers(model, [(0, 2), (1, 2)])
    assert len(model.layers) == 3
    assert model.config.num_hidden_layers == 3
    assert model.layers[2].mlp.up_proj.weight is model.layers[1].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1, 2]


def test_mamba_modules_are_refused(world):
    class Config:
        model_type = "mamba"

    model = Net()
    model.config = Config()
    check = world.tuners_utils._check_lora_target_modules_mamba
    with pytest.raises(ValueError, match="conv1d"):
        check(world.LoraConfig(target_modules=["conv1d"]), model, "conv1d")
    check(world.LoraConfig(target_modules=["in_proj"]), model, "in_proj")


def test_onload_layer_is_a_block(world):
    model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
    with world.tuners_utils.onload_layer(model.base_model.model.first):
        assert not model.base_model.model.first.base_layer.weight.is_meta


def test_setting_what_is_merged_unmerges():
    world = run(SOURCE, OURS)
    model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
    model.add_adapter("b", world.LoraConfig(target_modules=["first"]))
    fill(model)
    before = model(inputs())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        world.tuners_utils.set_adapter(model, "default")
    assert not model.base_model.model.first.merged
    torch.testing.assert_close(model(inputs()), before)
