"""Makes the fixtures: an environment for every release of peft, the folders that it writes, and an archive of them.

    python make.py WORK [RELEASE ...]

``WORK`` takes the environments, some 3 GB. Needs PyPI, Python 3.11 and a constraints file that gives a CPU build of
torch (``constraints.txt``). Releases share torch, and transformers by generation; each has peft in a folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[2] / "constraints.txt"
PLAIN = ["torch", "numpy", "safetensors", "pyyaml", "packaging", "psutil", "tqdm", "filelock", "regex", "requests"]
HUB = ["fsspec", "httpx2", "hf-xet", "typer", "click"]

# transformers, accelerate, huggingface_hub and tokenizers that a generation of releases can be imported with
GENERATIONS = {
    "2024": ["transformers==4.46.3", "accelerate==0.34.2", "huggingface_hub==0.26.5", "tokenizers==0.20.3"],
    "2025": ["transformers==4.56.2", "accelerate==1.10.1", "huggingface_hub==0.35.3", "tokenizers==0.22.1"],
    "2026": ["transformers==5.23.0", "accelerate==1.15.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3"],
}
RELEASES = {
    **dict.fromkeys(["0.3.0", "0.4.0", "0.5.0", "0.6.2", "0.7.1", "0.8.2", "0.9.0", "0.10.0"], "2024"),
    **dict.fromkeys(["0.11.1", "0.12.0", "0.13.2", "0.14.0", "0.15.2", "0.16.0"], "2024"),
    **dict.fromkeys(["0.17.1", "0.18.0", "0.18.1"], "2025"),
    **dict.fromkeys(["0.19.0", "0.19.1", "0.20.0", "0.21.2"], "2026"),
}


def install(python: Path, target: Path, *packages: str) -> None:
    """Install packages without their dependencies into a folder, once."""
    if not (target / "done").exists():
        options = ["-q", "--no-deps", "--target", str(target)]
        subprocess.run([python, "-m", "pip", "install", *options, *packages], check=True)
        (target / "done").touch()


def prepared(work: Path) -> Path:
    """Return the interpreter that has torch and nothing of a release."""
    python = work / "base" / "bin" / "python"
    if not python.exists():
        venv.create(work / "base", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *PLAIN, *HUB], check=True)
    return python


def make(work: Path, release: str) -> dict[str, str]:
    """Write one release's folders and their archive; return what was made."""
    python, generation = prepared(work), RELEASES[release]
    stack, own, out = work / generation, work / "peft" / release, work / "out" / release
    install(python, stack, *GENERATIONS[generation])
    install(python, own, f"peft=={release}")
    out.mkdir(parents=True, exist_ok=True)
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join([str(own), str(stack)])}
    subprocess.run([python, HERE / "write.py", out], check=True, env=environment)
    with tarfile.open(HERE / f"{release}.tar.xz", "w:xz", preset=9) as file:
        for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "made.json"):
            entry = tarfile.TarInfo(str(path.relative_to(out)))  # without owner and time
            entry.size = path.stat().st_size
            with path.open("rb") as content:
                file.addfile(entry, content)
    return json.loads((out / "made.json").read_text())


if __name__ == "__main__":
    work, chosen = Path(sys.argv[1]).absolute(), sys.argv[2:] or list(RELEASES)
    record = HERE / "made.json"
    made = json.loads(record.read_text()) if record.exists() else {}
    for release in chosen:
        print(release, flush=True)
        made[release] = make(work, release)
    record.write_text(json.dumps({release: made[release] for release in RELEASES if release in made}, indent=1) + "\n")
