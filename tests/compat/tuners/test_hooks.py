"""The hooks of injection run in PEFT's order, and what a subclass does in them counts."""

from __future__ import annotations

import inspect

import pytest
import torch
from worlds import BOTH, OURS, Net, fill, inputs, run, train

HOOKS = """
_pre_injection_hook inject_adapter _check_new_adapter_config _check_tied_modules _get_module_names_tied_with_embedding
get_model_config _prepare_adapter_config _prepare_model _check_target_module_exists _check_tied_module_exists
_check_target_module_compatiblity _create_and_replace _create_new_module _replace_module
_mark_only_adapters_as_trainable _post_injection_hook _cast_adapter_dtype
""".split()  # noqa: SIM905

SOURCE = """
import peft
from peft import LoraConfig, LoraModel, get_peft_model, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn
"""


def recording(base, log):
    """Return a subclass whose hooks write themselves down and then do what they do."""

    def shown(value):
        return (
            value
            if isinstance(value, (str, bool, int, type(None)))
            else type(value).__name__.replace("AdaptedLayer", "Linear")
        )

    def wrap(name, held):
        function = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held

        def hook(*args, **kwargs):
            said = args if isinstance(held, staticmethod) else args[1:]
            log.append((name, [shown(value) for value in said], {key: shown(value) for key, value in kwargs.items()}))
            return function(*args, **kwargs)

        return type(held)(hook) if isinstance(held, (staticmethod, classmethod)) else hook

    members = {name: wrap(name, inspect.getattr_static(base, name)) for name in HOOKS}
    return type(base)(f"Recording{base.__name__}", (base,), {**members, "__module__": "a_user"})


@pytest.fixture(params=BOTH)
def world(request):
    return run(SOURCE, request.param)


@pytest.fixture
def put(world):
    """Let wrappers use another tuner for LoRA, for as long as the test runs."""
    mapping, key = world.PEFT_TYPE_TO_TUNER_MAPPING, world.PeftType.LORA
    before = mapping[key]
    yield lambda cls: mapping.__setitem__(key, cls)
    mapping[key] = before


def in_both(use):
    return [use(run(SOURCE, root)) for root in BOTH]


def test_order_when_a_tuner_is_constructed_and_given_a_second_adapter():
    def use(world):
        log = []
        model = Net()
        config = world.LoraConfig(target_modules=["first", "2"], modules_to_save=["head"])
        tuner = recording(world.LoraModel, log)(model, config, "default")
        log.append("second")
        tuner.peft_config["x"] = world.LoraConfig(target_modules=["first"])
        del log[-1:]
        tuner.inject_adapter(model, "x")
        # PEFT also looks at what lies inside of full copies, which no pattern may mean
        return [entry for entry in log if not any("head." in str(said) for said in entry[1])]

    theirs, ours = in_both(use)
    assert ours == theirs
    assert {entry[0] for entry in theirs} >= set(HOOKS) - {"_cast_adapter_dtype"}


def test_order_in_a_wrapper():
    def use(world):
        log = []
        mapping, key = world.PEFT_TYPE_TO_TUNER_MAPPING, world.PeftType.LORA
        before = mapping[key]
        mapping[key] = recording(world.LoraModel, log)
        try:
            model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"], bias="lora_only"))
            model.add_adapter("y", world.LoraConfig(target_modules=["2"]))
        finally:
            mapping[key] = before
        return log

    theirs, ours = in_both(use)
    assert ours == theirs


def test_a_tuner_that_overrides_nothing_leaves_it_to_the_engine(monkeypatch):
    from inlay.compat.tuners import injection

    world = run(SOURCE, OURS)
    monkeypatch.setattr(injection.Injection, "run", lambda self: pytest.fail("hooks were called"))
    model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"]))
    assert type(model.base_model) is world.LoraModel


