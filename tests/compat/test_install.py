"""Standing in for peft: what it changes, and when it refuses. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from inlay.compat.shim import shim_folder


def run(source: str, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(arguments or ("-c", source))]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def ok(source: str, **kwargs: str) -> str:
    done = run(source, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


IS_OURS = """
import sys, importlib.metadata, peft, inlay, inlay.compat.peft
assert peft is inlay.compat.peft and peft.LoraConfig is inlay.LoraConfig
from peft.tuners.lora import layer
assert layer is sys.modules["inlay.compat.peft.tuners.lora.layer"] is peft.tuners.lora.layer
from inlay.core.policy import PEFT, default_policy
assert default_policy() is PEFT
print(peft.__version__, importlib.metadata.version("peft"))
from transformers.utils import is_peft_available
from transformers.utils.import_utils import is_peft_greater_or_equal
assert is_peft_available() and is_peft_greater_or_equal("0.21.0")
from accelerate.utils import is_peft_available
assert is_peft_available()
"""


def test_installed_by_a_call():
    assert ok("import inlay; inlay.install_as_peft(force=True)\n" + IS_OURS).split() == ["0.21.2"] * 2


def test_the_claimed_version_can_be_chosen():
    source = "import inlay; inlay.install_as_peft('0.19.1', force=True); import peft, importlib.metadata as m"
    assert ok(source + "; print(peft.__version__, m.version('peft'))").split() == ["0.19.1"] * 2


def test_installed_by_a_folder_on_the_path():
    assert ok(IS_OURS, path=str(shim_folder())).split() == ["0.21.2"] * 2


def test_a_folder_of_another_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shim_folder("0.19.1")
    assert shim_folder("0.19.1") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["peft-0.19.1"]
    source = "import peft, importlib.metadata as m; print(peft.__version__, m.version('peft'))"
    assert ok(source, path=str(folder)).split() == ["0.19.1"] * 2


def test_children_inherit_the_folder(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, peft\n"
        "child = 'import peft, inlay; print(peft.LoraConfig is inlay.LoraConfig)'\n"
        "print(sys.argv[1:], subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout)\n"
        "sys.exit(3)\n"
    )
    done = run("", "-m", "inlay", "run", "--force", str(script), "--debug", "-x")
    assert done.returncode == 3, done.stderr
    assert "['--debug', '-x'] True" in done.stdout


def test_a_module_can_be_run(tmp_path):
    (tmp_path / "job.py").write_text("import peft; print(__name__, peft.__name__)")
    done = subprocess.run(
        [sys.executable, "-m", "inlay", "run", "--force", "-m", "job"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.split() == ["__main__", "inlay.compat.peft"], done.stderr


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("import peft", "peft was imported already"),
        ("pass", "peft is installed"),
    ],
)
def test_refused_where_it_would_come_too_late(before, expected):
    done = run(f"{before}\nimport inlay; inlay.install_as_peft()")
    assert done.returncode != 0
    assert expected in done.stderr


def test_refused_after_something_looked_for_peft_in_vain(tmp_path):
    """transformers.trainer, imported where peft cannot be found, has no PeftModel."""
    hide = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a)\n"
        "import transformers.trainer\nu.find_spec = find\n"
    )
    done = run(hide + "import inlay; inlay.install_as_peft(force=True)")
    assert done.returncode != 0
    assert "transformers.trainer looked for peft" in done.stderr.replace(", transformers.trainer_utils", "")


def test_a_cached_answer_is_forgotten():
    hide = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a)\n"
        "from transformers.utils import is_peft_available\nassert not is_peft_available()\nu.find_spec = find\n"
    )
    ok(hide + "import inlay; inlay.install_as_peft(force=True); assert is_peft_available()")


def test_twice_is_once():
    ok("import inlay; a = inlay.install_as_peft(force=True); assert inlay.install_as_peft() is a")


def test_wrong_calls_name_what_is_wrong():
    for version in ("new", "0garbage", "0.21.2 ", "0/../..", 0.21):
        assert "expected a version" in run(f"import inlay; inlay.install_as_peft({version!r})").stderr
    done = run("", "-m", "inlay", "run", "nothing.py")
    assert (done.returncode, "no script 'nothing.py'" in done.stderr) == (2, True)


def test_pickles_name_places_of_peft():
    """What is pickled while standing in is read by the real peft, and the other way round."""
    write = "import inlay; inlay.install_as_peft(force=True)\nimport peft, pickle, sys\n"
    config = "peft.LoraConfig(r=4, target_modules=['a'], task_type=peft.TaskType.CAUSAL_LM)"
    ours = ok(write + f"print(pickle.dumps({config}).hex())").strip()
    theirs = ok(f"import peft, pickle; print(pickle.dumps({config}).hex())").strip()
    read = (
        "import peft, pickle; c = pickle.loads(bytes.fromhex('{}')); print(type(c).__module__, c.r, c.peft_type.value)"
    )
    assert ok(read.format(ours)).split() == ["peft.tuners.lora.config", "4", "LORA"]
    back = ok(write + read.format(theirs) + "; import inlay; assert type(c) is inlay.LoraConfig")
    assert back.split()[1:] == ["4", "LORA"]
    assert b"inlay" not in bytes.fromhex(ours)  # parts (LoraRuntimeConfig) included: PEFT reads it without Inlay


def test_type_hints_and_pickles_of_names_that_are_not_there_yet():
    ok(
        "import inlay; inlay.install_as_peft(force=True)\nimport peft, pickle, typing\n"
        "hints = typing.get_type_hints(peft.LoraConfig); assert hints['runtime_config'] is peft.LoraRuntimeConfig\n"
        "assert hasattr(peft, '__file__')\n"
        "for name in [name for name in peft.__all__ if type(getattr(peft, name)).__name__ == 'Unavailable']:\n"
        "    held = getattr(peft, name); assert pickle.loads(pickle.dumps(held)) is held is getattr(peft, name), name\n"
    )


def test_modules_keep_their_specs_when_threads_import_them():
    ok(
        "import inlay; inlay.install_as_peft(force=True)\nimport sys, threading, importlib\n"
        "from inlay.compat.namespace import table\nsys.setswitchinterval(1e-6)\n"
        "names = [f'peft.{name}' for name in table() if name]\n"
        "def every(part): [importlib.import_module(name) for name in part]\n"
        "threads = [threading.Thread(target=every, args=(names[i::8],)) for i in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "for name in names:\n"
        "    assert sys.modules[name].__spec__.name == f'inlay.compat.{name}', name\n"
    )


def test_a_folder_of_that_name_is_not_an_installed_peft(tmp_path):
    """A checkout of peft in the working directory, say, where peft is not installed."""
    (tmp_path / "peft").mkdir()
    hide = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path]\nfrom importlib import machinery\n"
        "find = machinery.PathFinder.find_spec\n"
        "def hidden(name, path=None, target=None):\n"
        f"    return find(name, [{str(tmp_path)!r}] if name == 'peft' else path, target)\n"
        "machinery.PathFinder.find_spec = hidden\n"
    )
    ok(hide + "import inlay; inlay.install_as_peft(); import peft; assert peft.LoraConfig is inlay.LoraConfig")
