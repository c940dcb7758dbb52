"""What injection must do, at full size; the numbers are those of the list of claims."""

from __future__ import annotations

import full_size
import pytest
import tiny_models
import torch
from cells import METHODS, family
from torch import nn

import inlay
from inlay import LoraConfig, get_peft_model
from inlay.core.layer import AdaptedLayer
from inlay.core.registry import BUILTIN_METHODS
from inlay.errors import TargetError, UnsupportedError


def paths(model):
    return [layer.name for layer in inlay.get_layer_status(model)]


def test_a_layer_is_replaced_where_it_stood():
    """Claim 1: same path, same interface, the original object and tensor inside, the rest of the tree unchanged."""
    base = full_size.gpt2()
    before = dict(base.named_modules())
    layer = base.transformer.h[3].attn.c_attn
    weight, pointer, x = layer.weight, layer.weight.data_ptr(), torch.empty(2, 5, 768, device="meta")
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"]))
    adapted = base.transformer.h[3].attn.c_attn
    assert model.get_base_model() is base
    assert adapted is not layer
    assert adapted.base_layer is layer
    assert adapted.weight is adapted.base_layer.weight is weight
    assert weight.data_ptr() == pointer
    assert adapted.bias is layer.bias
    assert adapted.nf == layer.nf
    assert adapted(x).shape == layer(x).shape == (2, 5, 2304)
    after = dict(base.named_modules())
    assert all(after[name] is module for name, module in before.items() if not name.endswith("c_attn"))
    added = after.keys() - before.keys()
    assert all(".c_attn." in name for name in added)
    assert model.base_model.model.transformer.h[3].attn.c_attn is adapted


def test_identify_then_create_then_replace(monkeypatch):
    """Claim 2: targets are known before anything is created, and replacing is setting an attribute of the parent."""
    events = []
    base = tiny_models.gpt2()
    parent = base.transformer.h[0].attn
    set_on_parent = nn.Module.__setattr__

    def watched(self, name, value):
        if self is parent:
            events.append(("replace", name, type(value).__name__))
        set_on_parent(self, name, value)

    created = AdaptedLayer.__init__

    def watched_creation(self, module, *args, **kwargs):
        if module is parent.c_attn:
            events.append(("create",))
        created(self, module, *args, **kwargs)

    plan = inlay.plan(base, LoraConfig(target_modules=["c_attn"]))
    events.append(("identified", *[placement.site.name for placement in plan.placements]))
    monkeypatch.setattr(nn.Module, "__setattr__", watched)
    monkeypatch.setattr(AdaptedLayer, "__init__", watched_creation)
    inlay.inject(plan)
    assert events[0] == ("identified", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    assert [event for event in events[1:] if event[0] == "create" or event[1] == "c_attn"] == [
        ("create",),
        ("replace", "c_attn", type(parent.c_attn).__name__),
    ]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["c_attn"], 12),
        (["attn.c_proj"], 12),
        (["c_proj"], 24),
        (["c_attn", "c_proj"], 36),
        (r".*\.h\.[0-3]\.attn\.c_attn", 4),
        (r"transformer\.h\.1\.attn", None),
        ("all-linear", 48),
        (None, 12),
        (["attn"], None),
        (["_attn"], None),
    ],
    ids=str,
)
def test_targets(targets, count):
    """Claim 3: names and dotted suffixes, a whole-match expression, all-linear, or the family's defaults."""
    config = LoraConfig(target_modules=targets)
    if count is None:
        with pytest.raises(TargetError):
            inlay.plan(full_size.gpt2(), config)
    else:
        assert len(inlay.plan(full_size.gpt2(), config).placements) == count


