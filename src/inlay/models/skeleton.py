"""A model from its description, on the meta device: names and shapes without weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from inlay.errors import ConfigTypeError, MissingExtraError, UnsupportedError

__all__ = ["skeleton", "transformers_library"]

# task_type -> the auto class of transformers that puts the right head on a model
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def transformers_library(purpose: str) -> Any:
    """Return the module ``transformers``.

    Raises:
        MissingExtraError: it is not installed; the message begins with ``purpose``.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs transformers: pip install 'inlay[transformers]'") from error
    return transformers


def skeleton(described: Any, task_type: Any = None) -> nn.Module:
    """Build a model on the meta device.

    Args:
        described: a configuration of transformers, the same as a dict with ``model_type``, or the path or Hub name of
            one.
        task_type: chooses the head; without it, what the configuration names in ``architectures``, or no head.

    Raises:
        ConfigTypeError: ``described`` is none of these.
        UnsupportedError: transformers knows no such model.
        MissingExtraError: transformers is not installed.
    """
    library = transformers_library("Building a model from its configuration")
    config = _configuration(library, described)
    task = str(getattr(task_type, "value", task_type))
    names = [AUTO_CLASSES[task]] if task in AUTO_CLASSES else [*(getattr(config, "architectures", None) or [])]
    cls = getattr(library, next((name for name in names if hasattr(library, name)), "AutoModel"))
    with torch.device("meta"):
        try:
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        except ValueError as error:
            raise UnsupportedError(
                f"{cls.__name__} of transformers has no model for {type(config).__name__}"
            ) from error
    model.__dict__["_is_skeleton"] = True
    return model


def _configuration(library: Any, described: Any) -> Any:
    if isinstance(described, library.PretrainedConfig):
        return described
    try:
        if isinstance(described, dict) and isinstance(described.get("model_type"), str):
            return library.AutoConfig.for_model(**described)
        if isinstance(described, (str, os.PathLike)):
            return library.AutoConfig.from_pretrained(os.fspath(described))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"{described!r} is no model that transformers can describe: {reason}") from error
    raise ConfigTypeError(
        "expected a model, a configuration of transformers, a dict with 'model_type', or a path, found "
        f"{type(described).__name__}"
    )
