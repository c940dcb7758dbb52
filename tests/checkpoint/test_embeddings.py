"""The embeddings' own weights in a checkpoint: when they are adapted or resized, and never over a network."""

from __future__ import annotations

import json
import socket
import warnings

import pytest
import torch
from models_to_save import adapted, everything, net
from torch import nn

from inlay.checkpoint import get_peft_model_state_dict, load_all, save_adapters, set_peft_model_state_dict
from inlay.core.eject import eject
from inlay.core.policy import PEFT
from inlay.core.registry import config_class
from inlay.core.state import find_state
from inlay.errors import CheckpointError, UnsupportedError


class Settings:
    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary


class Small(nn.Module):
    def __init__(self, vocabulary: int = 6, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, 4)
        self.mid = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.config = Settings(vocabulary)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(self.mid(self.embed_tokens(x)))


def small(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small(**options)


def lora(*targets, **fields):
    return config_class("LORA")(r=2, target_modules=list(targets), **fields)


EMBEDDINGS = {"embed_tokens.weight", "lm_head.weight"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a save asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def extra(model, choice="auto"):
    without = get_peft_model_state_dict(model, save_embedding_layers=False)
    return set(get_peft_model_state_dict(model, save_embedding_layers=choice)) - set(without)


def test_not_targeted():
    model, _ = adapted(lora("mid"), model=small())
    assert extra(model) == set()
    assert extra(model, True) == EMBEDDINGS


def test_targeted():
    model, _ = adapted(lora("mid", "embed_tokens"), model=small())
    with pytest.warns(UserWarning, match="embed_tokens is adapted"):
        assert extra(model) == {"embed_tokens.base_layer.weight"}
    assert extra(model, True) == {"embed_tokens.base_layer.weight"}


def test_trained_in_full_is_saved_once():
    model, _ = adapted(lora("mid", modules_to_save=["lm_head"]), model=small())
    assert "lm_head.weight" in get_peft_model_state_dict(model)
    assert extra(model, True) == {"embed_tokens.weight"}


@pytest.mark.parametrize(("recorded", "saved"), [(6, set()), (5, EMBEDDINGS)])
def test_resized(tmp_path, recorded, saved):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": recorded}))
    model, _ = adapted(lora("mid", base_model_name_or_path=str(tmp_path)), model=small())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert extra(model) == saved
    assert bool(caught) == bool(saved)


def test_a_damaged_base_config_does_not_lose_the_adapter(tmp_path):
    (tmp_path / "config.json").write_text("{")
    model, _ = adapted(lora("mid", base_model_name_or_path=str(tmp_path)), model=small())
    with pytest.warns(UserWarning, match=r"unchanged: .*config\.json"):
        save_adapters(model, tmp_path / "out")
    load_all(small(), tmp_path / "out")


def test_a_base_that_is_only_on_the_hub():
    config = lora("mid", base_model_name_or_path="nobody/nothing-of-that-name")
    model, _ = adapted(config, model=small(), policy=PEFT)
    with pytest.warns(UserWarning, match="no config.json on this machine"):
        assert extra(model) == set()


def test_models_that_name_no_embeddings():
    model, _ = adapted(lora("lin"), model=net())
    with pytest.raises(UnsupportedError, match="get_input_embeddings"):
        extra(model, True)
    lenient, _ = adapted(lora("lin"), model=net(), policy=PEFT)
    with pytest.warns(UserWarning, match="get_input_embeddings"):
        assert extra(lenient, True) == set()
    with pytest.raises(CheckpointError, match="'always'"):
        extra(model, "always")


@pytest.mark.parametrize("targets", [("mid",), ("mid", "embed_tokens", "lm_head")])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_embeddings_are_loaded_and_unloading_gives_the_old_ones_back(tmp_path, targets, tied):
    model, _ = adapted(lora(*targets), model=small(seed=1, tied=tied))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapters(model, tmp_path, save_embedding_layers=True)
    again = small(seed=2, tied=tied)
    before = everything(again)
    load_all(again, tmp_path)
    x = torch.arange(6)
    again.mid.base_layer.load_state_dict(model.mid.base_layer.state_dict())
    assert torch.equal(again(x), model(x))
    eject(again, find_state(again))
    after = everything(again)
    for name in EMBEDDINGS:
        assert torch.equal(after[name], before[name])
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied


def test_embeddings_of_another_size_are_refused():
    model, _ = adapted(lora("mid"), model=small())
    values = get_peft_model_state_dict(model, save_embedding_layers=True)
    larger, _ = adapted(lora("mid"), model=small(vocabulary=8))
    with pytest.raises(RuntimeError, match=r"'embed_tokens\.weight' is \(6, 4\), expected \(8, 4\)"):
        set_peft_model_state_dict(larger, values)
