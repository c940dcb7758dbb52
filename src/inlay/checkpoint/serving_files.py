"""An adapter folder, and the folder of its base model, as servers see them: files alone, no model is built."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from inlay.checkpoint.files import read_tensors, weights_file
from inlay.checkpoint.manifest import MANIFEST_NAME, read_manifest
from inlay.config import CONFIG_NAME, read_json_object
from inlay.core.patterns import pattern_value
from inlay.errors import CheckpointError, CheckpointMismatchError, CheckpointMissingError

__all__ = ["REGULAR_ENDS", "Base", "Pair", "ServedAdapter", "module_path", "read_adapter", "read_base"]

MODEL_PREFIXES = ("base_model.model.", "base_model.")
# what stands behind a module's path; some writers leave the adapter's name in it (lora_A.default.weight)
LORA_PART = re.compile(
    r"\.(?:lora_(?P<plain>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)$"
)
# ... as PEFT and every server write it
REGULAR_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
ADDED_TOKENS = "added_tokens.json"


@dataclass
class Pair:
    """The two factors at one module; one of them is None where the file lacks it.

    Attributes:
        embedding: the module is a lookup, whose factors have keys of their own.
        A: ``(r, in)``, for an embedding ``(r, vocabulary)``; convolutions have kernel axes behind.
        B: ``(out, r)``.
        keys: names of the factors in the file.
    """

    embedding: bool = False
    A: Tensor | None = None
    B: Tensor | None = None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank that the tensors have; 0 where neither is whole."""
        if self.A is not None and self.A.dim() > 0:
            return self.A.shape[0]
        return self.B.shape[1] if self.B is not None and self.B.dim() > 1 else 0


@dataclass
class ServedAdapter:
    """An adapter's files.

    Attributes:
        folder: where they are.
        config: ``adapter_config.json`` as written, of any method.
        tensors: the weights by key.
        by_hand: module path -> scale, where Inlay recorded that somebody changed it after injection.
        added_tokens: ``added_tokens.json``, token -> id.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    by_hand: dict[str, float] = field(default_factory=dict)
    added_tokens: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """LoRA factors by module path, without ``base_model.model.``."""
        found: dict[str, Pair] = {}
        for key, value in self.tensors.items():
            part = LORA_PART.search(key)
            if part is None:
                continue
            pair = found.setdefault(module_path(key[: part.start()]), Pair())
            pair.embedding = part["embedding"] is not None
            factor = part["plain"] or part["embedding"]
            setattr(pair, factor, value)
            pair.keys[factor] = key
        return found

    @cached_property
    def others(self) -> list[str]:
        """Keys of tensors that are no LoRA factors."""
        return [key for key in self.tensors if LORA_PART.search(key) is None]

    @property
    def rank(self) -> int | None:
        """The config's ``r``, or None where it is no positive integer."""
        r = self.config.get("r")
        return r if isinstance(r, int) and not isinstance(r, bool) and r > 0 else None

    @property
    def alpha(self) -> float | None:
        """The config's ``lora_alpha``, or None where it is no number."""
        alpha = self.config.get("lora_alpha")
        return alpha if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else None

    def pattern(self, name: str) -> dict[str, Any]:
        """Return ``rank_pattern`` or ``alpha_pattern``; empty where the config has none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def scaled(self, alpha: float, rank: int) -> float:
        """Return the scale for an alpha and a rank: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def scales(self) -> dict[str, float]:
        """Return the scale of each module as PEFT and Inlay apply it.

        Raises:
            CheckpointMismatchError: the tensors have other ranks than the config says, or its patterns mean different
                scales to PEFT and to Inlay.
        """
        if self.rank is None or self.alpha is None:
            return {}
        plain, prefixed = self._alphas(prefixes=False), self._alphas(prefixes=True)
        if plain is not None and prefixed is not None and plain != prefixed:
            differing = next(module for module in plain if plain[module] != prefixed[module])
            raise CheckpointMismatchError(
                f"alpha_pattern of {str(self.folder)!r} has a key that is a prefix of {differing!r}: Inlay applies it "
                "and PEFT does not; write the pattern so that it matches whole paths"
            )
        alphas = plain if plain is not None else prefixed
        if alphas is None:
            module, says, has = next(wrong for wrong in self._wrong_ranks(prefixes=False))
            raise CheckpointMismatchError(
                f"{str(self.folder)!r}: expected rank {says} at {module!r}, as {CONFIG_NAME} says, found {has}"
            )
        found = {module: self.scaled(alpha, self.pairs[module].rank) for module, alpha in alphas.items()}
        return {**found, **{module: value for module, value in self.by_hand.items() if module in found}}

    def _alphas(self, prefixes: bool) -> dict[str, float] | None:
        """Return alpha by module, or None where the rank pattern, read this way, does not fit the tensors."""
        if self._wrong_ranks(prefixes):
            return None
        pattern = self.pattern("alpha_pattern")
        return {module: pattern_value(pattern, module, self.alpha, prefixes) for module in self._whole()}

    def _wrong_ranks(self, prefixes: bool) -> list[tuple[str, int, int]]:
        if self.config.get("target_parameters"):
            return []  # experts lie packed in the rank axis
        said = {m: pattern_value(self.pattern("rank_pattern"), m, self.rank, prefixes) for m in self._whole()}
        return [(m, r, self.pairs[m].rank) for m, r in said.items() if r != self.pairs[m].rank]

    def _whole(self) -> list[str]:
        return [module for module, pair in self.pairs.items() if pair.rank]


