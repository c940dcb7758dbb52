"""Hot swap beside peft: the model with the new adapter is what peft makes of it when it loads it afresh."""

from __future__ import annotations

import peft
import peft.utils.hotswap as theirs
import pytest
import torch
from hotswap_models import TARGETS, Written, base, close, frozen, ids, injected, loaded, quietly, unchanged

import inlay
import inlay.compat.peft.utils.hotswap as ours
from inlay.core.policy import INLAY, PEFT
from inlay.errors import CheckpointMismatchError, InlayError

NAMES = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    import inspect

    mine, pefts = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in pefts.values()]


def test_keys_to_check():
    as_names = [{method.value: fields for method, fields in m.CONFIG_KEYS_TO_CHECK.items()} for m in (ours, theirs)]
    assert as_names[0] == as_names[1]


# -- what a swap gives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=lambda policy: policy.name)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 11), (2, 3), (8, 5)])
def test_other_rank_and_alpha(tmp_path, policy, rank, alpha):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=rank, lora_alpha=alpha)
    model = loaded(first, policy)
    close(model(ids()), first.output)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), second.output)
    ours.hotswap_adapter(model, first.folder, "default", torch_device="cpu")
    close(model(ids()), first.output)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 11), (2, 3), (8, 5)])
def test_same_as_pefts_own_swap(tmp_path, rank, alpha):
    """On every layer but embeddings, whose scale peft looks for in the module above and does not find."""
    targets = [name for name in TARGETS if name != "emb"]
    first = Written(tmp_path / "a", target_modules=targets)
    second = Written(tmp_path / "b", seed=4, r=rank, lora_alpha=alpha, target_modules=targets)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), pefts(ids()))
    pefts = quietly(peft.PeftModel.from_pretrained, base(), Written(tmp_path / "c").folder)
    with pytest.raises(AttributeError):
        theirs.hotswap_adapter(pefts, Written(tmp_path / "d", seed=4).folder, "default", torch_device="cpu")


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("inserted", [True, False])
def test_a_bare_model(tmp_path, name, inserted):
    """As diffusers does it: keys of the bare model, with the adapter's name in them."""
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=2, lora_alpha=3)
    model = injected(first, name)
    tensors = second.inserted(name, prefix="") if inserted else second.tensors
    given = dict(tensors)
    ours.hotswap_adapter_from_state_dict(model, tensors, name, second.ours)
    close(model(ids()), second.output)
    assert tensors.keys() == given.keys()
    assert all(tensors[key] is given[key] for key in given)
    assert model.peft_config[name].r == 2


def test_parameters_stay_the_same_objects(tmp_path):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=8)
    model = loaded(first)
    before = dict(model.named_parameters())
    ours.hotswap_adapter(model, second.folder, "default")
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(after[name].requires_grad == before[name].requires_grad for name in before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_that_the_new_adapter_lacks(tmp_path, use_dora):
    targets = [name for name in TARGETS if name not in ("emb", "grouped")]
    first = Written(tmp_path / "a", use_dora=use_dora, target_modules=targets)
    second = Written(tmp_path / "b", seed=4, target_modules=["lin"], lora_alpha=7, use_dora=use_dora)
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), second.output)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    if use_dora:  # peft looks for the magnitudes under the name that they have on disk
        with pytest.raises(KeyError, match="lora_magnitude_vector"):
            theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")
    else:
        theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")
        close(pefts(ids()), second.output)


def test_patterns(tmp_path):
    """peft holds patterns against whole parameter names, so none of them ever matches."""
    fields = {"rank_pattern": {"lin": 2, "conv1d_hf": 8}, "target_modules": ["conv1d_hf", "lin"]}
    first = Written(tmp_path / "a", target_modules=["conv1d_hf", "lin"])
    second = Written(tmp_path / "b", seed=4, lora_alpha=12, **fields)
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), second.output)
    layer = model.base_model.model.lin
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (2, 12, 6.0)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")
    assert not torch.allclose(pefts(ids()), second.output, atol=1e-3)
    assert (model.peft_config["default"].lora_alpha, pefts.peft_config["default"].lora_alpha) == (12, 4)


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"lora_bias": True, "target_modules": ["lin", "conv"]}])
def test_variants(tmp_path, fields):
    first = Written(tmp_path / "a", **fields)
    second = Written(tmp_path / "b", seed=4, r=2, lora_alpha=9, **fields)
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), second.output)


@pytest.mark.parametrize("with_head", [True, False])
def test_full_copies(tmp_path, with_head):
    """peft's swap fails with a `KeyError` on such an adapter; one without a copy gets the base's own module."""
    first = Written(tmp_path / "a", modules_to_save=["head"])
    second = Written(tmp_path / "b", seed=4, lora_alpha=7, modules_to_save=["head"] if with_head else None)
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    close(model(ids()), second.output)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    if with_head:
        with pytest.raises(KeyError):
            theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")


