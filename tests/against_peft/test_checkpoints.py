"""Law L4, second half: PEFT reads what Inlay writes and the other way round, with the same keys and outputs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from rotating_methods import SAVED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from structured_methods import NOT_IN_MEMORY
from structured_methods import SAVED as STRUCTURED
from torch import Tensor, nn
from trained_tables import SAVED_TRAINED
from twins import ours_of
from variant_tables import SAVED_VARIANTS

import inlay
from inlay.checkpoint import adapter_slots, get_peft_model_state_dict, save_adapters, set_peft_model_state_dict

WEIGHTS = "adapter_model.safetensors"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btf,eof->bto", torch.tanh(torch.einsum("bti,eoi->bto", x, self.up)), self.down)


class Net(nn.Module):
    """One of everything that can be in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(torch.tanh(self.lin(self.emb(x)))))
        x = self.experts(self.attention(x, x, x, need_weights=False)[0])
        x = self.conv(x.unsqueeze(1)).mean((1, 2))
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.tensor([[1, 4, 2, 0], [4, 9, 1, 7]])

Make = Callable[[], Any]


def lora(**fields: Any) -> Make:
    return lambda: peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["lin"], **fields})


CASES: dict[str, Make] = {
    "lora": lora(target_modules=["lin", "wide"], rank_pattern={"wide": 3}),
    "rslora": lora(use_rslora=True),
    "lora_conv": lora(target_modules=["conv"]),
    "lora_embedding": lora(target_modules=["emb"]),
    "lora_attention": lora(target_modules=["attention"]),
    "lora_experts": lora(target_modules=[], target_parameters=["experts.up", "experts.down"]),
    "lora_parameter": lora(target_parameters=["wide.weight"]),
    "lora_bias": lora(lora_bias=True),
    "bias_all": lora(bias="all"),
    "bias_own": lora(bias="lora_only", target_modules=["lin", "wide", "conv"]),
    "copy": lora(modules_to_save=["head"]),
    "copy_and_bias": lora(modules_to_save=["head"], bias="all"),
    "copy_of_embedding": lora(modules_to_save=["emb", "norm"]),
    "token_rows": lora(trainable_token_indices={"emb": [1, 4]}),
    "dora": lora(use_dora=True, target_modules=["lin", "conv", "emb"]),
    "ia3": lambda: peft.IA3Config(target_modules=["lin", "wide", "conv"], feedforward_modules=["wide"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["lin", "conv"], use_effective_conv2d=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["lin", "wide"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["lin", "wide"]),
    "vera_regenerated": lambda: peft.VeraConfig(r=3, target_modules=["lin", "wide"], save_projection=False),
    "pvera": lambda: peft.PveraConfig(r=3, target_modules=["lin", "wide"]),
    "pvera_regenerated": lambda: peft.PveraConfig(r=3, target_modules=["lin", "wide"], save_projection=False),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["lin", "wide"]),
    "randlora_regenerated": lambda: peft.RandLoraConfig(
        r=3, randlora_alpha=6, target_modules=["lin", "wide"], save_projection=False
    ),
    "vblora": lambda: peft.VBLoRAConfig(num_vectors=7, vector_length=4, target_modules=["lin", "wide"]),
    "vblora_packed": lambda: peft.VBLoRAConfig(
        num_vectors=7, vector_length=4, topk=3, target_modules=["lin", "wide"], save_only_topk_weights=True
    ),
    "unilora": lambda: peft.UniLoraConfig(theta_d_length=20, target_modules=["lin", "wide"]),
    "unilora_indices": lambda: peft.UniLoraConfig(
        theta_d_length=20, target_modules=["lin", "wide"], save_indices=True, bias="all"
    ),
    "tinylora": lambda: peft.TinyLoraConfig(u=4, target_modules=["emb", "lin", "wide"], weight_tying=0.5),
    "tinylora_regenerated": lambda: peft.TinyLoraConfig(u=4, target_modules=["lin", "wide"], save_projection=False),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=6, target_modules=["lin", "wide"]),
    **SAVED,
    **STRUCTURED,
    **SAVED_TRAINED,
    **SAVED_VARIANTS,
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 4], target_modules=["emb"]),
}
# PEFT adds the update of an attention layer's out_proj twice; tests/core compares ours with written weights.
OTHER_OUTPUTS = {"lora_attention"}
# PEFT's bias="all" takes any name that ends in "bias", so it writes the copy's biases a second time, under names with
# the adapter's own inside.
WRITTEN_TWICE = {f"base_model.model.head.modules_to_save.default.{i}.bias" for i in (0, 1, 2)}
# PEFT writes RandLoRA's bases a second time for each layer; docs/differences.md.
WRITTEN_BY_LAYER = {f"base_model.model.{layer}.randlora_{base}" for layer in ("lin", "wide") for base in "AB"}
QUIET = pytest.mark.filterwarnings("ignore:.*save_projection:UserWarning", "ignore:.*PRNG:UserWarning")


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


