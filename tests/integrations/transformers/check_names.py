"""Every name of peft that an installed library imports exists; found by reading the libraries' sources."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy

LIBRARIES = ["transformers", "accelerate", "trl", "diffusers", "sentence_transformers"]


@lru_cache
def imported(library: str) -> set[tuple[str, str | None]]:
    """Return (module, name) of what a library imports from peft, anywhere in its files."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        pytest.skip(f"{library} is not installed")
    found: set[tuple[str, str | None]] = set()
    for file in Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "peft" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "peft":
                found.update((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                found.update((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "peft")
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_exist(library: str) -> None:
    names = imported(library)
    assert names
    for module, name in names:
        owner = import_module(module)
        assert name is None or hasattr(owner, name), f"{module}.{name}"


def test_wrapping_policy_of_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, and modules whose own weight trains, are units of their own."""
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    policy: Any = fsdp_auto_wrap_policy(model)
    units = {
        name for name, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=10**9)
    }
    blocks = {name for name, module in model.named_modules() if type(module).__name__ == "LlamaDecoderLayer"}
    assert blocks <= units
    trained = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= units
    assert not [name for name in units if name.endswith(("k_proj", "base_layer", "norm"))]


def test_keys_of_full_copies_and_token_rows() -> None:
    """What transformers asks an ``AuxiliaryTrainingWrapper`` when it loads an adapter."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[4, 5])
    model = tiny.llama()
    model.add_adapter(config, "mine")
    found = {
        name: module.adapter_state_dict_load_map("mine")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    assert found.keys() == {"lm_head", "model.embed_tokens"}
    memory = dict(model.named_parameters())
    saved = model.get_adapter_state_dict("mine")
    for path, keys in found.items():
        for on_disk, in_memory in keys.items():
            assert f"{path}.{on_disk}" in saved
            assert f"{path}.{in_memory}" in memory
            assert torch.equal(saved[f"{path}.{on_disk}"], memory[f"{path}.{in_memory}"])
