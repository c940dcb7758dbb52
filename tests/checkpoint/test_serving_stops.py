"""What stops an export for serving: everything that a server would refuse or get wrong, and nothing is written then."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from serving_adapters import BROKEN, edit, rewrite, save
from serving_oracle import deltas, loaded
from serving_readers import READERS

from inlay.checkpoint.serving import SERVERS, check, problems
from inlay.checkpoint.serving_export import export_for_serving
from inlay.errors import CheckpointError, UnsupportedError

UNEXPORTABLE = [
    "method", "fields", "factors", "matrices", "variants", "changed base", "dora", "finite", "modules_to_save",
    "lora_bias", "tokens", "activated", "parameters", "left out", "partners", "base name", "norms",
]  # fmt: skip


@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_what_cannot_be_expressed_stops_the_export(name, tmp_path):
    folder, options = BROKEN[name](tmp_path / "source")
    with pytest.raises(UnsupportedError, match="Remedy"):
        export_for_serving(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


OF_THE_BASE = ["embeddings", "tied head", "base", "architecture"]


@pytest.mark.parametrize("name", sorted(set(BROKEN) - {*UNEXPORTABLE, *OF_THE_BASE}))
def test_whatever_else_is_mended(name, tmp_path):
    folder, _ = BROKEN[name](tmp_path / "source")
    done = export_for_serving(folder, tmp_path / "out")
    for server in SERVERS:
        assert not problems(check(tmp_path / "out", server, max_lora_rank=done.rank))


def test_every_reason_at_once(tmp_path):
    source = save(
        tmp_path / "source", use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[1], r=20, name=None
    )
    with pytest.raises(UnsupportedError) as stopped:
        export_for_serving(source, tmp_path / "out", max_lora_rank=16)
    text = str(stopped.value)
    for reason in ("use_dora is true", "'lm_head'", "trainable_token_indices", "rank 20", "--base-name", "inlay merge"):
        assert reason in text
    assert not (tmp_path / "out").exists()


def test_one_server_alone_may_take_more(tmp_path):
    source = save(tmp_path / "source", target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match=r"sglang: .*q_proj without v_proj"):
        export_for_serving(source, tmp_path / "out")
    export_for_serving(source, tmp_path / "out", server="vllm")
    assert READERS["vllm"](tmp_path / "out").keys() == deltas(loaded(source)).keys()


def test_patterns_that_peft_and_inlay_read_differently_stop(tmp_path):
    """Inlay takes a prefix of the path in a pattern and PEFT does not: whose scale is meant is not for us to say."""
    source = save(tmp_path / "source", alpha_pattern={"model.layers.1": 3})
    with pytest.raises(UnsupportedError, match=r"prefix of 'model\.layers\.1"):
        export_for_serving(source, tmp_path / "out")
    edit(source, rank_pattern={"v_proj": 3}, alpha_pattern={})
    with pytest.raises(UnsupportedError, match=r"expected rank 3 at .*v_proj.*, found 4"):
        export_for_serving(source, tmp_path / "out")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from inlay.checkpoint.commit import Commit

    source = save(tmp_path / "source", use_rslora=True)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Commit, "stage_text", fail)
    with pytest.raises(OSError, match="disk full"):
        export_for_serving(source, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_used_folders_are_left_alone(tmp_path):
    source = save(tmp_path / "source")
    shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="not empty"):
        export_for_serving(source, source)
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_overflow_stops(tmp_path):
    source = save(tmp_path / "source", alpha_pattern={"v_proj": 8e6})
    rewrite(source, lambda tensors: {key: value.half() for key, value in tensors.items()})
    with pytest.raises(UnsupportedError, match=r"v_proj\.lora_B\.weight: scaled, it overflows torch\.float16"):
        export_for_serving(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_for_serving(source, tmp_path / "out", dtype=torch.bfloat16)
