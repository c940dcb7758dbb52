"""Hot swap beside peft: the model with the new adapter is what peft makes of it when it loads it afresh."""

from __future__ import annotations

import copy
import io
import json
import warnings

import peft
import peft.utils.hotswap as theirs
import pytest
import torch
from hotswap_models import TARGETS, Written, base, close, config, ids, injected, loaded
from torch import nn

import inlay
import inlay.compat.peft.utils.hotswap as ours
from inlay.core.policy import INLAY, PEFT
from inlay.errors import CheckpointMismatchError, InlayError, InlayWarning

NAMES = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


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
    if spoil is not _other_shape:  # peft takes any shape that is larger, and fails when the model runs
        pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
        with pytest.raises(RuntimeError):
            theirs.hotswap_adapter_from_state_dict(pefts, tensors, "default", second.config)


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


# -- prepared for compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=lambda policy: policy.name)
@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"lin": 2}}, {"use_dora": True, "target_modules": ["lin"]}])
def test_preparing_changes_no_output(tmp_path, policy, fields):
    first = Written(tmp_path / "a", **fields)
    for model in (loaded(first, policy), injected(first, policy=policy)):
        expected = model(ids())
        assert ours.prepare_model_for_compiled_hotswap(model, target_rank=8) is None
        close(model(ids()), expected)
        close(model(ids()), first.output)


def test_tensors_are_padded_as_by_peft(tmp_path):
    """Embeddings are padded as well here; peft leaves them as they are."""
    first = Written(tmp_path / "a")
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    theirs.prepare_model_for_compiled_hotswap(pefts, target_rank=8)
    model = loaded(first)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=8)
    mine = model.state_dict()
    for name, value in pefts.state_dict().items():
        if "lora_" in name and "embedding" not in name:
            assert torch.equal(mine[name], value), name
    assert mine["base_model.model.emb.lora_embedding_A.default"].shape == (8, 11)
    for layer, theirs_layer in ((model.base_model.model.lin, pefts.base_model.model.lin),):
        assert isinstance(layer.scaling["default"], torch.Tensor)
        assert layer.scaling["default"] == theirs_layer.scaling["default"]
    assert model.base_model.model.lin.lora_A["default"].out_features == 8
    assert model.base_model.model.lin.lora_B["default"].in_features == 8
    assert model.base_model.model.grouped.lora_B["default"].in_channels == 8
    x = torch.randn(2, 8)
    down, up = model.base_model.model.lin.lora_A["default"], model.base_model.model.lin.lora_B["default"]
    assert up(down(x)).shape == (2, 8)


@pytest.mark.parametrize("second_rank", [1, 2, 4, 8])
def test_swapping_in_a_prepared_model(tmp_path, second_rank):
    targets = ["emb", "conv", "conv1d_hf", "lin"]  # a grouped layer has no rank of 1
    first = Written(tmp_path / "a", target_modules=targets)
    second = Written(tmp_path / "b", seed=4, r=second_rank, lora_alpha=3, target_modules=targets)
    model = loaded(first)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=8)
    addresses = {name: value.data_ptr() for name, value in model.named_parameters()}
    scale = model.base_model.model.lin.scaling["default"]
    for _ in range(2):
        ours.hotswap_adapter(model, second.folder, "default")
        close(model(ids()), second.output)
        ours.hotswap_adapter(model, first.folder, "default")
        close(model(ids()), first.output)
    assert addresses == {name: value.data_ptr() for name, value in model.named_parameters()}
    assert model.base_model.model.lin.scaling["default"] is scale


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_grouped_convolutions(tmp_path, groups, kernel):
    """Every group has a part of A's rank to itself, which must stay where it is when the rank grows."""
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))

    def conv():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 8, kernel, groups=groups)).eval()

    folders, outputs = [], []
    for i, rank in enumerate((4, 8)):
        torch.manual_seed(i + 5)
        settings = {"r": rank, "lora_alpha": 3 + i, "target_modules": ["0"], "init_lora_weights": False}
        pefts = peft.get_peft_model(conv(), peft.LoraConfig(**settings)).eval()
        folders.append(str(tmp_path / str(i)))
        quietly(pefts.save_pretrained, folders[-1])
        outputs.append(pefts(x).detach())
    model = inlay.PeftModel.from_pretrained(conv(), folders[0])
    ours.prepare_model_for_compiled_hotswap(model, target_rank=16)
    close(model(x), outputs[0])
    for i in (1, 0):
        ours.hotswap_adapter(model, folders[i], "default")
        close(model(x), outputs[i])
    with pytest.raises(ValueError, match="groups"):
        ours.prepare_model_for_compiled_hotswap(model, target_rank=18 if groups == 4 else 17)


