"""What can be learned about an adapter from its files alone: sites, ranks, update norms, dead and broken tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inlay.core.patterns import pattern_value
from inlay.errors import CheckpointError, CheckpointMissingError
from inlay.training.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config

WEIGHTS = (WEIGHTS_FILE, "adapter_model.bin")
PREFIXES = ("base_model.model.", "base_model.")  # the second before tensors that the whole model shares
# what a tensor is called below the module it adapts; peft_type in lower case followed by "_" covers later methods
STEMS = ("lora", "ia3", "hada", "lokr", "oft", "vera", "fourierft", "ln_tuning", "trainable_tokens")


@dataclass
class TensorReport:
    """One tensor of the file."""

    name: str
    shape: list[int]
    dtype: str
    norm: float
    non_finite: int


@dataclass
class SiteReport:
    """One adapted module.

    ``size`` is what ``measure`` says: the Frobenius norm of the whole change of the weight, of its low-rank part
    (DoRA, whose change depends on the base), the distance from doing nothing, or the norm of the parameters where
    the files do not determine the change.
    """

    module: str
    parameters: int
    rank: int | None = None
    size: float = 0.0
    measure: str = "parameters"
    dead: bool = False
    tensors: list[str] = field(default_factory=list)


@dataclass
class AdapterReport:
    """Everything ``inlay inspect`` prints."""

    path: str
    method: str | None
    base_model: str | None
    task_type: str | None
    file_bytes: int
    parameters: int
    settings: dict[str, Any]
    sites: list[SiteReport]
    shared: list[TensorReport]
    saved: list[TensorReport]  # whole modules and biases that were trained beside the adapter
    non_finite: list[TensorReport]
    incomplete: list[str]  # tensors whose counterpart is missing

    @property
    def broken(self) -> bool:
        return bool(self.non_finite or self.incomplete)


def inspect_adapter(path: Path) -> AdapterReport:
    """Read an adapter folder, or one of its weight files, and measure it. No base model is needed.

    Raises:
        CheckpointMissingError: nothing there, or no weights in the folder.
        CheckpointError: a file that is damaged or holds no tensors.
    """
    file = _weights_file(path)
    config = _config_beside(file)
    tensors = _read(file)
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    method = config.get("peft_type")
    grouped, shared, saved = _group(tensors, method)
    reports = {name: _measure_tensor(name, value) for name, value in tensors.items()}
    sites, incomplete = [], []
    for module, parts in grouped.items():
        site = SiteReport(module, sum(value.numel() for value in parts.values()), tensors=sorted(parts))
        missing = _measure_site(site, parts, config)
        incomplete += [f"{module}.{part}" for part in missing]
        sites.append(site)
    kept = ("r", "lora_alpha", "alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save")
    return AdapterReport(
        path=str(path),
        method=method,
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        file_bytes=file.stat().st_size,
        parameters=sum(value.numel() for value in tensors.values()),
        settings={name: config[name] for name in kept if config.get(name) not in (None, [], {})},
        sites=sites,
        shared=[reports[name] for name in shared],
        saved=[reports[name] for name in saved],
        non_finite=[report for report in reports.values() if report.non_finite],
        incomplete=incomplete,
    )


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointMissingError(f"there is neither a folder nor a file {str(path)!r}")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise CheckpointMissingError(f"folder {str(path)!r} holds no {' or '.join(WEIGHTS)}")


def _config_beside(file: Path) -> dict[str, Any]:
    return read_adapter_config(file.parent) if (file.parent / CONFIG_FILE).is_file() else {}


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix != ".safetensors":
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damage led to
            raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from None
        if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
            raise CheckpointError(f"{file} holds no dictionary of tensors")
        return values
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _group(
    tensors: Mapping[str, torch.Tensor], method: str | None
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str], list[str]]:
    """Sort tensors into ``{module: {part: tensor}}``, names of shared ones, and names of whole saved modules."""
    stems = {*STEMS, *([method.lower()] if method else [])}
    part = re.compile(rf"(?:^|\.)(?P<part>(?:{'|'.join(sorted(stems))})_[^.]*(?:\.[^.]+)?)$")
    sites: dict[str, dict[str, torch.Tensor]] = {}
    shared, saved = [], []
    for name, value in tensors.items():
        path = next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name)
        found = part.search(path)
        if found is None:
            saved.append(name)
        elif found.start() == 0:
            shared.append(name)
        else:
            sites.setdefault(path[: found.start()], {})[found["part"].removesuffix(".weight")] = value
    return sites, shared, saved


def _measure_tensor(name: str, value: torch.Tensor) -> TensorReport:
    wide = value.double() if value.is_floating_point() else value.to(torch.float64)
    bad = int((~torch.isfinite(wide)).sum())
    return TensorReport(name, list(value.shape), str(value.dtype).removeprefix("torch."), _norm(wide), bad)


def _norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double()))


def _measure_site(site: SiteReport, parts: dict[str, torch.Tensor], config: Mapping[str, Any]) -> list[str]:
    """Fill in rank, size and whether the site does nothing; return the parts that should be there and are not."""
    for wanted, measure in MEASURES:
        present = [name for name in wanted if name in parts]
        if not present:
            continue
        if len(present) < len(wanted):
            return [name for name in wanted if name not in parts]
        measure(site, parts, config)
        return []
    site.size = math.sqrt(sum(_norm(value) ** 2 for value in parts.values()))
    site.dead = site.size == 0.0
    return []


def _low_rank(site: SiteReport, parts: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    names = ("lora_A", "lora_B") if "lora_A" in parts else ("lora_embedding_A", "lora_embedding_B")
    down, up = (parts[name].double().flatten(1) for name in names)
    usual = pattern_value(config.get("rank_pattern"), site.module, config.get("r"), prefixes=False)
    site.rank = int(down.shape[0])
    experts = site.rank // usual if config.get("target_parameters") and usual and site.rank % usual == 0 else 1
    scale = _scale(site, config, site.rank // experts)
    site.measure = "low-rank part" if "lora_magnitude_vector" in parts else "update"
    if scale is None:
        site.measure, scale = "update without its scale", 1.0
    if up.shape[1] != site.rank:  # a grouped convolution: the columns of B belong to groups
        site.measure, site.size = "parameters", math.hypot(_norm(down), _norm(up))
    elif experts > 1:
        site.rank //= experts
        downs = down.view(experts, site.rank, -1)
        ups = up.view(up.shape[0], site.rank, experts).permute(2, 0, 1)
        site.size = scale * math.sqrt(sum(product_norm(b, a) ** 2 for a, b in zip(downs, ups, strict=True)))
    else:
        site.size = scale * product_norm(up, down)
    # DoRA may have trained its magnitudes alone, which only the base model could tell
    site.dead = site.measure != "low-rank part" and not (bool(up.any()) and bool(down.any()))


def product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Frobenius norm of ``up @ down`` (``(out, r) @ (r, in)``) from two ``r x r`` Gram matrices, never formed."""
    square = float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _scale(site: SiteReport, config: Mapping[str, Any], rank: int) -> float | None:
    usual = config.get("lora_alpha", config.get("alpha"))
    alpha = pattern_value(config.get("alpha_pattern"), site.module, usual, prefixes=False)
    if alpha is None:
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _hadamard(site: SiteReport, parts: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """LoHa: ``(w1_a w1_b) * (w2_a w2_b)``, a few rows at a time."""
    site.rank = int(parts["hada_w1_b"].shape[0])
    scale = _scale(site, config, site.rank)
    site.dead = any(not bool(value.any()) for value in parts.values())
    if scale is None or "hada_t1" in parts:
        site.size = math.sqrt(sum(_norm(value) ** 2 for value in parts.values()))
        return
    first, second = parts["hada_w1_b"].double(), parts["hada_w2_b"].double()
    square = 0.0
    rows = zip(parts["hada_w1_a"].double().split(256), parts["hada_w2_a"].double().split(256), strict=True)
    for one, two in rows:
        square += float(((one @ first) * (two @ second)).square().sum())
    site.size, site.measure = scale * math.sqrt(square), "update"


def _factors(site: SiteReport, parts: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    site.size, site.measure = _norm(parts["ia3_l"].double() - 1.0), "distance from 1"
    site.dead = site.size == 0.0


def _products(site: SiteReport, parts: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """VeRA: the update vanishes as soon as one of the two vectors does."""
    site.rank = int(parts["vera_lambda_d"].numel())
    site.size = math.hypot(_norm(parts["vera_lambda_b"]), _norm(parts["vera_lambda_d"]))
    site.dead = any(not bool(value.any()) for value in parts.values())


Measure = Callable[[SiteReport, dict[str, torch.Tensor], Mapping[str, Any]], None]
# the parts a site has to have together, and how to measure it; a site with none of them is measured by its parameters
MEASURES: list[tuple[tuple[str, ...], Measure]] = [
    (("lora_A", "lora_B"), _low_rank),
    (("lora_embedding_A", "lora_embedding_B"), _low_rank),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _hadamard),
    (("ia3_l",), _factors),
    (("vera_lambda_b", "vera_lambda_d"), _products),
]
