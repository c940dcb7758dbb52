"""A LoRA adapter written anew so that servers compute with plain ``alpha / r`` what PEFT computes."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.commit import Commit
from inlay.checkpoint.resolve import listed
from inlay.checkpoint.save import write_tensors
from inlay.checkpoint.serving import SERVERS, base_of, judge, problems, rules_of
from inlay.checkpoint.serving_conditions import CHANGING_STARTS, same_as_base
from inlay.checkpoint.serving_files import REGULAR_ENDS, Base, Pair, ServedAdapter, read_adapter
from inlay.config import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from inlay.core.patterns import matcher
from inlay.errors import CheckpointError, CheckpointMismatchError, UnsupportedError

__all__ = ["Exported", "export_for_serving"]

PREFIX = "base_model.model."
LARGEST_VLLM_RANK = 512
CARD = "README.md"
# which modules there are is said by target_modules, and how factors begin or train is over
STARTED_WITH = (
    "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "lora_ga_config", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        folder: where the adapter is.
        servers: whose rules it satisfies.
        rank: its rank; vLLM and SGLang have to be started with at least that as ``--max-lora-rank``.
        changes: what differs from the original, in words.
    """

    folder: Path
    servers: tuple[str, ...]
    rank: int
    changes: tuple[str, ...]


