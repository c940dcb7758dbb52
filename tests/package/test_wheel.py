"""The wheel, in an environment that has nothing but what it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE = """
import importlib.util, sys
import torch, inlay
from torch import nn

assert importlib.util.find_spec("transformers") is None and importlib.util.find_spec("accelerate") is None
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
x = torch.randn(3, 8)
before = base(x)
model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
after = model(x)
assert not torch.allclose(before, after)
model.save_pretrained("adapter")
torch.manual_seed(0)
fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
loaded = inlay.PeftModel.from_pretrained(fresh, "adapter")
assert torch.equal(loaded(x), after)
assert torch.equal(loaded.unload()(x), before)
print("used")
"""


def run(*command: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "inlay/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"inlay"}
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    installed = run(
        python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path
    )
    assert installed.returncode == 0, installed.stderr
    used = run(python, "-c", USE, cwd=tmp_path)
    assert used.returncode == 0, used.stdout + used.stderr
    assert "used" in used.stdout
    # The command line needs an extra, and says so instead of failing on an import.
    told = run(home / "bin" / "inlay", "plan", cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert told.returncode != 0
    assert "pip install 'inlay[train]'" in told.stdout + told.stderr
    assert "Traceback" not in told.stdout + told.stderr
