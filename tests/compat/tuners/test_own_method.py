"""A method that a user brings lives through everything, beside the real peft."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from gain import REGISTER, SOURCE
from worlds import BOTH, OURS, THEIRS, Net, add_method, drop_methods, fill, inputs, run, train

import inlay
from inlay.errors import InlayError


@pytest.fixture(scope="module")
def worlds():
    made = {}
    for root in BOTH:
        add_method(root, "GAIN")
        made[root] = run(SOURCE + REGISTER, root)
    yield made
    for root in BOTH:
        drop_methods(root, "GAIN", "GAINOTHER")


def both(worlds, use):
    """Return what ``use(world)`` returns in peft's world and in Inlay's."""
    return use(worlds[THEIRS]), use(worlds[OURS])


def alike(worlds, use):
    """Assert that both worlds give equal results: tensors nearly, everything else exactly."""
    theirs, ours = both(worlds, use)
    assert len(theirs) == len(ours)
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=f"result {number}")
        elif isinstance(a, dict) and any(isinstance(value, torch.Tensor) for value in a.values()):
            assert list(a) == list(b)
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        else:
            assert a == b, f"result {number}"


def wrapped(world, seed=2, **options):
    config = world.GainConfig(target_modules=["first", "2"], **options)
    model = world.peft.get_peft_model(Net(), config)
    fill(model, seed)
    return model


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_injection_forward_and_training(worlds):
    def use(world):
        model = wrapped(world, modules_to_save=["head"])
        first = model(inputs())
        losses = torch.tensor(train(model))
        return [first, losses, model(inputs()), flags(model), model.get_nb_trainable_parameters(), sorted(flags(model))]

    alike(worlds, use)


def test_several_adapters_switch_and_are_switched_off(worlds):
    def use(world):
        model = wrapped(world)
        model.add_adapter("b", world.GainConfig(target_modules=["first"], strength=2.0))
        fill(model)
        seen = [flags(model), model(inputs())]
        model.set_adapter("b")
        seen += [flags(model), model(inputs()), model.active_adapters]
        model.base_model.set_adapter(["default", "b"])
        seen += [model(inputs()), model.active_adapters]
        with model.disable_adapter():
            seen.append(model(inputs()))
        model.base_model.disable_adapter_layers()
        seen.append(model(inputs()))
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
        model.set_requires_grad("b")
        return [*seen, model(inputs()), flags(model), Net()(inputs())]

    alike(worlds, use)


def test_layers_are_switched_one_by_one(worlds):
    def use(world):
        model = wrapped(world)
        layer = model.base_model.model.first
        layer.enable_adapters(False)
        off = model(inputs())
        layer.enable_adapters(True)
        return [off, model(inputs()), layer.active_adapters, layer.disable_adapters, layer.merged]

    alike(worlds, use)


def test_merging_and_unmerging(worlds):
    def use(world):
        model = wrapped(world)
        before = model(inputs())
        model.merge_adapter()
        merged = [model(inputs()), list(model.base_model.model.first.merged_adapters)]
        weight = model.base_model.model.first.base_layer.weight.detach().clone()
        with model.disable_adapter():
            off = model(inputs())  # the layer unmerges itself
        return [before, *merged, weight, off, model(inputs()), list(model.base_model.model.first.merged_adapters)]

    alike(worlds, use)


def test_unmerging_is_bitwise_here_and_not_in_peft(worlds):
    def use(world):
        model = wrapped(world)
        before = model.base_model.model.first.base_layer.weight.detach().clone()
        model.merge_adapter()
        model.unmerge_adapter()
        return torch.equal(before, model.base_model.model.first.base_layer.weight)

    assert both(worlds, use) == (False, True)


def test_merge_and_unload(worlds):
    def use(world):
        model = wrapped(world)
        bare = model.merge_and_unload()
        return [bare(inputs()), [type(module).__name__ for module in bare.modules()], sorted(bare.state_dict())]

    alike(worlds, use)


def test_unloading_gives_the_very_modules_back(worlds):
    base = Net()
    kept = {name: id(module) for name, module in base.named_modules()}
    flags_before = flags(base)
    world = worlds[OURS]
    model = world.peft.get_peft_model(base, world.GainConfig(target_modules=["first", "2"]))
    bare = model.unload()
    assert bare is base
    assert {name: id(module) for name, module in base.named_modules()} == kept
    assert flags(base) == flags_before
    torch.testing.assert_close(base(inputs()), Net()(inputs()))


def test_deleting(worlds):
    def use(world):
        model = wrapped(world)
        model.add_adapter("b", world.GainConfig(target_modules=["first"], strength=2.0))
        fill(model)
        model.delete_adapter("default")
        return [model.active_adapters, sorted(n for n in flags(model) if "gain" in n), model(inputs())]

    alike(worlds, use)


def test_status(worlds):
    def use(world):
        model = wrapped(world, modules_to_save=["head"])
        model.add_adapter("b", world.GainConfig(target_modules=["first"]))
        layers = [vars(one) for one in model.get_layer_status()]
        whole = vars(model.get_model_status())
        return [layers, whole]

    alike(worlds, use)


def test_saving_and_loading_under_other_names(worlds, tmp_path):
    def use(world):
        folder = tmp_path / world.peft.__name__
        model = wrapped(world, modules_to_save=["head"])
        model.add_adapter("b", world.GainConfig(target_modules=["first"], strength=2.0))
        fill(model)
        state = {key: value.clone() for key, value in world.peft.get_peft_model_state_dict(model).items()}
        model.save_pretrained(folder)
        again = world.peft.PeftModel.from_pretrained(Net(), folder, adapter_name="other")
        outputs = [again(inputs())]
        again.load_adapter(folder / "b", "bb")
        again.set_adapter("bb")
        outputs.append(again(inputs()))
        config = world.peft.PeftConfig.from_pretrained(folder)
        return [
            model(inputs()),
            *outputs,
            state,
            type(config).__name__,
            config.strength,
            sorted(os.listdir(folder / "b")),
        ]

    alike(worlds, use)


@pytest.mark.parametrize(("writer", "reader"), [(THEIRS, OURS), (OURS, THEIRS)])
def test_files_of_one_are_read_by_the_other(worlds, tmp_path, writer, reader):
    model = wrapped(worlds[writer], modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    again = worlds[reader].peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)


def test_low_level_state_dict_calls_on_a_bare_model(worlds):
    def use(world):
        config = world.GainConfig(target_modules=["first", "2"])
        model = world.peft.inject_adapter_in_model(config, Net(), adapter_name="x")
        fill(model)
        state = {
            key: value.clone() for key, value in world.peft.get_peft_model_state_dict(model, adapter_name="x").items()
        }
        other = world.peft.inject_adapter_in_model(world.GainConfig(target_modules=["first", "2"]), Net(), "y")
        result = world.peft.set_peft_model_state_dict(other, state, adapter_name="y")
        by_keys = world.peft.inject_adapter_in_model(
            world.GainConfig(target_modules=["first", "2"]), Net(), state_dict=state
        )
        return [model(inputs()), other(inputs()), state, result.unexpected_keys, flags(model), sorted(flags(by_keys))]

    alike(worlds, use)


def test_created_on_the_meta_device_and_filled_by_a_load(worlds, tmp_path):
    def use(world):
        model = wrapped(world)
        model.save_pretrained(tmp_path / world.peft.__name__)
        again = world.peft.PeftModel.from_pretrained(Net(), tmp_path / world.peft.__name__, low_cpu_mem_usage=True)
        empty = world.peft.get_peft_model(Net(), world.GainConfig(target_modules=["first"]), low_cpu_mem_usage=True)
        held = {name: p.is_meta for name, p in empty.named_parameters()}
        return [again(inputs()), model(inputs()), held, sorted(n for n, p in again.named_parameters() if p.is_meta)]

    alike(worlds, use)


def test_half_precision_adapters_are_raised_unless_told_not_to(worlds):
    def use(world):
        config = world.GainConfig(target_modules=["first"])
        raised = world.peft.get_peft_model(Net().bfloat16(), config)
        kept = world.peft.get_peft_model(
            Net().bfloat16(), world.GainConfig(target_modules=["first"]), autocast_adapter_dtype=False
        )
        return [[str(p.dtype) for p in model.parameters()] for model in (raised, kept)]

    alike(worlds, use)


def test_copies_and_pickles_are_whole_and_apart(worlds):
    world = worlds[OURS]
    model = wrapped(world, modules_to_save=["head"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(inputs()), model(inputs()))
        twin.base_model.disable_adapter_layers()
        assert not torch.allclose(twin(inputs()), model(inputs()))
        twin.base_model.enable_adapter_layers()
        twin.merge_adapter()
        torch.testing.assert_close(twin(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)
        assert not model.base_model.model.first.merged
        twin.unload()
        assert type(model.base_model.model.first).__name__ == "GainLinear"


def test_in_a_mixed_model_beside_lora(worlds):
    """PEFT's mixed models take its own methods only; here the user's goes in through its hooks too."""
    world = worlds[OURS]
    config = world.GainConfig(target_modules=["first"])
    model = world.peft.get_peft_model(
        Net(), world.peft.LoraConfig(target_modules=["first", "2"], r=2), "low", mixed=True
    )
    model.add_adapter("gain", config)
    fill(model)
    alone = [_with(world, name) for name in ("low", "gain")]
    outputs = []
    for name in ("low", "gain"):
        model.set_adapter(name)
        outputs.append(model(inputs()))
    for a, b in zip(outputs, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    model.set_adapter(["low", "gain"])
    together = model(inputs())
    assert not any(torch.allclose(together, one) for one in outputs)
    bare = model.merge_and_unload()
    assert [type(module).__name__ for module in bare.modules()] == [type(module).__name__ for module in Net().modules()]


def _with(world, name):
    if name == "low":
        model = world.peft.get_peft_model(Net(), world.peft.LoraConfig(target_modules=["first", "2"], r=2), "low")
    else:
        model = world.peft.get_peft_model(Net(), world.GainConfig(target_modules=["first"]), "gain")
    fill(model)
    # names differ by `base_layer` segments between a mixed model and a plain one, and fill() goes by names
    return _refilled(model, name)


def _refilled(model, name):
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("gain_", "lora_")):
                full = path
                if name == "low" and ".first." in path:
                    full = path.replace(".first.", ".first.base_layer.")
                generator = torch.Generator().manual_seed(2 + sum(map(ord, full)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model(inputs())


def test_adapters_by_sample_are_refused_not_ignored(worlds):
    model = wrapped(worlds[OURS])
    model.eval()
    with pytest.raises(InlayError, match="_mixed_batch_forward"):
        model(inputs(), adapter_names=["default"] * 5)
    model(inputs())


def test_an_injection_that_fails_leaves_nothing_behind(worlds):
    world = worlds[OURS]
    base = Net()
    kept = {name: id(module) for name, module in base.named_modules()}
    before = flags(base)
    with pytest.raises(ValueError, match="cannot adapt"):
        world.peft.get_peft_model(base, world.GainConfig(target_modules=["first", "block.1"]))
    assert {name: id(module) for name, module in base.named_modules()} == kept
    assert flags(base) == before
    assert not hasattr(base, "peft_config")
    model = world.peft.get_peft_model(base, world.GainConfig(target_modules=["first"]))
    fill(model)
    seen = model(inputs())
    names = sorted(flags(model))
    with pytest.raises(ValueError, match="cannot adapt"):
        model.add_adapter("b", world.GainConfig(target_modules=["first", "block.1"]))
    assert sorted(flags(model)) == names
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(model(inputs()), seen)


def test_adapters_of_another_method_beside_it(worlds, tmp_path):
    """Outside of PEFT's policy a plain model takes any methods."""
    world = worlds[OURS]
    model = inlay.get_peft_model(Net(), world.GainConfig(target_modules=["first"]))
    model.add_adapter("low", world.peft.LoraConfig(target_modules=["first"], r=2))
    fill(model)
    model.set_adapter("low")
    expected = model(inputs())
    model.save_pretrained(tmp_path)
    again = world.peft.PeftModel.from_pretrained(Net(), tmp_path, adapters="all")
    torch.testing.assert_close(again(inputs()), expected)
    model.delete_adapter("default")
    torch.testing.assert_close(model(inputs()), expected)
    assert type(model.base_model.model.first).__name__ == "AdaptedLayer"


