"""Which libraries a file may name as the home of the base model's class (``auto_mapping``)."""

from __future__ import annotations

from collections.abc import Iterable

from inlay.models.mappings import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "check_import_allowlist", "get_default_import_allowlist"]


def get_default_import_allowlist() -> list[str]:
    """Return the libraries that are always allowed."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Iterable[str], parent_name: str) -> bool:
    """Return whether ``parent_name``, a dotted module, is one of the listed libraries or lies in one."""
    return any(parent_name == library or parent_name.startswith(f"{library}.") for library in allowlist)
