"""LoftQ on a model that is quantised already: the adapter makes up for what quantising lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.model_files import ModelFiles
from inlay.core.affine import Affine
from inlay.core.entry import Entry
from inlay.core.initial import wide_base
from inlay.core.layer import AdaptedLayer
from inlay.core.sliced import as_seen, own_site
from inlay.errors import (
    CheckpointKeyError,
    CheckpointMismatchError,
    CheckpointMissingError,
    ConfigError,
    ConfigTypeError,
)
from inlay.inits.decompose import leading
from inlay.inits.start import Given, blocks_of, fill_factors

__all__ = ["replace_lora_weights_loftq"]

_PREFIX = "base_model.model."


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let a LoRA approximate the difference between the original weights, on disk, and the model's own.

    Every layer whose weight differs from the file takes part, however it is held.

    Args:
        peft_model: a ``PeftModel`` with a quantised base.
        model_path: folder of the original weights, or its ``model.safetensors``; by default where the model was loaded
            from, or what the local Hub cache has of it.
        adapter_name: whose factors are replaced.
        callback: ``callback(peft_model, layer name)`` after each layer: whether to keep its new factors. Calling this
            function again then may improve others.

    Raises:
        ConfigTypeError: ``peft_model`` is no ``PeftModel``.
        CheckpointMissingError: there is no such folder, or no ``model.safetensors`` in it.
        CheckpointKeyError, CheckpointMismatchError: the file lacks a layer's weight, or has it in another shape.
        ConfigError: no layer of the adapter differs from the file.
    """
    if not hasattr(peft_model, "peft_config"):
        raise ConfigTypeError(f"The passed model is a {type(peft_model).__name__} and not a valid PeftModel")
    peft_model.state.record(adapter_name)
    root = peft_model.get_base_model()
    files = ModelFiles(_folder(root, model_path))
    any_match = False
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, AdaptedLayer):
            continue
        for entry in layer.entries.get(adapter_name, ()):
            if "r" not in entry.options or entry.home is not None:
                continue
            site = own_site(entry.method, entry.site)
            lost = _lost(root, layer, entry, files)
            if not bool(lost.any()):
                continue
            any_match = True
            p = layer.params(entry, whole=True)
            before = p.A.clone(), p.B.clone()
            r = entry.options["r"] // site.groups
            given = Given(lost, r, float(p.scaling), entry.method.config, site)
            fill_factors(site, p, given.scaled(*leading(lost, r)))
            layer.put(entry, p)
            if callback is not None and not callback(peft_model, name.removeprefix(_PREFIX)):
                p.A.copy_(before[0])
                p.B.copy_(before[1])
                layer.put(entry, p)
    if not any_match:
        raise ConfigError(
            "No bnb LoRA module found on the model, nor any other layer whose weight differs from the original in "
            f"{str(files.folder)!r}"
        )


def _lost(root: Any, layer: AdaptedLayer, entry: Entry, files: ModelFiles) -> Tensor:
    """Return original minus present weight, (*blocks, out, fan_in), of the rows that the adapter is on."""
    site = entry.site
    name = site.name if site.parameter is not None else f"{site.name}.{layer.kind.weight_name}"
    prefix = f"{getattr(root, 'base_model_prefix', None) or ''}."
    key = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in files.where), None)
    if key is None:
        raise CheckpointKeyError(f"{files.folder}: expected the tensor {name!r}, found no such key")
    original, base = files.read(key), wide_base(layer)
    if tuple(original.shape) != site.stored_shape:
        raise CheckpointMismatchError(
            f"{files.folder}: {key!r}: expected shape {site.stored_shape}, found {tuple(original.shape)}"
        )
    lost = Affine(layer.kind.to_matrix(site, original.to(base.weight)) - base.weight)
    return blocks_of(site, as_seen(entry.method, site, lost)[1].weight)


def _folder(root: Any, path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        path = getattr(root, "name_or_path", None) or getattr(getattr(root, "config", None), "_name_or_path", None)
        if not path:
            raise CheckpointMissingError(
                "The provided model does not appear to be a transformers model or is a local model. In this case, "
                "model_path must name the folder of its original weights"
            )
        if not os.path.isdir(path):
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

            try:
                path = snapshot_download(str(path), local_files_only=True)
            except HFValidationError as error:
                raise CheckpointMissingError(
                    f"{path!r} is neither a folder nor a Hub repository; give model_path"
                ) from error
            except LocalEntryNotFoundError as error:
                raise CheckpointMissingError(
                    f"the model.safetensors file of {path!r} must be present on disk, but it could not be found"
                ) from error
    found = Path(path)
    return found.parent if found.name.endswith(".safetensors") else found
