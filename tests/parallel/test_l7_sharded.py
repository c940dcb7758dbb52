"""Law L7: sharded equals unsharded. Each way of sharding runs once, in processes of its own, over all its cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from inlay.core.registry import BUILTIN_METHODS

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
# way of sharding -> processes
WAYS = {"tp": 2, "fsdp": 2, "ddp": 2, "grid": 4}
try:
    import transformers.distributed.tensor_parallel  # noqa: F401
except ImportError:
    pass  # before transformers 5.17, whose tensor parallelism is refused
else:
    WAYS["transformers"] = 2

sys.path.insert(0, str(HERE))
CASES = [(way, case) for way in WAYS for case in import_module(f"sharded_{way}").CASES]

MODEL, FURTHER = (import_module(f"sharded_{name}") for name in ("model", "further"))

_outcomes: dict[str, dict[str, str]] = {}


def outcomes(way: str, folder: Path) -> dict[str, str]:
    """Run a way once and return what each case said: nothing if it passed, otherwise the tracebacks."""
    if way not in _outcomes:
        target = folder / f"{way}.json"
        paths = [str(SOURCE), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        run = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(WAYS[way])),
                *(str(HERE / "sharded_worker.py"), way, str(target)),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        found = json.loads(target.read_text()) if target.exists() else {}
        _outcomes[way] = {**found, "": f"exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"}
    return _outcomes[way]


def test_every_method_is_sharded() -> None:
    configs = [config() for config in (*MODEL.METHODS.values(), *FURTHER.FURTHER.values())]
    assert {config.peft_type.value for config in configs} == set(BUILTIN_METHODS)


@pytest.mark.parametrize(("way", "case"), CASES, ids=[f"{way}-{case}" for way, case in CASES])
def test_sharded_equals_unsharded(way: str, case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = outcomes(way, tmp_path_factory.mktemp(way))
    assert case in found, f"the processes ended before this case: {found['']}"
    assert not found[case], found[case]