def test_hooks_and_engine_give_the_same_adapter():
    world = run(SOURCE, OURS)

    class Mine(world.LoraModel):
        def _prepare_model(self, peft_config, model):
            return super()._prepare_model(peft_config, model)

    options = {
        "target_modules": ["first", "2"],
        "r": 4,
        "rank_pattern": {"block.2": 2},
        "use_dora": True,
        "bias": "lora_only",
    }
    torch.manual_seed(0)
    by_hooks = Mine(Net(), world.LoraConfig(**options), "default")
    torch.manual_seed(0)
    by_engine = world.LoraModel(Net(), world.LoraConfig(**options), "default")
    assert by_hooks.state_dict().keys() == by_engine.state_dict().keys()
    fill(by_hooks), fill(by_engine)
    torch.testing.assert_close(by_hooks(inputs()), by_engine(inputs()))
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (by_hooks, by_engine)]
    assert flags[0] == flags[1]
    assert torch.tensor(train(by_hooks)).equal(torch.tensor(train(by_engine)))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ("IA3Config", {"target_modules": ["first", "2"], "feedforward_modules": ["2"]}),
        ("LoHaConfig", {"target_modules": ["first", "2"], "r": 3}),
        ("OFTConfig", {"target_modules": ["first", "2"], "oft_block_size": 2}),
        ("VeraConfig", {"target_modules": ["first", "2"], "r": 3}),
        ("FourierFTConfig", {"target_modules": ["first", "2"], "n_frequency": 5}),
    ],
)
def test_hooks_of_every_method_give_what_the_engine_gives(config, targets):
    world = run(SOURCE, OURS)
    made = getattr(world.peft, config)
    tuner = world.PEFT_TYPE_TO_TUNER_MAPPING[made.peft_type]

    class Mine(tuner):
        @staticmethod
        def _check_target_module_exists(config, key):
            return tuner._check_target_module_exists(config, key)

    by_hooks, by_engine = (cls(Net(), made(**targets), "default") for cls in (Mine, tuner))
    assert by_hooks.state_dict().keys() == by_engine.state_dict().keys()
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (by_hooks, by_engine)]
    assert shapes[0] == shapes[1]
    by_hooks.load_state_dict(by_engine.state_dict())
    torch.testing.assert_close(by_hooks(inputs()), by_engine(inputs()))


CHOOSY = '''
class Choosy(LoraModel):
    """Adapts what its own rule says, and no layer twice as wide."""

    @staticmethod
    def _check_target_module_exists(config, key):
        return key.endswith("first") or key.endswith("2")

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if current_key.endswith("2"):
            return
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
'''


def test_what_a_subclass_leaves_out_is_left_out():
    def use(world):
        tuner = world.Choosy(Net(), world.LoraConfig(target_modules=["head"], r=2), "default")
        return sorted(name for name, _ in tuner.named_parameters() if "lora" in name)

    theirs, ours = [use(run(SOURCE + CHOOSY, root)) for root in BOTH]
    assert ours == theirs


MAKER = """
class TwiceLinear(LoraLinear):
    def forward(self, x, *args, **kwargs):
        base = self.base_layer(x)
        return base + 2 * (super().forward(x, *args, **kwargs) - base)


class Maker(LoraModel):
    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if isinstance(target, nn.Linear):
            return TwiceLinear(
                target, adapter_name, config=lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"]
            )
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
"""


