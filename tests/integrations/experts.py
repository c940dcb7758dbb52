"""Adapters as transformers 4 wrote them for models whose experts it held as lists of layers, and their mathematics.

The oracle merges each update into its expert's own slice of the fused bank, in float64: ``W + scaling * B @ A``, one
expert and one projection at a time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# family -> (block's name in transformers 4, gate and up part, down part)
PARTS = {
    "Mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "Qwen2Moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    "Qwen3Moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    "Olmoe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    "Phimoe": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "Jamba": ("feed_forward", ("gate_proj", "up_proj"), "down_proj"),
    "Lfm2Moe": ("feed_forward", ("w1", "w3"), "w2"),
}


def old_shapes(model: nn.Module, family: str, targets: list[str]) -> dict[str, tuple[str, int, int, Tensor]]:
    """Return what ``targets`` meant in transformers 4: path there -> (parameter here, index, part, matrix here).

    ``index`` is the expert, or -1 for what is no bank; ``part`` the number of the half of a fused matrix.
    """
    block, gate_up, down = PARTS[family]
    found: dict[str, tuple[str, int, int, Tensor]] = {}

    def enter(path: str, name: str, expert: int, part: int, matrix: Tensor) -> None:
        if any(path == target or path.endswith(f".{target}") for target in targets):
            found[path] = (name, expert, part, matrix)

    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        old = owner.replace(".mlp.", f".{block}.") if block == "block_sparse_moe" else owner
        if last in ("gate_up_proj", "down_proj") and parameter.dim() == 3:
            parts = gate_up if last == "gate_up_proj" else (down,)
            rows = parameter.shape[1] // len(parts)
            for expert in range(parameter.shape[0]):
                for number, part in enumerate(parts):
                    matrix = parameter[expert, number * rows : (number + 1) * rows]
                    enter(f"{old}.{expert}.{part}", name, expert, number, matrix)
        elif last == "weight" and parameter.dim() == 2 and "embed" not in owner and "lm_head" not in owner:
            enter(old, name, -1, 0, parameter)
    return found


def _in_layers(path: str, layers: list[int] | None) -> bool:
    return layers is None or any(f".layers.{number}." in path for number in layers)


def write_old_adapter(
    folder: Path,
    model: nn.Module,
    family: str,
    targets: list[str],
    r: int = 3,
    alpha: float = 6,
    *,
    seed: int = 5,
    ranks: dict[str, int] | None = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Write an adapter as peft did under transformers 4, with random values; returns its tensors.

    Args:
        ranks: ``rank_pattern``: last name of a layer -> rank.
        fields: further fields of the configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, (_, _, _, matrix) in old_shapes(model, family, targets).items():
        if not _in_layers(path, fields.get("layers_to_transform")):
            continue
        out, channels = matrix.shape
        rank = (ranks or {}).get(path.rpartition(".")[2], r)
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, channels, generator=generator) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "target_modules": targets}
    config |= {"rank_pattern": ranks or {}, "inference_mode": True, "base_model_name_or_path": None} | fields
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


def merged_by_hand(model: Any, family: str, folder: Path) -> Any:
    """Return the model in float64 with an old adapter's updates added to its weights, expert by expert."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = model.double()
    with torch.no_grad():
        for path, (_, _, _, matrix) in old_shapes(model, family, config["target_modules"]).items():
            if not _in_layers(path, config.get("layers_to_transform")):
                continue
            A = tensors[f"base_model.model.{path}.lora_A.weight"].double()
            B = tensors[f"base_model.model.{path}.lora_B.weight"].double()
            rank = A.shape[0]
            alpha = config.get("alpha_pattern", {}).get(path.rpartition(".")[2], config["lora_alpha"])
            matrix += alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * (B @ A)
    return model