def theirs(case: str) -> Any:
    return peft.get_peft_model(net(), CASES[case]()).eval()


def ours(case: str) -> Any:
    return inlay.get_peft_model(net(), ours_of(CASES[case]())).eval()


def shaken(model: nn.Module) -> nn.Module:
    """Move everything that trains, and the statistics of trained copies, off the initial values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name:
                buffer.add_(3)
    return model


def same_output(case: str, first: nn.Module, second: nn.Module) -> None:
    if case not in OTHER_OUTPUTS:
        near = 1e-4 if case.startswith("frod") else 2e-6  # PEFT makes the weight anew from its factors
        torch.testing.assert_close(first(X), second(X), rtol=near, atol=near)


def same_value(found: Tensor, expected: Tensor, key: str) -> bool:
    """Equal, but for weights that became logits and weights again."""
    return torch.allclose(found, expected, atol=1e-6) if "topk_weights" in key else torch.equal(found, expected)


@QUIET
def test_the_same_keys_shapes_and_dtypes(case):
    expected = peft.get_peft_model_state_dict(theirs(case))
    found = get_peft_model_state_dict(ours(case))
    extra = WRITTEN_TWICE if case == "copy_and_bias" else WRITTEN_BY_LAYER if case == "randlora" else set()
    assert set(found) == set(expected) - extra
    for key, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key


@QUIET
def test_the_same_memory_names(case):
    """What a state dict of the whole model is asked for."""
    known = theirs(case).state_dict()
    for target in adapter_slots(ours(case)).values():
        assert target.memory in known or any(name in target.memory for name in NOT_IN_MEMORY)


@QUIET
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_peft_reads_ours(case, safe, tmp_path):
    mine = shaken(ours(case))
    mine.save_pretrained(tmp_path, safe_serialization=safe)
    with warnings.catch_warnings():
        # PEFT misses the copies for each layer, which are the one for all
        warnings.filterwarnings("ignore" if case == "randlora" else "error", message=".*missing")
        read = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    same_output(case, read, mine)
    assert not torch.allclose(read(X), net()(X), atol=1e-3)
    found = peft.get_peft_model_state_dict(read)
    for key, tensor in get_peft_model_state_dict(mine).items():
        assert same_value(found[key], tensor, key), key


@QUIET
@pytest.mark.parametrize("low_memory", [False, True], ids=["in_place", "assigned"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_we_read_theirs(case, safe, low_memory, tmp_path):
    them = shaken(theirs(case))
    them.save_pretrained(str(tmp_path), safe_serialization=safe)
    read = inlay.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_memory)
    same_output(case, read, them)
    found = get_peft_model_state_dict(read)
    for key, tensor in peft.get_peft_model_state_dict(them).items():
        if key not in WRITTEN_TWICE | WRITTEN_BY_LAYER:
            assert same_value(found[key], tensor, key), key


@QUIET
def test_bare_models(case):
    """On a bare model PEFT's keys have no prefix, and ``set_`` takes both forms. It refuses shared tensors there."""
    if case.startswith(("vera", "pvera", "vblora", "unilora", "tinylora", "frod")):
        pytest.skip("PEFT injects no shared tensors into a bare model")
    them = peft.inject_adapter_in_model(CASES[case](), net())
    mine = inlay.inject_adapter_in_model(ours_of(CASES[case]()), net())
    shaken(them)
    values = peft.get_peft_model_state_dict(them)
    for prefix in ("", "base_model.model."):
        set_peft_model_state_dict(mine, {f"{prefix}{key}": value for key, value in values.items()})
        found = get_peft_model_state_dict(mine)
        if case == "randlora":  # PEFT has no copy at the root here
            values |= {f"base_model.randlora_{base}": values[f"lin.randlora_{base}"] for base in "AB"}
        twice = WRITTEN_TWICE | WRITTEN_BY_LAYER
        assert set(found) == {key for key in values if f"base_model.model.{key}" not in twice}
        assert all(torch.equal(found[key], values[key]) for key in found)
    same_output(case, mine.eval(), them.eval())


def test_several_adapters(tmp_path):
    """PEFT reads each folder; we read PEFT's folders."""
    base = ours("lora")
    base.add_adapter("other", ours_of(CASES["dora"]()))
    shaken(base)
    save_adapters(base, tmp_path / "ours")
    base.set_adapter("other")
    read = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours" / "other")).eval()
    torch.testing.assert_close(read(X), base.eval()(X), rtol=2e-6, atol=2e-6)

    them = theirs("lora")
    them.add_adapter("other", CASES["dora"]())
    them.set_adapter("other")
    shaken(them).save_pretrained(str(tmp_path / "theirs"))
    read = inlay.PeftModel.from_pretrained(net(), tmp_path / "theirs", subfolder="other")
    torch.testing.assert_close(read(X), them.eval()(X), rtol=2e-6, atol=2e-6)


