"""Adapter files: their names, finding them in a folder or on the Hub, reading and writing them safely."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from inlay.errors import CheckpointError, CheckpointMissingError, MissingExtraError

__all__ = [
    "CONFIG_NAME",
    "HUB_KEYWORDS",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "import_hub",
    "read_json_object",
    "resolve_file",
    "write_atomically",
]

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

# Keywords that `huggingface_hub.hf_hub_download` takes, in its versions since 0.30.
HUB_KEYWORDS = frozenset(
    {"cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version"}
    | {"local_dir", "local_files_only", "proxies", "repo_type", "resume_download", "revision", "token", "user_agent"}
)
LARGEST_JSON = 16 * 2**20  # bytes; a real configuration is a few kilobytes

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def import_hub(purpose: str) -> Any:
    """Return the module ``huggingface_hub``.

    Raises:
        MissingExtraError: it is not installed; the message begins with ``purpose``.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs huggingface_hub: pip install 'inlay[hub]'") from error
    return huggingface_hub


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def resolve_file(
    path_or_repo: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub_keywords: Any
) -> str:
    """Return the local path of ``filename``, from a folder or else from the Hub (its cache, when offline).

    Args:
        path_or_repo: a local folder or the name of a Hub repository.
        filename: the file inside it.
        subfolder: a folder between the two.
        hub_keywords: passed on to ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, ...

    Raises:
        CheckpointMissingError: the file is in neither place; says where it was looked for and why that failed.
        MissingExtraError: it is not local, and huggingface_hub is not installed.
    """
    place = os.fspath(path_or_repo)
    local = Path(place, subfolder or "", filename)
    if local.is_file():
        return str(local)
    wanted = f"{subfolder}/{filename}" if subfolder else filename
    # A path such as ./out or /data/out names a folder and nothing else: do not ask the network about it.
    if not _REPO_ID.fullmatch(place):
        missing = "has no such file" if Path(place).is_dir() else "does not exist"
        raise CheckpointMissingError(f"Expected the file {wanted!r} in the folder {place!r}, which {missing}.")
    if hub_keywords.get("local_files_only") is None or _offline():
        hub_keywords["local_files_only"] = _offline()
    hub = import_hub(f"There is no file {str(local)!r}, and looking for {wanted!r} in the Hub repository {place!r}")
    try:
        return str(hub.hf_hub_download(place, filename, subfolder=subfolder, **hub_keywords))
    except TypeError:
        raise  # a keyword that this version of the Hub client does not take
    except Exception as error:  # the client raises its own, the transport's and the system's errors
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        where = "in the local Hub cache (offline)" if hub_keywords["local_files_only"] else "on the Hub"
        raise CheckpointMissingError(
            f"Expected the file {wanted!r}: it is not at {str(local)!r}, and {where}, repository {place!r}, "
            f"revision {hub_keywords.get('revision') or 'default'!r}, it could not be had ({reason})."
        ) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointMissingError: there is no such file.
        CheckpointError: too large, not UTF-8, not JSON, a key that stands twice, or no object at the top.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path}: expected at most {LARGEST_JSON} bytes of JSON, found {size}.")
        found = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except FileNotFoundError as error:
        raise CheckpointMissingError(f"{path}: expected a JSON file, found none.") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, found one that cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that its name leads to the old content or to all of the new, whatever happens in between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
