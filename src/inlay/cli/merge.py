"""``inlay merge``: base and adapter become one ordinary model folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from inlay.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


def command(
    adapter: Annotated[Path, typer.Option(help="Adapter folder")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model and its tokenizer")],
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's own. Merging is done before")
    ] = None,
    by_shard: Annotated[
        bool, typer.Option("--by-shard", help="Read, merge and write the base folder's files one by one")
    ] = False,
) -> None:
    """Write the merged model with its tokenizer; transformers loads the folder without inlay."""
    from inlay.training.output import refuse_used
    from inlay.training.pretrained import load_adapted

    refuse_used(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    if by_shard:
        _by_shard(adapter, out, model, dtype)
        return
    adapted, tokenizer, _ = load_adapted(adapter, model)
    merged = adapted.merge_and_unload(safe_merge=True)
    if dtype is not None:
        import torch

        merged = merged.to(getattr(torch, dtype))
    # Under another name until it is whole: a folder called `out` is a model that can be loaded.
    staging = out.with_name(out.name + ".unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        merged.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        if out.is_dir():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _report(adapter, out)


def _by_shard(adapter: Path, out: Path, model: str | None, dtype: str | None) -> None:
    import torch

    from inlay.models.merge_disk import merge_checkpoint
    from inlay.training.pretrained import read_adapter_config

    base = model or read_adapter_config(adapter).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise ConfigError(
            f"--by-shard reads the base model from a folder on this machine, found {base!r}; give --model"
        )
    merge_checkpoint(base, adapter, out, dtype=None if dtype is None else getattr(torch, dtype))
    _report(adapter, out)


def _report(adapter: Path, out: Path) -> None:
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"merged {adapter} into {out}: {size:,} bytes")
