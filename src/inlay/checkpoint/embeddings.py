"""Whether the embeddings' own weights go into a checkpoint; decided from facts on this machine, not over a network."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from inlay.checkpoint.keys import base_target
from inlay.checkpoint.target import Target
from inlay.checkpoint.tree import MODEL_PREFIX, Tree, persistent_tensors
from inlay.config.files import read_json_object
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.errors import CheckpointError, InlayWarning, UnsupportedError

__all__ = ["embedding_targets", "embeddings_to_save"]

# Layers whose base weight PEFT saves too when they are targeted, so that both write the same keys.
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")


def embeddings_to_save(tree: Tree, adapter: str, choice: bool | str) -> list[Target]:
    """Return the embedding tensors that a checkpoint takes.

    Args:
        choice: True or False, or ``"auto"``: when the embeddings called ``embed_tokens`` or ``lm_head`` are adapted
            (but not by trainable tokens), or the vocabulary has another size than the base model's config file says.

    Raises:
        UnsupportedError: True was asked for and the model does not say which its embeddings are (policy ``inlay``).
    """
    if choice not in (True, False, "auto"):
        raise CheckpointError(f"save_embedding_layers: expected True, False or 'auto', found {choice!r}")
    if choice is False:
        return []
    targeted = _targeted(tree, adapter)
    if choice == "auto":
        if targeted and not _trains_tokens(tree.state.record(adapter).config):
            warnings.warn(
                f"{', '.join(targeted)} is adapted, so the embeddings' own weights are saved too; "
                "save_embedding_layers=False leaves them out",
                InlayWarning,
                stacklevel=4,
            )
        elif _resized(tree, adapter):
            warnings.warn(
                "The vocabulary has another size than the base model's, so the embeddings are saved too; "
                "save_embedding_layers=False leaves them out",
                InlayWarning,
                stacklevel=4,
            )
        else:
            return []
    if not callable(getattr(tree.bare, "get_input_embeddings", None)):
        message = f"save_embedding_layers: {type(tree.bare).__name__} has no get_input_embeddings()"
        if tree.state.policy.strict_load:
            raise UnsupportedError(message)
        warnings.warn(f"{message}; no embeddings are saved", InlayWarning, stacklevel=4)
        return []
    return embedding_targets(tree, only_adapted=bool(targeted), copied=False)


def _targeted(tree: Tree, adapter: str) -> list[str]:
    """Return the paths of adapted embedding layers, by PEFT's names for them."""
    return [
        node.path
        for node in tree.nodes
        if node.path.rpartition(".")[2] in EMBEDDING_LAYERS
        and isinstance(node.module, AdaptedLayer)
        and adapter in node.module.entries
    ]


def _trains_tokens(config: Any) -> bool:
    kind = getattr(config.peft_type, "value", config.peft_type)
    return kind == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None


def _resized(tree: Tree, adapter: str) -> bool:
    """Whether the model's vocabulary differs from the base model's config file, as far as that is here to be read."""
    now = _vocabulary(getattr(tree.bare, "config", None))
    name = getattr(tree.state.record(adapter).config, "base_model_name_or_path", None)
    if not now or not name:
        return False
    path = _local_config(name, getattr(tree.state.record(adapter).config, "revision", None))
    if path is None:
        if not tree.state.policy.strict_load:
            warnings.warn(
                f"{name!r} has no config.json on this machine: the vocabulary is taken to be unchanged",
                InlayWarning,
                stacklevel=5,
            )
        return False
    try:
        before = _vocabulary(read_json_object(path))
    except CheckpointError as error:  # the base model's file is no reason to lose a trained adapter
        warnings.warn(f"the vocabulary is taken to be unchanged: {error}", InlayWarning, stacklevel=5)
        return False
    return before is not None and before != now


def _vocabulary(config: Any) -> int | None:
    def read(held: Any, name: str) -> Any:
        return held.get(name) if isinstance(held, dict) else getattr(held, name, None)

    size = read(config, "vocab_size")
    if size is None and config is not None:
        size = read(read(config, "text_config"), "vocab_size")
    return size if isinstance(size, int) else None


def _local_config(name: str, revision: str | None) -> str | None:
    path = os.path.join(name, "config.json")
    if os.path.isfile(path):
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None


def embedding_targets(tree: Tree, only_adapted: bool = False, copied: bool = True) -> list[Target]:
    """Return the tensors of the model's input and output embeddings (empty if it does not name them).

    Args:
        only_adapted: leave out an embedding layer that has no adapter.
        copied: take the original of an embedding layer that is trained in full by ``modules_to_save``.
    """
    found: dict[str, Target] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(tree.bare, getter, None)
        try:
            layer = get() if callable(get) else None
        except NotImplementedError:
            layer = None
        node = tree.node(layer) if isinstance(layer, nn.Module) else None
        if node is None or (isinstance(node.module, ModuleCopies) and not copied):
            continue
        place = node.path
        if isinstance(node.module, AdaptedLayer):
            node = tree.node(node.module.get_base_layer())
        elif only_adapted:
            continue
        elif isinstance(node.module, ModuleCopies):
            node = tree.node(node.module.original_module)
        for name, owner, attribute in persistent_tensors(node.module) if node is not None else ():
            inner = tree.node(owner)
            if inner is not None:
                target = base_target(inner, attribute, "embedding")
                mounted = ("base_layer", "token_adapter.base_layer", "original_module")
                target.aliases += tuple(f"{MODEL_PREFIX}{place}.{mount}.{name}" for mount in mounted)
                found.setdefault(target.key, target)
    return list(found.values())
