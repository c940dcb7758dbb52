"""Merging on disk gives the files that loading, merging and saving the model gives, with one shard in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, gpt2, perturb

import inlay
from inlay.cli import main
from inlay.errors import CheckpointError, CheckpointMissingError, MergeError, UnsupportedError
from inlay.models.merge_disk import merge_checkpoint

LINEAR = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "lora": lambda: inlay.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "dora": lambda: inlay.LoraConfig(r=4, target_modules=LINEAR, use_dora=True, task_type="CAUSAL_LM"),
    "embedding": lambda: inlay.LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"], task_type="CAUSAL_LM"),
    "full_copy": lambda: inlay.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    "ia3": lambda: inlay.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: inlay.VeraConfig(
        r=4, target_modules=["q_proj", "o_proj"], save_projection=False, task_type="CAUSAL_LM"
    ),
    "oft": lambda: inlay.OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "biases": lambda: inlay.LoraConfig(r=4, target_modules=LINEAR, bias="all", task_type="CAUSAL_LM"),
    "tokens": lambda: inlay.TrainableTokensConfig(token_indices=[3, 5], task_type="CAUSAL_LM"),
}


def llama(**changes: Any) -> Any:
    import transformers

    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    values |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | changes))).eval()


def saved(model: Any, config: Any, folder: Path, shards: str = "30KB", dtype: torch.dtype = torch.float32) -> Any:
    """Save a base in several files and an adapter with random values; return the adapted model."""
    model = model.to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shards)
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "old.bin").write_text("weights in another form")
    adapted = inlay.get_peft_model(model, config)
    perturb(adapted, "default")
    adapted.save_pretrained(str(folder / "adapter"))
    return adapted


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


CASES = [*((method, torch.float32) for method in METHODS), ("lora", torch.bfloat16), ("dora", torch.bfloat16)]


@pytest.mark.parametrize(("method", "dtype"), CASES, ids=str)
def test_equals_merging_in_memory(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapted = saved(llama(), METHODS[method](), tmp_path, dtype=dtype)
    before = tensors_in(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    expected = adapted.merge_and_unload().state_dict()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert found.keys() == before.keys()
    eps = torch.finfo(dtype).eps
    for key, value in found.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value, expected[key], rtol=4 * eps, atol=1e-6 if dtype == torch.float32 else 1e-4)
    assert any(not torch.equal(found[key], before[key]) for key in found)


def test_files_stay_what_they_were(tmp_path: Path) -> None:
    saved(llama(), METHODS["lora"](), tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    names = {path.name for path in (tmp_path / "base").iterdir()} - {"old.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for folder in ("base", "out"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for key, file in index["weight_map"].items():
            with safetensors.safe_open(tmp_path / folder / file, "pt") as opened:
                assert key in opened.keys()  # noqa: SIM118
                assert opened.metadata() == {"format": "pt"}
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.model.norm.weight, torch.ones(32))


def test_a_single_file_and_another_dtype(tmp_path: Path) -> None:
    adapted = saved(llama(), METHODS["lora"](), tmp_path, shards="1GB")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    found, expected = tensors_in(tmp_path / "out"), dict(inlay.iter_merged(adapted, dtype=torch.bfloat16))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2's own files name tensors as the model without its head does, and tie the head; its layers are Conv1D."""
    model = gpt2()
    config = inlay.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = saved(model, config, tmp_path, shards="1GB")
    path = tmp_path / "base" / "model.safetensors"
    old = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file(old, path, {"format": "pt"})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, expected = tensors_in(tmp_path / "out"), adapted.merge_and_unload().state_dict()
    assert found.keys() == old.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[f"transformer.{key}"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(found["h.0.attn.c_attn.weight"], old["h.0.attn.c_attn.weight"])


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    config = inlay.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    adapted = saved(llama(tie_word_embeddings=True), config, tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, expected = tensors_in(tmp_path / "out"), adapted.merge_and_unload().state_dict()
    assert "lm_head.weight" not in found
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected["lm_head.weight"], rtol=1e-6, atol=1e-7)


def test_a_copy_of_one_of_two_tied_modules_is_refused(tmp_path: Path) -> None:
    config = inlay.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(inlay.InlayWarning):
        saved(llama(tie_word_embeddings=True), config, tmp_path)
    with pytest.raises(UnsupportedError, match="share one weight in the base model"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in tensors that are alive when a file is written, and in bytes of the largest file."""
    from test_merge_in_place import peak_of

    saved(llama(num_hidden_layers=4, hidden_size=64), METHODS["lora"](), tmp_path, shards="70KB")
    sizes = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert sum(sizes) > 3 * max(sizes)
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    peak = peak_of(lambda: merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    assert peak < max(sizes) + adapter + 300_000


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(llama(), METHODS["lora"](), tmp_path)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))

    def fails(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            merge_checkpoint(base, adapter, out)
        assert not out.exists()

    last = sorted(base.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    held = load_file(last)
    name = next(key for key in held if key.endswith("_proj.weight"))
    save_file({key: value for key, value in held.items() if key != name}, last)
    fails(CheckpointError, "which the index says is here")
    held[name] = torch.full_like(held[name], float("nan"))
    save_file(held, last)
    if any(part in name for part in LINEAR):
        fails(MergeError, "not finite")
    last.write_bytes(content[:-20])
    fails(CheckpointError, "found a damaged one")
    last.unlink()
    fails(CheckpointMissingError, "expected a file of tensors")
    last.write_bytes(content)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    fails(UnsupportedError, "holds a quantised model")
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors.index.json").unlink()
    fails(CheckpointMissingError, "found neither")
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="new or empty folder"):
        merge_checkpoint(base, adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_names_that_cannot_be_mapped(tmp_path: Path) -> None:
    saved(llama(), METHODS["lora"](), tmp_path, shards="1GB")
    path = tmp_path / "base" / "model.safetensors"
    held = load_file(path)
    save_file({key.replace("q_proj", "query"): value for key, value in held.items()}, path)
    with pytest.raises(CheckpointError, match=r"has no tensor of shape \(32, 32\) .*q_proj.weight' alone"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    twice = held | {"layers.0.self_attn.q_proj.weight": held["model.layers.0.self_attn.q_proj.weight"] + 1}
    save_file(twice, path)
    with pytest.raises(CheckpointError, match=r"both mean 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_experts_that_transformers_stacks_are_refused(tmp_path: Path) -> None:
    import transformers

    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))
    config = inlay.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
    )
    saved(model, config, tmp_path)
    with pytest.raises(CheckpointError, match="merge with the model in memory"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_by_shard_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = saved(llama(), METHODS["lora"](), tmp_path)
    words = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--by-shard"]
    assert main([*words, "--model", "somewhere/else"]) == 2
    assert "from a folder on this machine, found 'somewhere/else'" in capsys.readouterr().err
    assert main([*words, "--model", str(tmp_path / "base"), "--dtype", "bfloat16"]) == 0
    assert "merged" in capsys.readouterr().out
    expected = dict(inlay.iter_merged(adapted, dtype=torch.bfloat16))
    assert all(torch.equal(value, expected[key]) for key, value in tensors_in(tmp_path / "out").items())
