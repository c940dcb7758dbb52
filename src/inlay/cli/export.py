"""``inlay export``: an adapter written anew for those who serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlay.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


def command(
    path: Annotated[Path, typer.Argument(help="Adapter folder")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter")],
    serving: Annotated[
        bool, typer.Option("--serving", help="Fold rsLoRA and rank and alpha patterns into plain alpha / r")
    ] = False,
    server: Annotated[
        str | None, typer.Option("--for", help="vllm, sglang or llama.cpp; default: one adapter for all three")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="The base model to name; default: the one it names")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, to compare with; default: the one it names")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="What the server is started with; default: whatever is needed")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the tensors' own")] = None,
) -> None:
    """Write an adapter with equal outputs that vLLM, SGLang and llama.cpp serve; says what stands in the way."""
    if not serving:
        raise ConfigError("inlay export: expected --serving, which is all that it writes")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    import torch

    from inlay.checkpoint.serving_export import export_for_serving

    done = export_for_serving(
        path,
        out,
        server=server,
        base_name=base_name,
        base=base,
        max_lora_rank=max_lora_rank,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    for change in done.changes or ("nothing had to be changed",):
        print(change)
    print(f"exported {path} to {out} for {', '.join(done.servers)}: rank {done.rank}")
    if "llama.cpp" not in done.servers or len(done.servers) > 1:
        print(f"vLLM and SGLang have to be started with --max-lora-rank {done.rank} or more")
