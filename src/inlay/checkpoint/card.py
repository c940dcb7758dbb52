"""The model card (``README.md``) beside an adapter."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from inlay.errors import InlayWarning

__all__ = ["model_card"]

PIPELINES = {"CAUSAL_LM": "text-generation"}


def model_card(bare: nn.Module, configs: Mapping[str, Any], existing: str | None = None) -> str:
    """Return the text of a model card.

    Args:
        bare: the base model.
        configs: the adapters' configurations by name.
        existing: a card that is there already: its text stays, and its front matter is brought up to date where
            huggingface_hub is installed to parse it.
    """
    front = _front(bare, configs)
    if existing is not None:
        return _updated(existing, front)
    return "\n".join(["---", *_yaml(front), "---", "", *_body(bare, configs, front), ""])


def _front(bare: nn.Module, configs: Mapping[str, Any]) -> dict[str, Any]:
    tags = set(getattr(bare, "model_tags", None) or ())
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(bare, transformers.PreTrainedModel):
        tags.add("transformers")
    if any(_method(config) == "LORA" for config in configs.values()):
        tags.add("lora")
    name = getattr(bare, "name_or_path", None)
    if name is not None:
        tags.add(f"base_model:adapter:{name}")
    front: dict[str, Any] = {}
    base = getattr(getattr(bare, "config", None), "_name_or_path", None)
    if base:
        front["base_model"] = base
    front["library_name"] = "peft"
    for config in configs.values():
        task = getattr(config.task_type, "value", config.task_type)
        if task in PIPELINES:
            front["pipeline_tag"] = PIPELINES[task]
    if tags:
        front["tags"] = sorted(tags)
    return front


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _yaml(front: Mapping[str, Any]) -> list[str]:
    """Write strings and lists of strings as YAML; quoted, so that no value is taken for something else."""
    lines = []
    for key, value in front.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines


def _body(bare: nn.Module, configs: Mapping[str, Any], front: Mapping[str, Any]) -> list[str]:
    base = front.get("base_model")
    what = f"`{base}`" if base else f"a `{type(bare).__name__}`"
    many = len(configs) > 1
    return [
        f"# {'Adapters' if many else 'Adapter'} for {what}",
        "",
        f"{'These are small sets' if many else 'This is a small set'} of trained tensors that "
        f"{'are' if many else 'is'} injected into the base model, which is not part of this repository.",
        "",
        "| adapter | method | folder |",
        "|---|---|---|",
        *(
            f"| `{name}` | {_method(config)} | `{'.' if name == 'default' else name}` |"
            for name, config in configs.items()
        ),
        "",
        "## Use",
        "",
        "```python",
        "from inlay import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/or/name/of/this"'
        + (', adapters="all")' if many or "default" not in configs else ")"),
        "```",
        "",
        "The files have the format of PEFT, which reads them too.",
    ]


def _updated(existing: str, front: Mapping[str, Any]) -> str:
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        return existing
    try:
        card = ModelCard(existing, ignore_metadata_errors=True)
        for key, value in front.items():
            if key == "pipeline_tag" and card.data.get("pipeline_tag"):
                continue  # somebody chose it
            if key == "tags":
                value = sorted({*(card.data.get("tags") or []), *value})
            card.data[key] = value
        return str(card)
    except Exception as error:  # the parser of YAML has errors of its own
        warnings.warn(
            f"README.md is left as it is: its front matter cannot be read ({error})", InlayWarning, stacklevel=4
        )
        return existing
