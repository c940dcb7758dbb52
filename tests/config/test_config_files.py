from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from config_classes import HadamardConfig

from inlay.config import CONFIG_NAME, PeftConfig, read_json_object, resolve_file, write_atomically
from inlay.errors import CheckpointError, CheckpointMissingError, MissingExtraError

COMMIT = "0" * 40


@pytest.fixture
def hub_cache(tmp_path):
    """A Hub cache that holds one repository, as huggingface_hub lays it out."""
    repo = tmp_path / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for folder in ("", "sub"):
        HadamardConfig(r=3 if folder else 2).save_pretrained(repo / "snapshots" / COMMIT / folder)
    return tmp_path


def test_local_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "adapter" / "sub").mkdir(parents=True)
    for name in ("a.bin", "sub/b.bin"):
        (tmp_path / "someone" / "adapter" / name).write_text(name)
    assert resolve_file("someone/adapter", "a.bin") == os.path.join("someone/adapter", "a.bin")
    assert resolve_file(tmp_path / "someone/adapter", "b.bin", "sub") == str(tmp_path / "someone/adapter/sub/b.bin")


def test_the_cache_answers_offline(hub_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert PeftConfig.from_pretrained("someone/adapter", cache_dir=hub_cache) == HadamardConfig(r=2)
    assert PeftConfig.from_pretrained("someone/adapter", subfolder="sub", cache_dir=hub_cache) == HadamardConfig(r=3)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = resolve_file("someone/adapter", CONFIG_NAME, cache_dir=hub_cache, local_files_only=True)
    assert path == str(hub_cache / "models--someone--adapter" / "snapshots" / COMMIT / CONFIG_NAME)


def test_a_file_that_is_in_no_place(hub_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for repo, revision in (("someone/adapter", None), ("someone/else", "v1")):
        with pytest.raises(CheckpointMissingError, match="in the local Hub cache") as caught:
            resolve_file(repo, "adapter_model.bin", "sub", cache_dir=hub_cache, revision=revision)
        for part in ("'sub/adapter_model.bin'", f"'{repo}'", revision or "default"):
            assert part in str(caught.value)


@pytest.mark.parametrize("place", ["./out", "/no/such/folder", "a/b/c", "../x", "~/x"])
def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(place, monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointMissingError, match="does not exist") as caught:
        resolve_file(place, CONFIG_NAME)
    assert place in str(caught.value)


def test_keywords_reach_the_hub_client(monkeypatch, tmp_path):
    import huggingface_hub

    HadamardConfig(r=5).save_pretrained(tmp_path)
    asked = {}

    def download(repo, filename, **keywords):
        asked.update(keywords, repo=repo, filename=filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert PeftConfig.from_pretrained("someone/adapter", subfolder="s", revision="v1", token="t").r == 5
    assert asked == {
        "repo": "someone/adapter",
        "filename": CONFIG_NAME,
        "subfolder": "s",
        "revision": "v1",
        "token": "t",
        "local_files_only": False,
    }


def test_without_the_hub_client(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'inlay\[hub\]'") as caught:
        resolve_file("someone/adapter", CONFIG_NAME)
    assert isinstance(caught.value, ImportError)
    with pytest.raises(MissingExtraError, match="someone/adapter"):
        HadamardConfig().push_to_hub("someone/adapter")
    with pytest.raises(CheckpointMissingError):
        resolve_file(tmp_path, CONFIG_NAME)


@pytest.mark.parametrize(("tags", "has_card"), [(None, True), (["loha", "mine"], True), (["loha", "mine"], False)])
def test_push_to_hub(monkeypatch, tags, has_card):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token, library_name):
            calls.append(("token", token))

        def create_repo(self, repo_id, **keywords):
            calls.append(("create_repo", repo_id, keywords))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def create_branch(self, repo_id, **keywords):
            calls.append(("create_branch", repo_id, keywords))

        def upload_folder(self, *, folder_path, **keywords):
            files = {path.name: path.read_text() for path in Path(folder_path).iterdir()}
            calls.append(("upload_folder", files, keywords))
            return "the commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    card = huggingface_hub.ModelCard("---\ntags:\n- mine\n---\nText")

    def load(*_, **__):
        if not has_card:
            raise huggingface_hub.errors.EntryNotFoundError("no README.md")
        return card

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", staticmethod(load))
    config = HadamardConfig(r=5)
    made = config.push_to_hub("adapter", commit_message="m", private=True, token="t", revision="dev", tags=tags)
    assert made == "the commit"
    token, create, branch, (_, files, keywords) = calls
    assert token == ("token", "t")
    assert create == ("create_repo", "adapter", {"private": True, "exist_ok": True})
    assert branch == ("create_branch", "someone/adapter", {"branch": "dev", "exist_ok": True})
    assert files[CONFIG_NAME] == config.to_json()
    assert (keywords["repo_id"], keywords["commit_message"], keywords["revision"]) == ("someone/adapter", "m", "dev")
    assert set(files) == ({CONFIG_NAME, "README.md"} if tags else {CONFIG_NAME})
    if tags:
        assert ("- mine\n- loha\n" if has_card else "- loha\n- mine\n") in files["README.md"]
        assert ("Text" in files["README.md"]) == has_card


def test_atomic_writing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "grün")
    assert path.read_bytes() == "grün".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == "grün".encode()


def test_json_files_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "big.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    monkeypatch.setattr("inlay.config.files.LARGEST_JSON", 50)
    with pytest.raises(CheckpointError, match=r"big\.json: expected at most 50 bytes of JSON, found 109"):
        read_json_object(path)
    with pytest.raises(CheckpointMissingError, match=r"none\.json"):
        read_json_object(tmp_path / "none.json")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json_object(tmp_path)
