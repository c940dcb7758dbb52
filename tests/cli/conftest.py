"""Tiny models with a tokenizer of their own, made once, and a way to run the command as a process."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from cli_process import command, environment

pytest.importorskip("typer")
pytest.importorskip("transformers")

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported by a test
WORDS = {
    "sea": ["wave", "salt", "tide", "fish", "boat", "sail", "deep", "harbour", "shell", "whale"],
    "sky": ["cloud", "wind", "star", "moon", "bird", "wing", "storm", "light", "high", "rain"],
    "town": ["street", "house", "door", "bread", "market", "clock", "bridge", "lamp", "crowd", "tower"],
}


@pytest.fixture
def inlay(tmp_path):
    """Run ``inlay ...`` as a process in ``tmp_path``."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def sentences() -> list[tuple[str, str]]:
    """240 sentences with the topic that their words come from."""
    chance = random.Random(7)
    topics = sorted(WORDS)
    return [
        (" ".join(chance.choices(WORDS[topic], k=chance.randint(4, 9))), topic)
        for topic in chance.choices(topics, k=240)
    ]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, sentences) -> Path:
    """A folder with ``gpt`` (a tiny Llama) and ``bert``, each with tokenizer, and the data files."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("shelf")
    specials = ["<pad>", "<unk>", "<end>", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = specials + sorted({word for words in WORDS.values() for word in words})
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", model_max_length=64
    )
    torch.manual_seed(0)
    gpt = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip
    for name, model in (("gpt", gpt), ("bert", bert)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(text for text, _ in sentences), encoding="utf-8")
    rows = [json.dumps({"text": text, "label": topic}) for text, topic in sentences]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