def test_what_is_saved_after_a_swap_is_the_new_adapter(tmp_path):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=2, lora_alpha=3)
    model = loaded(first)
    ours.hotswap_adapter(model, second.folder, "default")
    model.save_pretrained(tmp_path / "saved")
    close(quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "saved")(ids()), second.output)
    close(inlay.PeftModel.from_pretrained(base(), tmp_path / "saved")(ids()), second.output)
    shapes = {key: value.shape for key, value in inlay.get_peft_model_state_dict(model).items()}
    assert shapes == {key: value.shape for key, value in second.tensors.items()}
    assert first.ours.r == 4
    assert model.peft_config["default"].r == 2


# -- what does not fit ------------------------------------------------------------------------------------------------


def _further(tensors):
    return {**tensors, "base_model.model.head.lora_A.default.weight": torch.zeros(4, 8)}


def _other_shape(tensors):
    key = "base_model.model.lin.lora_B.default.weight"
    return {**tensors, key: torch.zeros(9, 4)}


def _other_layer_first(tensors):
    return {"base_model.model.nothing.lora_A.default.weight": torch.ones(4, 8)} | tensors


@pytest.mark.parametrize("spoil", [_further, _other_shape, _other_layer_first])
def test_nothing_is_written_if_anything_does_not_fit(tmp_path, spoil):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, lora_alpha=9)
    tensors = spoil(second.inserted())
    model = loaded(first)
    before = frozen(model)
    with pytest.raises(RuntimeError) as caught:
        ours.hotswap_adapter_from_state_dict(model, tensors, "default", second.ours)
    assert isinstance(caught.value, InlayError)
    unchanged(model, before)
    close(model(ids()), first.output)
    assert model.peft_config["default"].lora_alpha == 4
    if spoil is not _other_shape:
        pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
        with pytest.raises(RuntimeError):
            theirs.hotswap_adapter_from_state_dict(pefts, tensors, "default", second.config)


def test_peft_takes_larger_tensors_and_fails_when_the_model_runs(tmp_path):
    first, second = (Written(tmp_path / name, seed=seed, target_modules=["lin"]) for name, seed in (("a", 1), ("b", 2)))
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    theirs.hotswap_adapter_from_state_dict(pefts, _other_shape(second.inserted()), "default", second.config)
    with pytest.raises(RuntimeError):
        pefts(ids())


def test_a_config_that_says_less_than_the_tensors(tmp_path):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=4)
    lying = second.ours
    lying.r = 2
    with pytest.raises(CheckpointMismatchError, match="another shape"):
        ours.hotswap_adapter_from_state_dict(loaded(first), second.inserted(), "default", lying)


def test_an_unknown_adapter(tmp_path):
    first = Written(tmp_path / "a")
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    for module, model in ((ours, loaded(first)), (theirs, pefts)):
        with pytest.raises(RuntimeError):
            module.hotswap_adapter_from_state_dict(model, first.inserted("nobody"), "nobody", first.config)


def test_a_merged_adapter(tmp_path):
    first, second = Written(tmp_path / "a", target_modules=["lin"]), Written(tmp_path / "b", target_modules=["lin"])
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    for module, model, written in ((ours, loaded(first), second.ours), (theirs, pefts, second.config)):
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            module.hotswap_adapter_from_state_dict(model, second.inserted(), "default", written)


PAIRS = {
    "equal": (("LoraConfig", {}), ("LoraConfig", {})),
    "rank and alpha": (("LoraConfig", {"r": 4}), ("LoraConfig", {"r": 8, "lora_alpha": 3})),
    "rslora": (("LoraConfig", {"use_rslora": True}), ("LoraConfig", {})),
    "dropout": (("LoraConfig", {"lora_dropout": 0.1}), ("LoraConfig", {})),
    "dora": (("LoraConfig", {"use_dora": True}), ("LoraConfig", {})),
    "alpha pattern": (("LoraConfig", {"alpha_pattern": {"lin": 2}}), ("LoraConfig", {})),
    "methods": (("LoraConfig", {}), ("IA3Config", {})),
    "not for this one": (("IA3Config", {}), ("IA3Config", {})),
    "other method first": (("LoHaConfig", {}), ("LoraConfig", {})),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_configs_that_may_be_swapped(pair):
    outcomes = []
    for module, namespace in ((ours, inlay), (theirs, peft)):
        first, second = (getattr(namespace, name)(**fields) for name, fields in pair)
        try:
            module.check_hotswap_configs_compatible(first, second)
            outcomes.append(None)
        except ValueError:
            outcomes.append(ValueError)
    assert outcomes[0] == outcomes[1]


def test_configs_are_compared_before_anything_is_loaded(tmp_path):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, use_rslora=True)
    model = loaded(first)
    before = frozen(model)
    with pytest.raises(ValueError, match="use_rslora"):
        ours.hotswap_adapter(model, second.folder, "default")
    unchanged(model, before)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    with pytest.raises(ValueError, match="use_rslora"):
        theirs.hotswap_adapter(pefts, second.folder, "default", torch_device="cpu")
