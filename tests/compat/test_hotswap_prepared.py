"""Models that are prepared for being compiled: padded tensors, scales that are tensors, what is saved."""

from __future__ import annotations

import copy
import io
import json
import warnings

import peft
import peft.utils.hotswap as theirs
import pytest
import torch
from hotswap_models import Written, base, close, config, frozen, ids, injected, loaded, quietly, unchanged
from torch import nn

import inlay
import inlay.compat.peft.utils.hotswap as ours
from inlay.core.policy import INLAY, PEFT
from inlay.errors import CheckpointMismatchError, InlayWarning


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
    # what is saved is the adapter, not the room for it; peft's file does not fit, because embeddings have no room there
    model.save_pretrained(tmp_path / "mine")
    pefts.save_pretrained(tmp_path / "pefts")
    close(quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "mine")(ids()), first.output)
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(RuntimeError):
        quietly(peft.PeftModel.from_pretrained, base(), tmp_path / "pefts")


@pytest.mark.parametrize("told", [True, False])
def test_what_peft_saves_of_a_prepared_model(tmp_path, told):
    """The padded tensors: with a configuration that was told of it the scale is wrong, with another nothing loads."""
    first = Written(tmp_path / "a", target_modules=["lin"])
    pefts = quietly(peft.PeftModel.from_pretrained, base(), first.folder)
    model = loaded(first)
    for module, held in ((theirs, pefts), (ours, model)):
        module.prepare_model_for_compiled_hotswap(held, target_rank=8, config=held.peft_config if told else None)
        held.save_pretrained(tmp_path / module.__name__)
    close(quietly(peft.PeftModel.from_pretrained, base(), tmp_path / ours.__name__)(ids()), first.output)
    if told:
        again = quietly(peft.PeftModel.from_pretrained, base(), tmp_path / theirs.__name__)
        assert not torch.allclose(again(ids()), first.output, atol=1e-3)
    else:
        with pytest.raises(RuntimeError):
            quietly(peft.PeftModel.from_pretrained, base(), tmp_path / theirs.__name__)


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