def test_expert_banks_have_room_too():
    """peft leaves them alone. Experts are the slow axis of A and the fast one of B."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = MixtralExperts(
                MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3, num_experts_per_tok=2)
            )

        def forward(self, x):
            chosen = torch.tensor([[0, 1], [1, 2], [2, 0]])
            return self.experts(x, chosen, torch.full((3, 2), 0.5))

    torch.manual_seed(0)
    bank = Bank()
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]

    def made(rank, alpha):
        settings = {"target_parameters": parameters, "target_modules": [], "init_lora_weights": False}
        return inlay.get_peft_model(copy.deepcopy(bank), inlay.LoraConfig(r=rank, lora_alpha=alpha, **settings)).eval()

    x = torch.randn(3, 8)
    first, second = made(2, 3), made(4, 5)
    expected = first(x).detach(), second(x).detach()
    assert not torch.allclose(*expected, atol=1e-3)
    tensors = inlay.get_peft_model_state_dict(second)
    ours.prepare_model_for_compiled_hotswap(first, target_rank=4)
    close(first(x), expected[0])
    kept = {key: value.clone() for key, value in inlay.get_peft_model_state_dict(first).items()}
    config = first.peft_config["default"]
    ours.hotswap_adapter_from_state_dict(first, tensors, "default", second.peft_config["default"])
    close(first(x), expected[1])
    ours.hotswap_adapter_from_state_dict(first, kept, "default", config)
    close(first(x), expected[0])


def test_configs_are_told(tmp_path):
    first = Written(tmp_path / "a", rank_pattern={"lin": 2})
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    model = loaded(first)
    for module, held in ((ours, model), (theirs, pefts)):
        module.prepare_model_for_compiled_hotswap(held, target_rank=8, config=held.peft_config)
        assert held.peft_config["default"].r == 8
        assert held.peft_config["default"].rank_pattern == {"lin": 8}
    single = config()
    quietly(ours.prepare_model_for_compiled_hotswap, model, target_rank=8, config=single)
    assert single.r == 8
    # what is saved is the adapter, not the room for it; peft's file gives another output
    model.save_pretrained(tmp_path / "mine")
    pefts.save_pretrained(tmp_path / "pefts")
    close(quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "mine")(ids()), first.output)
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(RuntimeError):
        quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "pefts")


def test_prepared_models_save_and_load(tmp_path):
    first = Written(tmp_path / "a")
    model = loaded(first)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "inlay.json").read_text())["adapters"][0]["options"] == {}
    close(quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "saved")(ids()), first.output)
    second = Written(tmp_path / "b", seed=4)
    inlay.set_peft_model_state_dict(model, second.tensors)
    close(model(ids()), second.output)
    model.base_model.model.lin.scaling["default"] = 3.0
    model.save_pretrained(tmp_path / "scaled")
    close(inlay.PeftModel.from_pretrained(base(), tmp_path / "scaled", adapters="all")(ids()), model(ids()))


def test_scales_that_are_tensors_do_what_numbers_do(tmp_path):
    first = Written(tmp_path / "a", target_modules=["emb", "conv", "conv1d_hf", "lin"])
    plain, prepared = loaded(first), loaded(first)
    ours.prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    for model in (plain, prepared):
        layer = model.base_model.model.lin
        layer.scale_layer(3.0)
        layer.unscale_layer(2.0)
        model.base_model.model.conv.set_scale("default", 0.5)
        model.base_model.model.conv1d_hf.scaling["default"] *= 2
    close(prepared(ids()), plain(ids()))
    assert isinstance(prepared.base_model.model.lin.scaling["default"], torch.Tensor)
    held = prepared.base_model.model.lin.scaling["default"]
    prepared.base_model.model.lin.scaling["default"] = held * 2
    prepared.base_model.model.lin.scaling["default"] = held  # a reference that was kept is still the old number
    close(prepared(ids()), plain(ids()))
    before = frozen(prepared)
    prepared.merge_adapter()
    close(prepared(ids()), plain(ids()))
    prepared.unmerge_adapter()
    unchanged(prepared, before)
    close(copy.deepcopy(prepared)(ids()), plain(ids()))
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    close(torch.load(buffer, weights_only=False)(ids()), plain(ids()))
    close(copy.deepcopy(prepared).double()(ids()), plain.double()(ids()))
    close(copy.deepcopy(prepared).merge_and_unload()(ids()), plain.float()(ids()))
    half = copy.deepcopy(prepared).to(torch.bfloat16)
    assert half(ids()).dtype == torch.bfloat16
    assert half.base_model.model.lin.scaling["default"].dtype == torch.float32
    prepared(ids()).sum().backward()
    assert plain.float().base_model.model.lin.scaling["default"] == prepared.base_model.model.lin.scaling["default"]


def test_training_leaves_the_room_empty(tmp_path):
    first = Written(tmp_path / "a")
    model = loaded(first).train()
    model.set_adapter("default")
    ours.prepare_model_for_compiled_hotswap(model, target_rank=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids()).square().sum().backward()
    optimizer.step()
    layer = model.base_model.model.lin
    assert not layer.lora_A["default"].weight[4:].any()
    assert not layer.lora_B["default"].weight[:, 4:].any()
    assert layer.lora_A["default"].weight[:4].any()


def test_more_rank_than_there_is_room_for(tmp_path):
    first, second = Written(tmp_path / "a"), Written(tmp_path / "b", seed=4, r=16)
    strict, lenient = loaded(first), loaded(first, PEFT)
    for model in (strict, lenient):
        ours.prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = frozen(strict)
    with pytest.raises(CheckpointMismatchError, match="room"):
        ours.hotswap_adapter(strict, second.folder, "default")
    unchanged(strict, before)
    ours.hotswap_adapter(lenient, second.folder, "default")  # as peft: right, and compiled anew where it is compiled
    close(lenient(ids()), second.output)


@pytest.mark.parametrize("arguments", [{"target_rank": 2}, {"target_rank": 7}, {"check_compiled": "whatever"}], ids=str)
def test_wrong_arguments(tmp_path, arguments):
    first = Written(tmp_path / "a")
    model = loaded(first)
    before = frozen(model)
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    with pytest.raises(ValueError):
        ours.prepare_model_for_compiled_hotswap(model, **arguments)
    unchanged(model, before)
    assert isinstance(model.base_model.model.lin.scaling["default"], float)
    if "check_compiled" in arguments:
        pefts, model = torch.compile(pefts, backend="eager"), torch.compile(model, backend="eager")
        with pytest.raises(ValueError):
            ours.prepare_model_for_compiled_hotswap(model, **arguments)
    with pytest.raises(ValueError):
        theirs.prepare_model_for_compiled_hotswap(pefts, **arguments)


def test_a_model_without_adapters():
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="adapter"):
            module.prepare_model_for_compiled_hotswap(base(), target_rank=8)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_already(tmp_path, in_place):
    first = Written(tmp_path / "a")
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    for module, model, warning in ((ours, loaded(first), InlayWarning), (theirs, pefts, UserWarning)):
        if in_place:
            model.compile(backend="eager")
        else:
            model = torch.compile(model, backend="eager")
        with pytest.raises(ValueError, match="compil"):
            module.prepare_model_for_compiled_hotswap(model, target_rank=8)
        with pytest.warns(warning, match="compiled"):
            module.prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="warn")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="ignore")