def test_a_plan_says_that_the_tuner_makes_the_layers(worlds):
    with pytest.raises(InlayError, match="its tuner makes its layers"):
        inlay.plan(Net(), worlds[OURS].GainConfig(target_modules=["first"]))


def test_it_compiles_whole(worlds):
    model = wrapped(worlds[OURS])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), model(inputs()))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"name": "Gain"}, ValueError),
        ({"name": "gain_"}, ValueError),
        ({"name": "notthere"}, ValueError),
        ({"name": "lora"}, KeyError),
        ({"name": "adalora"}, KeyError),
        ({"name": "gain"}, KeyError),
        ({"name": "gainother", "prefix": "other_"}, ValueError),
    ],
)
def test_registering_is_checked_as_in_peft(worlds, change, kind):
    for root in BOTH:
        add_method(root, "GAINOTHER")
        world = worlds[root]
        with pytest.raises(kind):
            world.register_peft_method(config_cls=world.GainConfig, model_cls=world.GainModel, **change)


def test_mappings_know_the_method(worlds):
    def use(world):
        mapping = __import__(f"{world.peft.__name__}.mapping", fromlist=["x"])
        key = world.PeftType.GAIN
        tuner, config = mapping.PEFT_TYPE_TO_TUNER_MAPPING[key], mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key]
        return [tuner.__name__, config.__name__, mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key]]

    alike(worlds, use)
