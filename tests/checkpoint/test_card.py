"""The model card: what the Hub reads, and what a person wrote stays."""

from __future__ import annotations

import sys

import pytest
from models_to_save import CONFIGS, adapted, net

from inlay.checkpoint import model_card, save_adapters
from inlay.core.registry import config_class

yaml = pytest.importorskip("yaml")


def parts(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config)
    model.config._name_or_path = model.name_or_path = "org/some: name"
    return model


def test_front_matter_is_that_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
    theirs.create_or_update_model_card(str(tmp_path))
    ours, _ = adapted(config_class("LORA")(task_type="CAUSAL_LM", fan_in_fan_out=True), model=gpt2())
    save_adapters(ours, tmp_path / "ours")
    expected, _ = parts((tmp_path / "README.md").read_text())
    found, body = parts((tmp_path / "ours" / "README.md").read_text())
    assert found == expected
    assert "org/some: name" in body


def test_what_a_person_wrote_stays(tmp_path):
    pytest.importorskip("huggingface_hub")
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My words\n\nkept --- as is\n")
    save_adapters(model, tmp_path)
    front, body = parts((tmp_path / "README.md").read_text())
    assert front == {"license": "mit", "library_name": "peft", "tags": ["lora", "mine"]}
    assert body.strip() == "# My words\n\nkept --- as is"
    once = (tmp_path / "README.md").read_text()
    save_adapters(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == once


def test_without_huggingface_hub(monkeypatch):
    config = CONFIGS["LORA"]["linear"]()
    expected = model_card(net(), {"default": config})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert model_card(net(), {"default": config}) == expected
    assert model_card(net(), {"default": config}, "# Mine") == "# Mine"


def test_several_adapters_are_listed():
    configs = {"default": CONFIGS["IA3"]["kinds"](), "other": CONFIGS["LORA"]["linear"]()}
    front, body = parts(model_card(net(), configs))
    assert front["tags"] == ["lora"]
    assert "| `default` | IA3 | `.` |" in body
    assert "| `other` | LORA | `other` |" in body
    assert 'adapters="all"' in body
