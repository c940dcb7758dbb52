"""``inlay.json``: what a folder of adapters cannot say by itself. PEFT does not need it and ignores it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.tree import Tree
from inlay.config import CONFIG_NAME, read_json_object, resolve_file
from inlay.core.active import set_active
from inlay.core.layer import AdaptedLayer
from inlay.core.state import check_adapter_name
from inlay.errors import CheckpointError, CheckpointMismatchError, CheckpointMissingError, did_you_mean

__all__ = ["MANIFEST_NAME", "Manifest", "adapter_folder", "read_manifest", "restore", "taken_from"]

MANIFEST_NAME = "inlay.json"
VERSION = 1

Options = dict[str, dict[str, Any]]  # layer path -> option -> value


@dataclass
class Manifest:
    """The adapters of a folder.

    Attributes:
        folders: adapter name -> folder below the root (empty for the root itself), in the order of the adapters.
        active: names in activation order.
        enabled: whether the adapters are on.
        options: adapter name -> the numbers of its layers that were changed by hand (``layer.scaling[name] = 2.0``).
    """

    folders: dict[str, str]
    active: tuple[str, ...] = ()
    enabled: bool = True
    options: dict[str, Options] = field(default_factory=dict)

    def to_json(self) -> str:
        adapters = [
            {"name": name, "folder": folder, "options": self.options.get(name, {})}
            for name, folder in self.folders.items()
        ]
        content = {
            "format": "inlay",
            "version": VERSION,
            "adapters": adapters,
            "active": list(self.active),
            "enabled": self.enabled,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def adapter_folder(name: str) -> str:
    """Return the folder of an adapter below the root, as PEFT lays it out; empty for ``default``."""
    return "" if name == "default" else name


def taken_from(tree: Tree, names: Iterable[str]) -> Manifest:
    """Return the manifest of a model's adapters, those of the given names."""
    names = list(names)
    manifest = Manifest(
        {name: adapter_folder(name) for name in names},
        tuple(name for name in tree.state.active if name in names),
        tree.state.enabled,
    )
    for node in tree.nodes:
        if not isinstance(node.module, AdaptedLayer):
            continue
        for name in names:
            for entry in node.module.entries.get(name, ()):
                planned = entry.method.options(entry.site)
                if entry.options == planned:
                    continue
                changed = {
                    option: value
                    for option, value in _plain(entry.options, planned).items()
                    if isinstance(value, (int, float, str)) and value != planned.get(option)
                }
                if changed:
                    manifest.options.setdefault(name, {}).setdefault(node.path, {}).update(changed)
    return manifest


def _plain(options: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Return options with tensors as numbers, those that only rounding sets apart from what was planned as planned."""
    plain = {option: value.item() if isinstance(value, Tensor) else value for option, value in options.items()}
    for option, value in options.items():
        expected = planned.get(option)
        if not isinstance(value, Tensor) or not isinstance(expected, (int, float)):
            continue
        if torch.tensor(expected, dtype=value.dtype).item() == plain[option]:
            plain[option] = expected
    return plain


def read_manifest(folder_or_repo: str | os.PathLike[str], **hub_keywords: Any) -> Manifest:
    """Return the manifest of a folder or Hub repository; without one, what the folders in it say.

    Raises:
        CheckpointMissingError: neither a manifest nor an adapter is there.
        CheckpointError: the manifest is damaged, or names an adapter or a folder that it must not.
    """
    try:
        path = resolve_file(folder_or_repo, MANIFEST_NAME, **hub_keywords)
    except CheckpointMissingError:
        return _without_manifest(folder_or_repo, **hub_keywords)
    return _parsed(read_json_object(path), path)


def _without_manifest(folder_or_repo: str | os.PathLike[str], **hub_keywords: Any) -> Manifest:
    root = Path(os.fspath(folder_or_repo))
    if not root.is_dir():
        resolve_file(folder_or_repo, CONFIG_NAME, **hub_keywords)  # raises where there is no adapter
        return Manifest({"default": ""}, ("default",))
    folders = {"default": ""} if (root / CONFIG_NAME).is_file() else {}
    for path in sorted(root.iterdir()):
        if path.name != "default" and (path / CONFIG_NAME).is_file():
            folders[check_adapter_name(path.name)] = path.name
    if not folders:
        raise CheckpointMissingError(
            f"{str(root)!r}: expected adapters, found no {CONFIG_NAME} in it or one level below"
        )
    return Manifest(folders, (next(iter(folders)),))


def _parsed(content: dict[str, Any], path: str) -> Manifest:
    def fail(what: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{path}: expected {what}, found {found!r}")

    if content.get("format") != "inlay" or content.get("version") != VERSION:
        raise fail(f"format 'inlay' of version {VERSION}", {key: content.get(key) for key in ("format", "version")})
    adapters, active, enabled = content.get("adapters"), content.get("active"), content.get("enabled")
    if not isinstance(adapters, list) or not all(isinstance(adapter, dict) for adapter in adapters):
        raise fail("a list of objects under 'adapters'", adapters)
    manifest = Manifest({})
    for adapter in adapters:
        name, folder, options = adapter.get("name"), adapter.get("folder"), adapter.get("options", {})
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if name in manifest.folders:
            raise fail("every adapter once under 'adapters'", name)
        if folder != adapter_folder(name):
            raise fail(f"{adapter_folder(name)!r} as 'folder' of adapter {name!r}", folder)
        if not _is_options(options):
            raise fail(f"layer -> option -> number under 'options' of adapter {name!r}", options)
        manifest.folders[name] = folder
        if options:
            manifest.options[name] = options
    if not isinstance(active, list) or not all(name in manifest.folders for name in active):
        raise fail("names of its adapters under 'active'", active)
    if len(set(active)) < len(active):
        raise fail("every name once under 'active'", active)
    if not isinstance(enabled, bool):
        raise fail("true or false under 'enabled'", enabled)
    manifest.active, manifest.enabled = tuple(active), enabled
    return manifest


def _is_options(options: Any) -> bool:
    return isinstance(options, dict) and all(
        isinstance(of_layer, dict) and all(isinstance(value, (int, float, str)) for value in of_layer.values())
        for of_layer in options.values()
    )


def restore(tree: Tree, manifest: Manifest) -> None:
    """Give a model the active adapters, the switch and the changed numbers of a manifest, for the adapters it has.

    Raises:
        CheckpointMismatchError: a number belongs to a layer that does not have the adapter; nothing is changed then.
    """
    layers = {node.path: node.module for node in tree.nodes if isinstance(node.module, AdaptedLayer)}
    writes = []
    for name, options in manifest.options.items():
        if name not in tree.state.records:
            continue
        for path, values in options.items():
            entries = layers[path].entries.get(name, ()) if path in layers else ()
            for option, value in values.items():
                entry = next((entry for entry in entries if option in entry.options), None)
                if entry is None:
                    raise CheckpointMismatchError(
                        f"{MANIFEST_NAME}: adapter {name!r} has no {option!r} at {path!r}.{did_you_mean(path, layers)}"
                    )
                writes.append((entry, option, value))
    set_active(tree.state, [name for name in manifest.active if name in tree.state.records])
    for entry, option, value in writes:
        entry.set(option, value)
    tree.state.enabled = manifest.enabled
    tree.state.touch()
