"""``inlay merge``, ``generate`` and ``plan`` on a small adapter with values that matter."""

from __future__ import annotations

import shutil

import pytest
import torch

from inlay.cli import main


@pytest.fixture(scope="module")
def adapter(shelf):
    """A LoRA adapter whose B is not zero, saved by the library, and the model it was saved from."""
    import transformers

    import inlay

    base = transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt")
    config = inlay.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = inlay.get_peft_model(base, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(str(shelf / "adapter"))
    return shelf / "adapter", model


def test_merged_folder_is_the_adapted_model(adapter, inlay, tmp_path):
    """transformers alone loads the merged folder; it says what base and adapter say together."""
    import transformers

    folder, model = adapter
    done = inlay("merge", "--adapter", folder, "--out", "merged")
    assert done.returncode == 0, done.stderr
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(["salt wave fish", "moon star bird"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_merge_into_another_dtype(adapter, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "half"
    assert main(["merge", "--adapter", str(adapter[0]), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_merge_refuses(adapter, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["merge", "--adapter", str(adapter[0]), "--out", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(adapter[0]), "--out", str(tmp_path / "new"), "--dtype", "bfloat61"]) == 2
    assert "Did you mean 'bfloat16'" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(tmp_path / "full"), "--out", str(tmp_path / "new")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_generate_takes_the_likeliest_tokens(adapter, shelf, capsys):
    import transformers

    folder, model = adapter
    tokenizer = transformers.AutoTokenizer.from_pretrained(shelf / "gpt")
    ids = tokenizer("salt wave", return_tensors="pt", add_special_tokens=False)["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert main(["generate", "--adapter", str(folder), "--prompt", "salt wave", "--tokens", "6"]) == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_predict_wants_a_classifier(adapter, capsys):
    assert main(["predict", "--adapter", str(adapter[0]), "--text", "salt"]) == 2
    assert "task_type 'CAUSAL_LM', expected SEQ_CLS" in capsys.readouterr().err


def test_plan_needs_no_weights(shelf, tmp_path, capsys):
    """From config.json alone: every site, and the parameters it would cost."""
    (tmp_path / "bare").mkdir()
    shutil.copy(shelf / "gpt" / "config.json", tmp_path / "bare" / "config.json")
    words = ["plan", "--model", str(tmp_path / "bare"), "--target", "q_proj", "v_proj", "--rank", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            assert f"model.layers.{layer}.self_attn.{name}" in shown
    assert f"{2 * 2 * 4 * (32 + 32):,}" in shown  # 2 layers, 2 modules, rank 4, A is 4x32 and B 32x4
    assert main([*words[:-4], "q_prj"]) == 2
    assert "q_proj" in capsys.readouterr().err
