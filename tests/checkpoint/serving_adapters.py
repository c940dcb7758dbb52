"""Adapters for the rules of servers: a plain one that keeps every rule, and for each rule one that breaks it.

All are made by PEFT, but for the one whose scale was changed by hand, which only Inlay records.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj"]}
Broken = tuple[Path, dict[str, Any]]  # the folder, and keywords for `check`


def llama(tied: bool = False, **changes: Any) -> Any:
    """A tiny Llama with grouped heads, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **changes}
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, architectures=["Llama"]
        )
        return transformers.LlamaForCausalLM(config).eval()


def train(model: nn.Module, seed: int = 1) -> None:
    """Give every tensor of the adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save(
    folder: Path, model: nn.Module | None = None, config: Any = None, name: str | None = "base/model", **fields: Any
) -> Path:
    """Save a trained adapter made by PEFT."""
    config = config or peft.LoraConfig(**{**PLAIN, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(llama() if model is None else model, config)
        train(adapted)
        adapted.save_pretrained(str(folder))
    edit(folder, base_model_name_or_path=name)
    return folder


def edit(folder: Path, **fields: Any) -> Path:
    """Change fields of the configuration; ``...`` removes one."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not Ellipsis}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change the tensors in a folder."""
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)
    return folder


class Bank(nn.Module):
    """A stack of matrices as one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Experts()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.experts.weight)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))


def _bank(folder: Path) -> Broken:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.weight"])
    return save(folder, Bank(), config), {}


def _conv(folder: Path) -> Broken:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3)})])})
    return save(folder, model, target_modules=["conv"]), {}


def _gpt2(folder: Path) -> Broken:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return save(folder, transformers.GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True), {}


def _by_hand(folder: Path) -> Broken:
    import inlay

    model = inlay.get_peft_model(llama(), inlay.LoraConfig(**PLAIN))
    train(model)
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").scaling["default"] = 3.0
    model.save_pretrained(str(folder))
    return edit(folder, base_model_name_or_path="base/model"), {}


def _changed_embedding(folder: Path) -> Broken:
    save(folder, target_modules=["q_proj", "v_proj", "embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    rewrite(folder, lambda tensors: {**tensors, key: tensors[key] + 1})
    return folder, {"base": _base(folder)}


def _base(folder: Path, **changes: Any) -> Path:
    place = folder.with_name(folder.name + "-base")
    llama(**changes).save_pretrained(str(place))
    return place


def _nameless_architecture(folder: Path) -> Broken:
    base = _base(folder)
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    return save(folder), {"base": base}


def _nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def _without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def _named_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}


def _added(folder: Path) -> Broken:
    save(folder)
    (folder / "added_tokens.json").write_text('{"<new>": 40}')
    return folder, {}


def _ia3(folder: Path) -> Broken:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    return save(folder, config=config), {}


def _fields(**fields: Any) -> Callable[[Path], Broken]:
    return lambda folder: (save(folder, **fields), {})


# rule -> a folder that breaks it
BROKEN: dict[str, Callable[[Path], Broken]] = {
    "method": _ia3,
    "fields": lambda folder: (edit(save(folder), r=...), {}),
    "factors": lambda folder: (rewrite(save(folder), _without_one), {}),
    "matrices": _conv,
    "variants": _fields(layer_replication=[(0, 2), (1, 2)]),
    "changed base": _fields(init_lora_weights="pissa"),
    "changed by hand": _by_hand,
    "dora": _fields(use_dora=True),
    "finite": lambda folder: (rewrite(save(folder), _nan), {}),
    "base": lambda folder: (save(folder), {"base": _base(folder, intermediate_size=64)}),
    "targets": _fields(target_modules=r".*\.(q_proj|v_proj)"),
    "modules_to_save": _fields(modules_to_save=["lm_head"]),
    "bias": _fields(bias="all"),
    "lora_bias": _fields(lora_bias=True),
    "tokens": _fields(trainable_token_indices=[1, 2]),
    "activated": _fields(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
    "rank": lambda folder: (save(folder, r=20), {"max_lora_rank": 16}),
    "patterns": _fields(alpha_pattern={"v_proj": 3}),
    "names": lambda folder: (rewrite(save(folder), _named_adapter), {}),
    "embeddings": _changed_embedding,
    "added tokens": _added,
    "ranks": _fields(rank_pattern={"v_proj": 2}),
    "rslora": _fields(use_rslora=True),
    "parameters": _bank,
    "left out": _gpt2,
    "partners": _fields(target_modules=["q_proj", "up_proj"]),
    "base name": lambda folder: (save(folder, name=None), {}),
    "architecture": _nameless_architecture,
    "alpha": _fields(lora_alpha=0),
    "norms": _fields(modules_to_save=["norm"]),
    "tied head": lambda folder: (
        save(folder, llama(tied=True), target_modules=["q_proj", "v_proj", "lm_head"]),
        {"base": _base(folder, tied=True)},
    ),
}  # fmt: skip