def test_the_same_folder(tmp_path):
    """Files, metadata, and every field of the configuration."""
    theirs("lora").save_pretrained(str(tmp_path / "theirs"))
    ours("lora").save_pretrained(tmp_path / "ours")
    expected = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == expected | {"inlay.json"}
    read = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in read:
        config["target_modules"] = sorted(config["target_modules"])
    assert read[0] == read[1]
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as mine, safe_open(tmp_path / "theirs" / WEIGHTS, "pt") as them:
        assert mine.metadata() == them.metadata() == {"format": "pt"}


def test_report_r2_peft_saves_nothing_and_we_everything(tmp_path):
    """A second adapter named like a module of the base model (peft#3584); docs/differences.md."""
    them, mine = theirs("lora"), ours("lora")
    them.add_adapter("lin", CASES["lora"]())
    mine.add_adapter("lin", ours_of(CASES["lora"]()))
    complete = len(peft.get_peft_model_state_dict(theirs("lora")))
    assert len(peft.get_peft_model_state_dict(them)) < complete
    assert len(get_peft_model_state_dict(mine)) == complete


def test_report_r1_peft_drops_keys_in_silence_and_we_do_not(tmp_path):
    """Keys of a layer that is not there, or not targeted; docs/differences.md."""
    ours("lora").save_pretrained(tmp_path)
    values = load_file(tmp_path / WEIGHTS)
    extra = "base_model.model.no_such_layer.lora_A.weight"
    save_file({**values, extra: torch.zeros(2, 8)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft.PeftModel.from_pretrained(net(), str(tmp_path))
    base = net()
    with pytest.raises(RuntimeError, match="no_such_layer"):
        inlay.PeftModel.from_pretrained(base, tmp_path)
    assert [type(module) for module in base.modules()] == [type(module) for module in net().modules()]


def llama(tied: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


TIED = {
    "adapted": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "token_rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning", "ignore:.*embedding:UserWarning")
@pytest.mark.parametrize("embeddings", [False, True, "auto"])
@pytest.mark.parametrize("fields", TIED.values(), ids=TIED)
def test_layers_that_share_a_weight(fields, embeddings, tmp_path):
    """The output head uses the embedding's tensors; PEFT writes some of them under both names, and so do we."""
    tokens = torch.tensor([[1, 2, 3, 4]])
    them = shaken(peft.get_peft_model(llama(), peft.LoraConfig(r=2, **copy.deepcopy(fields)))).eval()
    mine = shaken(inlay.get_peft_model(llama(), inlay.LoraConfig(r=2, **copy.deepcopy(fields)))).eval()
    expected = peft.get_peft_model_state_dict(them, save_embedding_layers=embeddings)
    found = get_peft_model_state_dict(mine, save_embedding_layers=embeddings)
    if embeddings is not True or fields is TIED["adapted"]:  # else PEFT's keys show its wrappers
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}
    mine.save_pretrained(tmp_path / "ours", save_embedding_layers=embeddings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing")
        read = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(read(tokens).logits, mine(tokens).logits, rtol=2e-6, atol=2e-6)
    them.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=embeddings)
    read = inlay.PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    torch.testing.assert_close(read(tokens).logits, them(tokens).logits, rtol=2e-6, atol=2e-6)


def test_readers_that_do_not_tie_get_the_same_model():
    """The head's own keys, put into an untied model with the same weights, give the same outputs."""
    fields = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
    tied = shaken(inlay.get_peft_model(llama(), inlay.LoraConfig(**fields, ensure_weight_tying=True))).eval()
    values = get_peft_model_state_dict(tied, save_embedding_layers=False)
    untied = llama(tied=False)
    untied.load_state_dict(llama().state_dict())
    read = inlay.get_peft_model(untied, inlay.LoraConfig(**fields)).eval()
    set_peft_model_state_dict(read, values)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(read(tokens).logits, tied(tokens).logits, rtol=2e-6, atol=2e-6)


def test_peft_adds_the_update_of_an_output_projection_twice():
    """Why the outputs of ``lora_attention`` are not compared: PEFT's are those of twice the update."""
    them = shaken(theirs("lora_attention"))
    values = peft.get_peft_model_state_dict(them)
    mine = ours("lora_attention")
    up = "base_model.model.attention.base_layer.out_proj.lora_B.weight"
    set_peft_model_state_dict(mine, values)
    assert not torch.allclose(mine(X), them(X), atol=1e-3)
    set_peft_model_state_dict(mine, {**values, up: 2 * values[up]})
    torch.testing.assert_close(mine(X), them(X), rtol=2e-6, atol=2e-6)


def test_input_dicts_are_not_changed():
    mine = ours("copy")
    values = get_peft_model_state_dict(mine)
    given = copy.copy(values)
    set_peft_model_state_dict(mine, given)
    assert list(given) == list(values)