@dataclass
class Base:
    """The folder of a base model.

    Attributes:
        folder: where it is.
        config: its ``config.json``; empty where there is none.
        files: name of a tensor -> the safetensors file that holds it; empty where the folder has none.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding: the config says so, or the files lack the former."""
        if self.files:
            return self.weight("lm_head") is None and self.weight("embed_tokens") is not None
        return self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings")) is True

    @cached_property
    def modules(self) -> set[str]:
        """Paths of the modules that hold tensors, quantised ones too."""
        return {name.rpartition(".")[0] for name in self.files}

    def module(self, path: str) -> str | None:
        """Return the base's own path of a module; one of the two may have a prefix that the other lacks."""
        if path in self.modules:
            return path
        near = [held for held in self.modules if held.endswith(f".{path}") or (held and path.endswith(f".{held}"))]
        return near[0] if len(near) == 1 else None

    def weight(self, path: str) -> str | None:
        """Return the name of a module's weight, where it is a plain one."""
        held = self.module(path)
        return f"{held}.weight" if held is not None and f"{held}.weight" in self.files else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor without reading it; None where its values are packed integers."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()) if part.get_dtype().startswith(("F", "BF")) else None

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def module_path(path: str) -> str:
    """Return a path without what PEFT puts before it."""
    return next((path[len(prefix) :] for prefix in MODEL_PREFIXES if path.startswith(prefix)), path)


def read_adapter(folder: str | os.PathLike[str]) -> ServedAdapter:
    """Read a local adapter folder of any method.

    Raises:
        CheckpointMissingError: no folder, or configuration or weights are not in it.
        CheckpointError: a file is damaged, or names no ``peft_type``.
    """
    root = Path(os.fspath(folder))
    if not root.is_dir():
        raise CheckpointMissingError(f"there is no adapter folder {str(root)!r}")
    if not (root / CONFIG_NAME).is_file():
        raise CheckpointMissingError(f"adapter {str(root)!r} holds no {CONFIG_NAME}")
    config = read_json_object(root / CONFIG_NAME)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{root / CONFIG_NAME} names no peft_type: not an adapter's configuration")
    added = read_json_object(root / ADDED_TOKENS) if (root / ADDED_TOKENS).is_file() else {}
    return ServedAdapter(root, config, read_tensors(weights_file(root.resolve())), _changed_by_hand(root), added)


def _changed_by_hand(root: Path) -> dict[str, float]:
    """Return the scales that Inlay's manifest, here or one folder above, records for this adapter."""
    for place, below in ((root, ""), (root.parent, root.name)):
        if not (place / MANIFEST_NAME).is_file():
            continue
        manifest = read_manifest(place)
        for name, folder in manifest.folders.items():
            if folder == below:
                options = manifest.options.get(name, {})
                return {module: float(held["scaling"]) for module, held in options.items() if "scaling" in held}
    return {}


def read_base(folder: str | os.PathLike[str]) -> Base:
    """Read the configuration and the tensors' names of a base model's folder.

    Raises:
        CheckpointMissingError: no folder, or neither a configuration nor safetensors files in it.
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    root = Path(os.fspath(folder))
    config = read_json_object(root / "config.json") if (root / "config.json").is_file() else {}
    files: dict[str, Path] = {}
    for path in sorted(root.glob("*.safetensors")):
        if path.name.startswith("adapter_model"):
            continue
        try:
            with safe_open(path, "pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected a safetensors file, found one that cannot be read: {error}"
            ) from None
    if not config and not files:
        what = "holds neither config.json nor safetensors files" if root.is_dir() else "is no folder"
        raise CheckpointMissingError(f"base model {str(root)!r} {what}")
    return Base(root, config, files)
