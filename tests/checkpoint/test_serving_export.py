"""Exports for serving: PEFT, Inlay and each server compute with them what PEFT computes with the original."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from serving_adapters import BROKEN, PLAIN, edit, llama, rewrite, save  # noqa: E402
from serving_oracle import assert_equal_to, deltas, loaded, logits  # noqa: E402
from serving_readers import READERS  # noqa: E402

from inlay.checkpoint.serving import check, problems  # noqa: E402
from inlay.checkpoint.serving_export import export_for_serving  # noqa: E402
from inlay.errors import UnsupportedError  # noqa: E402


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    llama().save_pretrained(str(folder))
    return folder


EXPORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rslora of an odd rank": {"use_rslora": True, "r": 5, "lora_alpha": 7},
    "ranks": {"rank_pattern": {"v_proj": 2, "gate_proj": 7}},
    "alphas": {"alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3, "gate_proj": 64.5}},
    "all of it": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6, r"layers\.0\.mlp\.\w+": 3},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5},
    },
    "expression": {"target_modules": r".*\.(q_proj|v_proj)", "alpha_pattern": {"v_proj": 2}},
    "some layers": {"layers_to_transform": [1], "use_rslora": True},
    "all linear": {"target_modules": "all-linear", "rank_pattern": {"o_proj": 9}},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "bias of nothing": {"bias": "all"},
    "zero alpha of some": {"alpha_pattern": {"v_proj": 0}},
}  # fmt: skip


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_equal_the_original(case, tmp_path, base_folder):
    """PEFT computes the same from both, and so does each server from the exported files alone."""
    source = save(tmp_path / "source", **EXPORTS[case])
    before = loaded(source)
    done = export_for_serving(source, tmp_path / "out", base=base_folder)
    after = loaded(tmp_path / "out")
    assert not torch.allclose(logits(before), logits(llama()), atol=1e-3)
    assert_equal_to(logits(after), logits(before), 1e-5)
    right = deltas(before)
    for server, read in READERS.items():
        served = read(tmp_path / "out")
        assert served.keys() == right.keys()
        for module in right:
            assert_equal_to(served[module], right[module])
        assert not problems(check(tmp_path / "out", server, base=base_folder, max_lora_rank=done.rank))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]


def test_exported_adapter_in_inlay(tmp_path):
    import inlay

    source = save(tmp_path / "source", **EXPORTS["all of it"])
    export_for_serving(source, tmp_path / "out")
    ours = inlay.PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
    assert_equal_to(logits(ours), logits(loaded(source)), 1e-5)


@pytest.mark.parametrize("case", ["plain", "rslora", "rslora of an odd rank"])
def test_tensors_that_need_no_change_are_kept_bit_for_bit(case, tmp_path):
    source = save(tmp_path / "source", **EXPORTS[case])
    export_for_serving(source, tmp_path / "out")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_ranks_are_kept_for_llama_cpp(tmp_path):
    source = save(tmp_path / "source", **EXPORTS["all of it"])
    done = export_for_serving(source, tmp_path / "out", server="llama.cpp")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (source, tmp_path / "out"))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
    assert done.servers == ("llama.cpp",)
    right, served, again = (
        deltas(loaded(source)),
        READERS["llama.cpp"](tmp_path / "out"),
        deltas(loaded(tmp_path / "out")),
    )
    for module in right:
        assert_equal_to(served[module], right[module])
        assert_equal_to(again[module], right[module])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, tmp_path):
    """Each value of B is off by half a unit in the last place at most; so far may the update be off."""
    source = save(tmp_path / "source", **EXPORTS["all of it"])
    rewrite(source, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    export_for_serving(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    right, alpha = deltas(loaded(source)), json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scale = alpha["lora_alpha"] / alpha["r"]
    served = READERS["sglang"](tmp_path / "out")
    changed = 0
    for module, delta in right.items():
        a, b = (stored[f"base_model.model.{module}.lora_{factor}.weight"].double().abs() for factor in "AB")
        bound = scale * torch.finfo(dtype).eps / 2 * (1 + torch.finfo(dtype).eps) * (b @ a)
        assert bool(((served[module] - delta).abs() <= bound + 1e-12).all()), module
        changed += int(not torch.allclose(served[module], delta, rtol=1e-9, atol=0))
    assert 0 < changed < len(right)  # those at the common scale are exact


def test_another_dtype_avoids_the_rounding(tmp_path):
    source = save(tmp_path / "source", **EXPORTS["all of it"])
    rewrite(source, lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})
    export_for_serving(source, tmp_path / "out", dtype=torch.float32)
    right, served = deltas(loaded(source)), READERS["vllm"](tmp_path / "out")
    for module in right:
        assert_equal_to(served[module], right[module])


def test_bin_files_and_other_names_are_written_anew(tmp_path):
    source = save(tmp_path / "source")
    right = deltas(loaded(source))
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    renamed = {
        key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): v for key, v in tensors.items()
    }
    torch.save(renamed, source / "adapter_model.bin")
    (source / "README.md").write_text("a card")
    edit(source, my_note="unknown to everybody")
    done = export_for_serving(source, tmp_path / "out", base_name="another/base")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert any("my_note" in change for change in done.changes)
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "another/base"
    )
    served = deltas(loaded(tmp_path / "out"))
    assert served.keys() == right.keys()
    assert all(torch.equal(served[module], right[module]) for module in right)


def test_scales_changed_by_hand_are_folded(tmp_path):
    import inlay

    source, _ = BROKEN["changed by hand"](tmp_path / "source")
    ours = inlay.PeftModel.from_pretrained(llama(), str(source), adapters="all").eval()
    assert not torch.allclose(logits(ours), logits(loaded(source)), atol=1e-3)
    export_for_serving(source, tmp_path / "out")
    assert_equal_to(logits(loaded(tmp_path / "out")), logits(ours), 1e-5)


def test_adapted_embeddings(tmp_path, base_folder):
    """The base's own weights beside them are compared with the base and left out; changed ones stop the export."""
    source = save(tmp_path / "source", target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"], use_rslora=True)
    with pytest.raises(UnsupportedError, match="--base FOLDER"):
        export_for_serving(source, tmp_path / "out")
    export_for_serving(source, tmp_path / "out", base=base_folder)
    assert not any("base_layer" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    right = deltas(loaded(source))
    for read in READERS.values():
        served = read(tmp_path / "out")
        assert served.keys() == right.keys()
        for module in right:
            assert_equal_to(served[module], right[module])
    changed, options = BROKEN["embeddings"](tmp_path / "changed")
    with pytest.raises(UnsupportedError, match="differs from the base's weight"):
        export_for_serving(changed, tmp_path / "other", **options)


def test_tied_adapters_are_written_apart(tmp_path):
    """With ensure_weight_tying one adapter serves both embeddings; the file holds it twice, and so does the export."""
    place = tmp_path / "tied"
    llama(tied=True).save_pretrained(str(place))
    source = save(
        tmp_path / "source", llama(tied=True), use_rslora=True, ensure_weight_tying=True,
        target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"llama\.cpp: lm_head"):
        export_for_serving(source, tmp_path / "out", base=place)
    export_for_serving(source, tmp_path / "out", base=place, server="vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = (
            peft.PeftModel.from_pretrained(llama(tied=True), str(folder)).eval()
            for folder in (source, tmp_path / "out")
        )
    assert_equal_to(logits(after), logits(before))


def test_target_modules_mean_what_was_adapted(tmp_path):
    names = {
        "list": ({}, sorted(PLAIN["target_modules"])),
        "unused": ({"target_modules": ["q_proj", "v_proj", "qkv"]}, ["q_proj", "v_proj"]),
        "layer": (
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
    }
    for name, (fields, expected) in names.items():
        export_for_serving(save(tmp_path / name, **fields), tmp_path / f"{name}-out")
        config = json.loads((tmp_path / f"{name}-out" / "adapter_config.json").read_text())
        assert config["target_modules"] == expected
        assert deltas(loaded(tmp_path / f"{name}-out")).keys() == deltas(loaded(tmp_path / name)).keys()


def test_common_scale_is_an_integer_where_it_can_be(tmp_path):
    source = save(tmp_path / "source", use_rslora=True, r=16, lora_alpha=16)
    export_for_serving(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16 * math.isqrt(16))
    assert isinstance(config["lora_alpha"], int)
