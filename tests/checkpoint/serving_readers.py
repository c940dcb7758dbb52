"""How each server computes the update of a layer from the files, written from its rules alone.

``{module: scale * B @ A}`` in double precision. Each reads the configuration's fields and the names of tensors as its
server does, and raises where that stops.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Deltas = dict[str, Tensor]


class Refused(Exception):
    """The server would stop here."""


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {key: value.double() for key, value in load_file(folder / "adapter_model.safetensors").items()}


def vllm(folder: Path, largest: int = 16) -> Deltas:
    """vLLM before 0.32: one scale from ``r`` and ``lora_alpha``; rsLoRA is known, patterns are not."""
    config, tensors = _files(folder)
    if config["use_dora"] or config["modules_to_save"] or config["bias"] != "none" or config["r"] > largest:
        raise Refused(folder)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            found[".".join(parts[:-2])][parts[-2][-1]] = value
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            found[".".join(parts[:-1])][parts[-1][-1]] = value
        elif not name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            raise Refused(name)
    return {module: scale * pair["B"] @ pair["A"] for module, pair in found.items()}


def sglang(folder: Path, largest: int | None = None) -> Deltas:
    """SGLang: ``alpha / r`` for everything, buffers of rank ``r``, q, k and v stacked, gate and up stacked."""
    config, tensors = _files(folder)
    targets, r = config["target_modules"], config["r"]
    if config["use_dora"] or not isinstance(targets, list) or (largest is not None and r > largest):
        raise Refused(folder)
    scale = config["lora_alpha"] / r
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        if re.search(r"layers\.(\d+)\.", name) is None:
            leaf = next((leaf for leaf in ("embed_tokens", "lm_head") if leaf in name), None)
            if leaf not in {target.split(".")[-1] for target in targets}:
                continue  # left out without a word
        module, _, factor = re.sub(r"\.weight$", "", name.removeprefix("base_model.model.")).rpartition(".")
        if factor not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            raise Refused(name)
        found[module][factor[-1]] = value
        if value.shape[0 if factor.endswith("A") else 1] != r:
            raise Refused(f"{name} does not fit a buffer of rank {r}")
    for module in found:
        before, _, last = module.rpartition(".")
        for partner in {"q_proj": ["v_proj"], "v_proj": ["q_proj"], "k_proj": ["q_proj", "v_proj"],
                        "up_proj": ["gate_proj"]}.get(last, []):  # fmt: skip
            if f"{before}.{partner}" not in found:
                raise Refused(f"{module} without {partner}")
    return {module: scale * pair["B"] @ pair["A"] for module, pair in found.items()}


def llama_cpp(folder: Path) -> Deltas:
    """llama.cpp: the converter writes ``lora_alpha`` as float32, the runtime divides by the rank of each B."""
    config, tensors = _files(folder)
    if not config["base_model_name_or_path"]:
        raise Refused("no base")
    alpha = float(torch.tensor(float(config["lora_alpha"]), dtype=torch.float32))
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        factor = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", name)
        if factor is None:
            if ".base_layer.weight" in name or "_layernorm" in name or ".norm" in name:
                continue
            raise Refused(name)
        found[name[: factor.start()].replace("base_model.model.", "")][factor[1]] = value
    scales = {module: alpha / pair["B"].shape[-1] if alpha else 1.0 for module, pair in found.items()}
    return {module: scales[module] * pair["B"] @ pair["A"] for module, pair in found.items()}


READERS = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp}