def test_layers_that_a_subclass_makes_run():
    def use(world):
        tuner = world.Maker(Net(), world.LoraConfig(target_modules=["first", "2"], r=2), "default")
        fill(tuner)
        first = tuner(inputs())
        losses = torch.tensor(train(tuner))
        tuner.peft_config["b"] = world.LoraConfig(target_modules=["first"], r=3)
        tuner.inject_adapter(tuner.model, "b")
        fill(tuner)
        tuner.set_adapter("b")
        seen = tuner(inputs())
        return first, losses, seen, type(tuner.model.first).__name__

    theirs, ours = [use(run(SOURCE + MAKER, root)) for root in BOTH]
    for a, b in zip(theirs[:3], ours[:3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert ours[3] == theirs[3]


OWN_START = """
class Counting(LoraModel):
    def __init__(self, model, config, adapter_name, low_cpu_mem_usage=False, **kwargs):
        super().__init__(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        self.started = adapter_name

    def _post_injection_hook(self, model, config, adapter_name):
        self.after = (adapter_name, config.r)
"""


def test_a_constructor_of_ones_own_runs_inside_a_wrapper(world):
    text = run(SOURCE + OWN_START, world.peft.__name__)
    mapping, key = text.PEFT_TYPE_TO_TUNER_MAPPING, text.PeftType.LORA
    before = mapping[key]
    mapping[key] = text.Counting
    try:
        model = text.get_peft_model(Net(), text.LoraConfig(target_modules=["first"], r=2), "mine")
    finally:
        mapping[key] = before
    assert type(model.base_model) is text.Counting
    assert model.base_model.started == "mine"
    assert model.base_model.after == ("mine", 2)
    model(inputs())


KEYS = """
class Renaming(LoraModel):
    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        held = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key.replace("lora_A", "left"): value for key, value in held.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        back = {key.replace("left", "lora_A"): value for key, value in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, back)
"""


def test_hooks_of_saving_and_loading_say_what_a_file_holds(tmp_path):
    def use(world):
        mapping, key = world.PEFT_TYPE_TO_TUNER_MAPPING, world.PeftType.LORA
        before = mapping[key]
        mapping[key] = world.Renaming
        try:
            config = world.LoraConfig(target_modules=["first", "2"], r=2, modules_to_save=["head"])
            model = world.get_peft_model(Net(), config)
            fill(model)
            folder = tmp_path / world.peft.__name__
            model.save_pretrained(folder)
            again = world.PeftModel.from_pretrained(Net(), folder, adapter_name="other")
            return sorted(world.peft.get_peft_model_state_dict(model)), model(inputs()), again(inputs())
        finally:
            mapping[key] = before

    theirs, ours = [use(run(SOURCE + KEYS, root)) for root in BOTH]
    assert ours[0] == theirs[0]
    assert any("left" in key for key in ours[0])
    for a, b in zip(theirs[1:], ours[1:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


BANK = '''
class BankModel(LoraModel):
    """Its tensors also hang at the tuner itself."""

    uses_shared_state = True

    def _pre_injection_hook(self, model, config, adapter_name):
        self.bank = nn.ParameterDict({adapter_name: nn.Parameter(nn.init.ones_(__import__("torch").empty(3)))})
'''


def test_tensors_of_the_tuner_itself_are_saved_and_loaded(tmp_path):
    def use(world):
        mapping, key = world.PEFT_TYPE_TO_TUNER_MAPPING, world.PeftType.LORA
        before = mapping[key]
        mapping[key] = world.BankModel
        try:
            model = world.get_peft_model(Net(), world.LoraConfig(target_modules=["first"], r=2))
            fill(model)
            folder = tmp_path / world.peft.__name__
            model.save_pretrained(folder)
            again = world.PeftModel.from_pretrained(Net(), folder, adapter_name="other")
            with pytest.raises(ValueError):
                world.peft.inject_adapter_in_model(world.LoraConfig(target_modules=["first"]), Net())
            keys = sorted(world.peft.get_peft_model_state_dict(model))
            return (
                keys,
                model.base_model.bank["default"],
                again.base_model.bank["other"],
                model.get_nb_trainable_parameters(),
            )
        finally:
            mapping[key] = before

    theirs, ours = [use(run(SOURCE + BANK, root)) for root in BOTH]
    assert ours[0] == theirs[0]
    assert ours[3] == theirs[3]
    for a, b in zip(theirs[1:3], ours[1:3], strict=True):
        torch.testing.assert_close(b, a)
