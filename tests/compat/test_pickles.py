"""Pickles that real PEFT wrote, of 0.5 and later, are read where Inlay stands in; each side in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "checkpoint" / "releases"
# 0.3 and 0.4 named a module that PEFT itself no longer has.
UNREADABLE = {("0.3.0", "LORA"), ("0.4.0", "LORA"), ("0.4.0", "IA3")}
BUILT = {"LORA", "IA3", "LOHA", "OFT", "VERA", "FOURIERFT", "LN_TUNING", "TRAINABLE_TOKENS"}

INSTALL = "import inlay; inlay.install_as_peft(force=True)\n"
READ = """
import dataclasses, json, pickle, sys, peft
plain = lambda value: sorted(value) if isinstance(value, (set, frozenset)) else str(value)
result = {}
for path in sys.argv[1:]:
    try:
        config = pickle.load(open(path, "rb"))
    except Exception as error:
        result[path] = type(error).__name__
        continue
    names = {field.name for field in dataclasses.fields(config)}
    result[path] = {
        "class": type(config).__module__ + "." + type(config).__name__,
        "same": type(config) is getattr(peft, type(config).__name__),
        "enum": config.peft_type is getattr(peft.PeftType, config.peft_type.value),
        "lacking": sorted(name for name in names if not hasattr(config, name)),
        "values": json.loads(json.dumps({name: getattr(config, name, None) for name in names}, default=plain)),
    }
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def pickles(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Return the pickles by release and method."""
    found = {}
    place = tmp_path_factory.mktemp("pickles")
    for archive in sorted(FIXTURES.glob("*.tar.xz")):
        release = archive.name.removesuffix(".tar.xz")
        with tarfile.open(archive) as file:
            members = [entry for entry in file.getmembers() if entry.name.startswith("configs/")]
            file.extractall(place / release, members, filter="data")
        for path in (place / release / "configs").iterdir():
            if path.name in BUILT:
                found[release, path.name] = path / "config.pickle"
    return found


def read(source: str, paths: list[Path]) -> dict[str, dict]:
    done = subprocess.run([sys.executable, "-c", source, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_release(pickles):
    """Values are those of the file beside the pickle; newer fields have the defaults of the class as it is now."""
    found = read(INSTALL + READ, list(pickles.values()))
    defaults = {
        kind: json.loads(subprocess.run(
            [sys.executable, "-c", "import sys, json, peft\n"
             "config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[sys.argv[1]]()\n"
             "print(json.dumps(config.to_dict(), default=list))", kind],
            capture_output=True, text=True, check=True).stdout)
        for kind in BUILT
    }  # fmt: skip
    assert len(pickles) > 100
    for (release, kind), path in pickles.items():
        entry = found[str(path)]
        if (release, kind) in UNREADABLE:
            assert entry == "ModuleNotFoundError", (release, kind)
            continue
        assert isinstance(entry, dict), (release, kind, entry)
        assert entry["same"], (release, kind)
        assert entry["enum"], (release, kind)
        assert not entry["lacking"], (release, kind)
        said = json.loads(path.with_name("adapter_config.json").read_text())
        for name, value in entry["values"].items():
            if name in ("inference_mode", "runtime_config"):
                continue
            if name == "peft_version":
                assert value == said.get(name, "0.17.1"), (release, kind)
            else:
                assert value == said.get(name, defaults[kind].get(name)), (release, kind, name)


def test_peft_itself_lacks_fields_that_are_newer_than_the_pickle(pickles):
    """docs/differences.md: a class attribute stands in for simple defaults only."""
    paths = [pickles["0.5.0", "LORA"], pickles["0.11.1", "LORA"], pickles["0.21.2", "LORA"]]
    old, middle, new = read(READ, paths).values()
    assert "rank_pattern" in old["lacking"]
    assert middle["lacking"] == ["runtime_config"]
    assert not new["lacking"]


def test_enums_by_value(tmp_path):
    """As Trainer states and argument files hold them."""
    path = tmp_path / "enums.pickle"
    write = f"import pickle, peft; pickle.dump([*peft.PeftType, *peft.TaskType], open({str(path)!r}, 'wb'))"
    subprocess.run([sys.executable, "-c", write], check=True)
    source = INSTALL + (
        f"import pickle, peft; found = pickle.load(open({str(path)!r}, 'rb'))\n"
        "assert all(a is b for a, b in zip(found, [*peft.PeftType, *peft.TaskType], strict=True)), found\n"
        "assert peft.PeftType is inlay.PeftType and found[4] is inlay.PeftType.LORA\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
