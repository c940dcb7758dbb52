"""Run PEFT's own tests against Inlay, and count: ``python tests/peft_suite/run.py`` in an environment with real PEFT.

The tests come from PEFT's source distribution and stay as they are. Each file runs twice in processes of its own: with
PEFT, which says what can pass here (offline, on the CPU), and with Inlay behind ``import peft``. A test counts when it
passes with PEFT and every method that it uses is built.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from count import FLOOR, Known, figures, needs_built, page, read_results, summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "compatibility-suite.md"
VERSION = "0.21.2"
# Largest first, so that two processes end together. Left out: what needs a GPU or a package that is not offline.
FILES = [
    *("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier"),
    *("initialization", "trainable_tokens", "target_parameters", "tuners_utils", "config", "low_level_api", "other"),
    *("mixed", "lora_conversion", "stablediffusion", "helpers", "integrations", "lora_variants"),
    *("token_classification_qa", "vision_models", "auto", "hub_features", "incremental_pca", "lorafa"),
    *("riemannian_lora", "loraplus", "vera", "lora_intruders", "mapping", "bufferdict", "quantization"),
]
# What warns about PEFT under a newer transformers is no error here, unlike in PEFT's own settings.
INI = "[pytest]\nmarkers =\n" + "".join(
    f"    {name}: of PEFT\n" for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
)


def sources(place: Path, given: Path | None) -> Path:
    """Return the folder of PEFT's source distribution, fetched and unpacked when it is not there."""
    folder = place / f"peft-{VERSION}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as fetched:
        if given is None:
            wanted = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", f"peft=={VERSION}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *wanted, "-d", fetched], check=True)
            given = next(Path(fetched).glob("peft-*.tar.gz"))
        with tarfile.open(given) as archive:
            archive.extractall(place, filter="data")
    shutil.rmtree(folder / "src")  # `peft` is what the environment says
    (folder / "tests" / "__init__.py").touch()  # left out of the distribution; the tests import one another
    (place / "pytest.ini").write_text(INI, encoding="utf-8")
    return folder


def environment(place: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that has no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT / "src")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(place / "hub"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def run_file(place: Path, name: str, side: str, seconds: int) -> None:
    """Run one file of tests on one side; results and output lie in ``place``/``side``."""
    results = place / side / f"{name}.jsonl"
    results.parent.mkdir(exist_ok=True)
    partial = results.with_suffix(".partial")
    more = {"PEFT_SUITE_SIDE": side, "PEFT_SUITE_RESULTS": str(partial), "PEFT_SUITE_NEEDS": ",".join(needs_built())}
    options = ["-q", "-p", "no:cacheprovider", "-p", "offline", "--tb=short", "--timeout", "120"]
    command = [sys.executable, "-m", "pytest", "-c", str(place / "pytest.ini"), "--rootdir", ".", *options]
    with results.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(
                [*command, f"tests/test_{name}.py"],
                cwd=place / f"peft-{VERSION}",
                env=environment(place, **more),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{side} {name}: stopped after {seconds} s", file=sys.stderr)
    if partial.exists():
        partial.replace(results)
    print(f"{side:6} {name:28} {summary(results)}", flush=True)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what is asked for, write the page, and return 1 below the floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=FILES, help="files, without test_ and .py (default: all)")
    parser.add_argument("--place", type=Path, default=ROOT / "build" / "peft-suite", help="folder of tests and results")
    parser.add_argument("--sdist", type=Path, help="peft's source distribution, instead of fetching it")
    parser.add_argument("--baseline", action="store_true", help="run PEFT again where results of it are there")
    parser.add_argument("--count-only", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=1500, help="time limit of a file")
    parser.add_argument("--failures", action="store_true", help="print each test that fails")
    asked = parser.parse_args(arguments)
    place = asked.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    if not asked.count_only:
        sources(place, asked.sdist)
        if not (place / "hub").exists():
            subprocess.run([sys.executable, HERE / "hub.py", place / "hub"], env=environment(place), check=True)
        runs = [
            (place, name, side, asked.seconds)
            for name in asked.names
            for side in ("peft", "inlay")
            if side == "inlay" or asked.baseline or not (place / side / f"{name}.jsonl").exists()
        ]
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda run: run_file(*run), runs))
    known = Known(HERE / "known.toml")
    rows = {
        name: figures(
            read_results(place / "peft" / f"{name}.jsonl"), read_results(place / "inlay" / f"{name}.jsonl"), known
        )
        for name in asked.names
    }
    text = page(rows, known)
    print(text)
    if asked.failures:
        for row in rows.values():
            print("\n".join(row.failures))
    if list(asked.names) == FILES:
        PAGE.write_text(text, encoding="utf-8")
    counted = sum(row.counted for row in rows.values())
    return int(counted == 0 or sum(row.passed + row.worded for row in rows.values()) < FLOOR * counted)


if __name__ == "__main__":
    sys.exit(main())
