"""Uploading what has a ``save_pretrained`` to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from inlay.config.files import import_hub

__all__ = ["PushToHub", "push_folder"]


class _Saves(Protocol):
    def save_pretrained(self, save_directory: str, /) -> None: ...


class PushToHub:
    """Adds ``push_to_hub`` to a class with ``save_pretrained(folder)``."""

    def push_to_hub(
        self: _Saves,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Save to a Hub repository, which is created where it does not exist.

        Args:
            repo_id: ``name`` or ``owner/name``.
            commit_message, commit_description: of the commit.
            private: whether a new repository is private.
            token: the Hub token, or True for the stored one.
            revision: a branch, created where it does not exist.
            create_pr: propose the change instead of making it.
            max_shard_size: accepted for callers of PEFT; adapter files are never split.
            tags: added to the model card.

        Returns:
            The commit, as ``huggingface_hub`` describes it.

        Raises:
            MissingExtraError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
) -> Any:
    """Upload a folder's files to a Hub repository, which is created where it does not exist.

    ``tags`` are added to the model card: the folder's ``README.md`` or, without one, the repository's.

    Returns:
        What ``huggingface_hub.HfApi.upload_folder`` returns: the commit.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = import_hub(f"Uploading to the Hub repository {repo_id!r}")
    api = hub.HfApi(token=token, library_name="inlay")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if tags:
        _tag_card(hub, Path(folder), repo_id, list(tags), token)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message=commit_message,
        commit_description=commit_description or "",
        revision=revision,
        create_pr=create_pr,
    )


def _tag_card(hub: Any, folder: Path, repo_id: str, tags: list[str], token: bool | str | None) -> None:
    readme = folder / "README.md"
    if readme.is_file():
        card = hub.ModelCard.load(readme)
    else:
        try:
            card = hub.ModelCard.load(repo_id, token=token)
        except hub.errors.EntryNotFoundError:
            card = hub.ModelCard("---\nlibrary_name: peft\n---\n")
    card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
    card.save(readme)