def export_for_serving(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    server: str | None = None,
    base_name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    max_lora_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write an adapter with equal outputs that satisfies the rules of a server, or of all.

    Scales other than the common one go into B, computed in double precision and rounded once; smaller ranks are padded
    with zeros (for llama.cpp, which reads ranks off the tensors, they are kept). Tensors that need no change are
    written bit for bit.

    Args:
        folder: a local adapter folder.
        out: the new folder; must not exist or be empty.
        server: ``vllm``, ``sglang`` or ``llama.cpp``; None satisfies all of them.
        base_name: what to write as ``base_model_name_or_path``; by default what the adapter says.
        base: folder of the base model; by default the folder that the adapter names, if there is one.
        max_lora_rank: the largest rank that the server is started with; by default whatever the adapter needs.
        dtype: dtype of the tensors; by default that of each.

    Raises:
        UnsupportedError: something stands in the way; every reason is named, and nothing is written.
        ConfigError: an unknown server.
        CheckpointMissingError, CheckpointError: the adapter or the base cannot be read, or ``out`` is in use.
    """
    servers = SERVERS if server is None else (server,)
    for name in servers:
        rules_of(name)
    root = Path(os.fspath(out))
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise CheckpointError(f"{str(root)!r} is {'a file' if root.is_file() else 'not empty'}; expected a new folder")
    original = read_adapter(folder)
    held = base_of(original, base)
    folded = _Fold(original, held, own_ranks=servers == ("llama.cpp",), dtype=dtype, base_name=base_name)
    reasons = folded.reasons + _refusals(folded.adapter, servers, held, max_lora_rank)
    if reasons:
        lines = "\n".join(f"- {reason}" for reason in reasons)
        raise UnsupportedError(f"{str(original.folder)!r} cannot be exported for {', '.join(servers)}:\n{lines}")
    card = original.folder / CARD
    with Commit() as commit:
        write_tensors(folded.adapter.tensors, commit.stage(root / SAFETENSORS_WEIGHTS_NAME), safe=True)
        text = json.dumps(folded.adapter.config, indent=2, sort_keys=True, allow_nan=False)
        commit.stage_text(root / CONFIG_NAME, text)
        if card.is_file():
            commit.stage_text(root / CARD, card.read_text(encoding="utf-8"))
    rank = max(pair.rank for pair in folded.adapter.pairs.values())
    return Exported(root, tuple(servers), rank, tuple(folded.changes))


def _refusals(adapter: ServedAdapter, servers: tuple[str, ...], base: Base | None, largest: int | None) -> list[str]:
    """Return what each server's rules still say, once where several say the same."""
    said: dict[str, list[str]] = {}
    for server in servers:
        limit = LARGEST_VLLM_RANK if largest is None and server == "vllm" else largest
        for finding in problems(judge(adapter, server, base=base, max_lora_rank=limit)):
            if finding.rule == "base name":
                continue  # demanded of every export
            said.setdefault(f"{finding.looks_at}: {finding.found}. Remedy: {finding.mend}", []).append(server)
    return [f"{', '.join(where)}: {what}" for what, where in said.items()]


class _Fold:
    """The adapter as it would be written, with what was changed and what stands in the way."""

    def __init__(
        self,
        original: ServedAdapter,
        base: Base | None,
        own_ranks: bool,
        dtype: torch.dtype | None,
        base_name: str | None,
    ) -> None:
        self.original = original
        self.own_ranks = own_ranks
        self.dtype = dtype
        self.reasons: list[str] = []
        self.changes: list[str] = []
        self.config = dict(original.config)
        self.tensors: dict[str, Tensor] = {}
        scales = self._scales()
        if scales:
            self._fold(original.pairs, scales)
        else:
            self.tensors.update(
                {key: original.tensors[key] for pair in original.pairs.values() for key in pair.keys.values()}
            )
        self._keep_others(base)
        self._settle(base, base_name)
        self.adapter = replace(original, config=self.config, tensors=self.tensors, by_hand={}, added_tokens={})

    def _scales(self) -> dict[str, float]:
        """Return the scale of each module, or nothing where the adapter is in no state to be folded."""
        original = self.original
        if original.config.get("target_parameters"):
            self.reasons.append("target_parameters: experts lie packed in the rank axis. Remedy: inlay merge")
            return {}
        if any(pair.A is None or pair.B is None or not pair.rank for pair in original.pairs.values()):
            return {}
        try:
            return original.scales()
        except CheckpointMismatchError as error:
            self.reasons.append(str(error))
            return {}

    def _fold(self, pairs: dict[str, Pair], scales: dict[str, float]) -> None:
        """Bring every module to one alpha, and to one rank unless the server reads ranks off the tensors."""
        top = max(pair.rank for pair in pairs.values())
        # what a module's alpha would have to be; one value is written, and the ratio of the others to it goes into B
        wanted = {module: scale * (pairs[module].rank if self.own_ranks else top) for module, scale in scales.items()}
        alpha = _common(wanted.values())
        scaled = []
        for module, pair in pairs.items():
            ratio = wanted[module] / alpha
            if math.isclose(ratio, 1.0, rel_tol=1e-12):
                ratio = 1.0
            else:
                scaled.append(module)
            self._write(module, pair, ratio, pair.rank if self.own_ranks else top)
        self.config.update(
            r=top, lora_alpha=alpha, use_rslora=False, alpha_pattern={}, rank_pattern={}, target_modules=self._targets()
        )
        if self.own_ranks:
            self.config["rank_pattern"] = {
                "^" + module.replace(".", r"\."): pair.rank for module, pair in pairs.items() if pair.rank != top
            }
        self._report(pairs, scaled, top, alpha)

    def _report(self, pairs: dict[str, Pair], scaled: list[str], top: int, alpha: float) -> None:
        before = self.original
        if (before.rank, before.alpha) != (top, alpha) or before.config.get("use_rslora"):
            rslora = " with use_rslora" if before.config.get("use_rslora") else ""
            self.changes.append(
                f"r {before.rank}, lora_alpha {before.alpha:g}{rslora} -> r {top}, lora_alpha {alpha:g}"
            )
        if before.by_hand:
            self.changes.append(f"scales that inlay.json records are kept: {listed(before.by_hand)}")
        if scaled:
            self.changes.append(f"lora_B scaled in {len(scaled)} of {len(pairs)} modules: {listed(scaled)}")
        padded = [module for module, pair in pairs.items() if pair.rank != top]
        if padded and not self.own_ranks:
            self.changes.append(f"padded to rank {top} in {len(padded)} of {len(pairs)} modules: {listed(padded)}")

    def _write(self, module: str, pair: Pair, ratio: float, rank: int) -> None:
        assert pair.A is not None
        assert pair.B is not None
        A, B = pair.A, pair.B
        if ratio != 1.0:
            # once, from double precision; a caller who cannot afford that rounding asks for a wider dtype
            B = (B.double() * ratio).to(self.dtype or B.dtype)
        if self.dtype is not None:
            A, B = A.to(self.dtype), B.to(self.dtype)
        for given, made, factor in ((pair.A, A, "A"), (pair.B, B, "B")):
            if bool(torch.isfinite(given.float()).all()) and not bool(torch.isfinite(made.float()).all()):
                self.reasons.append(f"{pair.keys[factor]}: scaled, it overflows {made.dtype}. Remedy: --dtype float32")
        if rank > pair.rank:
            A = torch.cat([A, A.new_zeros(rank - pair.rank, *A.shape[1:])])
            B = torch.cat([B, B.new_zeros(B.shape[0], rank - pair.rank, *B.shape[2:])], dim=1)
        names = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        for name, value in zip(names, (A, B), strict=True):
            self.tensors[f"{PREFIX}{module}.{name}"] = value

    def _targets(self) -> list[str]:
        """Return names that mean the adapted modules and no others; full paths where short names may mean more."""
        given, modules = self.original.config.get("target_modules"), list(self.original.pairs)
        narrowed = any(
            self.original.config.get(f) for f in ("exclude_modules", "layers_to_transform", "layers_pattern")
        )
        if isinstance(given, list) and not narrowed:
            match = matcher(given)
            used = [match(module) for module in modules]
            if None not in used:
                return sorted({name for name in used if name is not None})
        return sorted(modules)

    def _keep_others(self, base: Base | None) -> None:
        """Keep tensors that are no factors, but for weights that are in the file only because they were adapted."""
        dropped = []
        for key in self.original.others:
            value = self.original.tensors[key]
            self.tensors[key] = value
            if not key.endswith(("embed_tokens.weight", "lm_head.weight", ".base_layer.weight")):
                continue
            if base is None or not base.files:
                self.reasons.append(f"{key}: may be the base's own weight or not. Remedy: --base FOLDER, to compare")
            elif same_as_base(base, key, value):
                del self.tensors[key]
                dropped.append(key)
            else:
                self.reasons.append(f"{key}: differs from the base's weight. Remedy: inlay merge")
        if dropped:
            self.changes.append(f"left out, the base has the same: {listed(dropped)}")

    def _settle(self, base: Base | None, base_name: str | None) -> None:
        """Set the fields that need not be what they were, and drop those that nobody knows."""
        from inlay.core.registry import config_class

        config = self.config
        config.update(inference_mode=True)
        start = config.get("init_lora_weights")
        if not (isinstance(start, str) and start.lower().startswith(CHANGING_STARTS)):
            config.update(init_lora_weights=True)  # the factors are in the file; how they began matters no more
        for field in STARTED_WITH:
            if field in config:
                config[field] = None
        if not config.get("use_dora") and all(key.endswith(REGULAR_ENDS) for key in self.tensors):
            # nothing of the kind is in the file, whatever was asked for
            config.update(bias="none", modules_to_save=None, lora_bias=False, trainable_token_indices=None)
        config["ensure_weight_tying"] = False
        name = base_name or config.get("base_model_name_or_path")
        if name:
            config["base_model_name_or_path"] = name
        else:
            self.reasons.append("base_model_name_or_path: not set. Remedy: --base-name NAME")
        if str(config.get("peft_type")).upper() == "LORA":
            config["peft_type"] = "LORA"
            known = {*config_class("LORA").__dataclass_fields__, "invocation_string"}
            unknown = sorted(field for field in config if field not in known or field == "runtime_config")
            for field in unknown:
                del config[field]
            if unknown:
                self.changes.append(f"fields dropped: {listed(unknown)}")


def _common(alphas: Any) -> float:
    """Return the value that most modules have and that is not 0; as an integer where it is one."""
    rounded: Counter[float] = Counter()
    first: dict[float, float] = {}
    for alpha in alphas:
        if alpha != 0:
            key = float(f"{alpha:.12g}")  # equal but for rounding
            rounded[key] += 1
            first.setdefault(key, alpha)
    if not rounded:
        return 1
    best = rounded.most_common(1)[0][0]
    return int(best) if best.is_integer() else first[best]
