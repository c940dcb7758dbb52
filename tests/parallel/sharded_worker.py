"""One process of several: runs every case of one way of sharding; the first process writes the outcomes as JSON.

Usage: torchrun --nproc_per_node N sharded_worker.py WAY FILE [CASE ...]
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def main() -> None:
    way, target, only = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes: dict[str, str] = {}
    for name, case in importlib.import_module(f"sharded_{way}").CASES.items():
        if only and name not in only:
            continue
        started, mine = time.time(), ""
        try:
            case()
        except (Exception, pytest.fail.Exception):
            mine = f"process {dist.get_rank()}:\n{traceback.format_exc()}"
        every: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        outcomes[name] = "\n".join(filter(None, every))
        if dist.get_rank() == 0:
            print(f"{name}: {'failed' if outcomes[name] else 'passed'} in {time.time() - started:.1f} s", flush=True)
            target.write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