def test_a_suffix_is_never_a_bare_substring():
    """Claim 3: ``k`` does not match ``attn_k``; a pattern that matches nothing names the nearest."""
    net = nn.ModuleDict({"attn_k": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    assert [p.place.path for p in inlay.plan(net, LoraConfig(target_modules=["k"])).placements] == ["k"]
    with pytest.raises(TargetError, match="attn_k"):
        inlay.plan(net, LoraConfig(target_modules=["k", "attn_kk"]))


def test_all_linear_leaves_the_head_alone():
    """Claim 3."""
    model = get_peft_model(
        full_size.bert("BertForSequenceClassification"), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    )
    adapted = [name for name in paths(model) if not name.endswith("classifier")]
    assert len(adapted) == 12 * 6 + 1  # query, key, value, three dense layers a block, and the pooler


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"transformer.h.1": 3}, ["transformer.h.1.attn.c_attn"]),  # a whole dotted prefix: never h.10 or h.11
        ({"h.1.attn.c_attn": 3}, ["transformer.h.1.attn.c_attn"]),
        ({r".*\.h\.1\d\..*": 3}, ["transformer.h.10.attn.c_attn", "transformer.h.11.attn.c_attn"]),
        ({"transformer.h.7.attn.c_attn": 3}, ["transformer.h.7.attn.c_attn"]),
        ({r"^transformer\.h\.1": 3}, ["transformer.h.1.attn.c_attn"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_rank_and_alpha_of_single_layers(field, pattern, expected):
    """Claim 3: a pattern key is a whole path, a dotted suffix, a whole-match expression or a whole dotted prefix."""
    plan = inlay.plan(full_size.gpt2(), LoraConfig(target_modules=["c_attn"], **{field: pattern}))
    option = "r" if field == "rank_pattern" else "lora_alpha"
    assert {p.site.name for p in plan.placements if p.options[option] == 3} == set(expected)


def test_adapters_live_where_their_base_weight_lives():
    """Claim 4: as a device map splits the model (the meta device stands for a second one)."""
    base = tiny_models.gpt2()
    base.transformer.h[1].to("meta")
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn", "c_proj"]))
    devices = {name: p.device.type for name, p in model.named_parameters() if "lora_" in name}
    assert {device for name, device in devices.items() if ".h.0." in name} == {"cpu"}
    assert {device for name, device in devices.items() if ".h.1." in name} == {"meta"}


def test_prompt_methods_are_refused_everything_else_is_injected():
    """Claim 5: ``inject_adapter_in_model`` returns the bare model."""
    from inlay.config import PromptLearningConfig

    with pytest.raises(UnsupportedError):
        inlay.inject_adapter_in_model(PromptLearningConfig(peft_type="PROMPT_TUNING"), tiny_models.gpt2())
    configs = [
        inlay.LoraConfig(),
        inlay.LoraConfig(use_dora=True),
        inlay.IA3Config(),
        inlay.LoHaConfig(),
        inlay.OFTConfig(oft_block_size=8),
        inlay.VeraConfig(r=4),
        inlay.FourierFTConfig(n_frequency=10),
        inlay.LNTuningConfig(),
        inlay.TrainableTokensConfig(token_indices=[1, 2], target_modules=["wte"]),
    ]
    usual = {config.peft_type.value for config in configs}
    for name, make in METHODS.items():  # the others as the cells have them
        if family(name) not in (*usual, "DORA"):
            configs.append(make({"target_modules": ["c_attn"]}))
            usual.add(family(name))
    assert usual == set(BUILTIN_METHODS)  # others may have brought more
    for config in configs:
        base = tiny_models.gpt2()
        assert inlay.inject_adapter_in_model(config, base) is base
        assert list(base.peft_config) == ["default"]
        base(tiny_models.tokens(), labels=tiny_models.tokens()).loss.backward()
        assert any(p.grad is not None for p in base.parameters())


def test_nothing_is_wrapped_twice():
    """Claim 6: a layer with adapters gets another one added."""
    model = get_peft_model(full_size.gpt2(), LoraConfig(target_modules=["c_attn"]))
    layer = model.transformer.h[0].attn.c_attn
    model.add_adapter("b", LoraConfig(target_modules=["c_attn", "c_fc"]))
    assert model.transformer.h[0].attn.c_attn is layer
    assert not isinstance(layer.base_layer, AdaptedLayer)
    assert set(layer.lora_A) == {"default", "b"}
    assert len(paths(model)) == 24


def test_unload_gives_back_the_original_modules():
    """Claim 7: the same objects, bitwise the same weights, after training."""
    base = full_size.gpt2(meta=False)
    modules = {name: id(module) for name, module in base.named_modules()}
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn", "c_proj"]))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.randint(0, 50257, (1, 8))
    model(tokens, labels=tokens).loss.backward()
    optimiser.step()
    assert model.unload() is base
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
