"""Generating with adapters: every cache, beams, an assistant, an adapter for each prompt; pipelines.

The oracle is the model whose weights have the updates added, ``W + scaling * B @ A``, by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

PROMPTS = tiny.tokens(3, 6)
NEW = 8
LONG: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def scrambled(model: Any, name: str, seed: int) -> None:
    tiny.scramble(model, f".{name}.", scale=0.4, seed=seed)


def adapted(family: str = "Llama") -> Any:
    """Return a wrapped model with adapters ``a`` (active) and ``b``."""
    model = get_peft_model(tiny.decoder(family), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["v_proj", "down_proj"]))
    scrambled(model, "a", 1)
    scrambled(model, "b", 2)
    return model.eval()


def by_hand(model: Any, name: str, family: str = "Llama") -> Any:
    """Return a plain model with one adapter's updates in its weights."""
    plain = tiny.decoder(family)
    layers = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for path, module in plain.named_modules():
            layer = layers.get(path)
            if isinstance(module, torch.nn.Linear) and name in getattr(layer, "lora_A", {}):
                product = layer.lora_B[name].weight @ layer.lora_A[name].weight
                module.weight += layer.scaling[name] * product
    return plain


def ways() -> dict[str, dict[str, Any]]:
    """Return keywords of ``generate`` by name."""
    return {
        "greedy": {},
        "no cache": {"use_cache": False},
        "dynamic": {"cache_implementation": "dynamic"},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "offloaded": {"cache_implementation": "offloaded"},
        "offloaded static": {"cache_implementation": "offloaded_static", "disable_compile": True},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "beams and static": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
        "sampled": {"do_sample": True, "top_k": 10, "num_return_sequences": 2},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "chunked prefill": {"prefill_chunk_size": 2},
    }


def generated(model: Any, prompts: Tensor = PROMPTS, **keywords: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **(LONG | keywords))


@pytest.mark.parametrize("way", ways())
def test_every_way_as_the_merged_model(way: str) -> None:
    keywords = ways()[way]
    prompts = PROMPTS[:1] if way == "lookup" else PROMPTS
    model = adapted()
    seen = []
    for name in ("a", "b"):
        model.set_adapter(name)
        try:
            want = generated(by_hand(model, name), prompts, **keywords)
        except (RuntimeError, AssertionError, ImportError) as error:  # needs an accelerator
            pytest.skip(f"{way}: transformers cannot do this here without adapters: {error}")
        seen.append(generated(model, prompts, **keywords))
        assert torch.equal(seen[-1], want), name
    base = generated(tiny.llama(), prompts, **keywords)
    with model.disable_adapter():
        assert torch.equal(generated(model, prompts, **keywords), base)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], base)


def test_quantised_cache() -> None:
    keywords = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    try:
        want = generated(by_hand(adapted(), "a"), **keywords)
    except ImportError as error:
        pytest.skip(f"no backend: {error}")
    assert torch.equal(generated(adapted(), **keywords), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_window(cache: str) -> None:
    """Mistral looks back four tokens; the prompt is longer."""
    keywords = {"cache_implementation": cache, "disable_compile": True}
    model = adapted("Mistral")
    want = generated(by_hand(model, "a", "Mistral"), **keywords)
    assert torch.equal(generated(model, **keywords), want)
    assert not torch.equal(want, generated(tiny.decoder("Mistral"), **keywords))


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_cache_of_ones_own(make: Any) -> None:
    model = adapted()
    results = []
    for one in (model, by_hand(model, "a")):
        config = tiny.llama().config
        cache = make(config=config) if make is DynamicCache else make(config=config, max_cache_len=32)
        out = one(PROMPTS, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        results.append((out.logits, one(token, past_key_values=cache, use_cache=True).logits))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_compiled_static_cache() -> None:
    """The default for a static cache: the forward of a step is compiled."""
    model = adapted()
    model.get_base_model().generation_config.cache_implementation = "static"
    want = generated(by_hand(model, "a"), cache_implementation="static", disable_compile=True)
    torch.compiler.reset()
    compiled = torch.compile(model.get_base_model().forward, backend="aot_eager")
    cache = StaticCache(config=tiny.llama().config, max_cache_len=32)
    ids = PROMPTS
    with torch.no_grad():
        for step in range(NEW):
            out = compiled(ids if step == 0 else ids[:, -1:], past_key_values=cache, use_cache=True)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, want)


def test_assisted() -> None:
    """Speculation does not change greedy results, whether the assistant is the base, a model or the same adapter."""
    model = adapted()
    want = generated(by_hand(model, "a"), PROMPTS[:1])
    for assistant in (tiny.llama(), tiny.llama(num_hidden_layers=1), adapted()):
        mine = generated(model, PROMPTS[:1], assistant_model=assistant)
        assert torch.equal(mine, want)
    assert torch.equal(
        generated(tiny.llama(), PROMPTS[:1], assistant_model=adapted()), generated(tiny.llama(), PROMPTS[:1])
    )


@pytest.mark.parametrize("way", ["greedy", "no cache", "static", "beams", "beams and static"])
def test_an_adapter_for_each_prompt(way: str) -> None:
    keywords = ways()[way]
    model = adapted()
    mixed = generated(model, adapter_names=["a", "b", "__base__"], **keywords)
    rows = mixed.shape[0] // 3
    singles = [by_hand(model, "a"), by_hand(model, "b"), tiny.llama()]
    for number, single in enumerate(singles):
        want = generated(single, PROMPTS[number : number + 1], **keywords)
        assert torch.equal(mixed[number * rows : (number + 1) * rows], want), number
    assert model.active_adapters == ["a"]


def test_streamer_and_scores() -> None:
    tokenizer, model = tiny.tokenizer(), adapted()
    tokens = tokenizer(["the cat sat"], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        streamer=streamer,
        output_scores=True,
        return_dict_in_generate=True,
        **LONG,
    )
    assert len(out.scores) == NEW
    text = tokenizer.decode(out.sequences[0, 3:])
    assert "".join(streamer).split() == text.split()


def test_model_of_the_mixin_generates() -> None:
    model = tiny.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a")
    model.add_adapter(LoraConfig(r=4, target_modules=["v_proj", "down_proj"]), "b")
    scrambled(model, "a", 1)
    scrambled(model, "b", 2)
    reference = adapted()
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(generated(model), generated(by_hand(reference, name)))
    model.disable_adapters()
    assert torch.equal(generated(model), generated(tiny.llama()))


def test_encoder_decoder() -> None:
    model = get_peft_model(tiny.t5(), LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    tiny.scramble(model, scale=0.4)
    plain = tiny.t5()
    layers = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for path, module in plain.named_modules():
            if "default" in getattr(layers.get(path), "lora_A", {}):
                layer = layers[path]
                module.weight += (
                    layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                )
    for keywords in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(generated(model.eval(), **keywords), generated(plain, **keywords))
    assert not torch.equal(generated(model), generated(tiny.t5()))


# -- pipelines --------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> Any:
    """Save a base model, and an adapter on it with a tokenizer; returns the wrapped model."""
    tiny.llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tiny.scramble(model, scale=0.4)
    model.save_pretrained(folder / "adapter")
    tiny.tokenizer().save_pretrained(folder / "base")
    return model.eval()


def test_text_generation_pipelines(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("the cat sat", return_tensors="pt")
    want = generated(model, tokens["input_ids"])[0].tolist()
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mixed.load_adapter(str(tmp_path / "adapter"))
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    pipes = {
        "folder": pipeline("text-generation", model=str(tmp_path / "adapter"), device="cpu"),
        "mixin": pipeline("text-generation", model=mixed, tokenizer=tokenizer, device="cpu"),
        "wrapper": pipeline("text-generation", model=wrapped, tokenizer=tokenizer, device="cpu"),
    }
    for name, pipe in pipes.items():
        assert pipe("the cat sat", return_tensors=True, **LONG)[0]["generated_token_ids"] == want, name
    base = pipeline("text-generation", model=str(tmp_path / "base"), tokenizer=tokenizer, device="cpu")
    assert base("the cat sat", return_tensors=True, **LONG)[0]["generated_token_ids"] != want


def test_classification_pipeline(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny.bert("ForSequenceClassification", num_labels=3),
        LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
    )
    tiny.scramble(model, scale=0.4)
    tiny.scramble(model, "modules_to_save", scale=0.4)
    tokenizer = tiny.tokenizer()
    pipe = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu", top_k=None)
    found = {entry["label"]: entry["score"] for entry in pipe(["a dog ran home"])[0]}
    inputs = tokenizer("a dog ran home", return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    for number, probability in enumerate(logits.softmax(-1)[0].tolist()):
        assert found[f"LABEL_{number}"] == pytest.approx(probability, rel=1e-4)


def test_feature_extraction_pipeline() -> None:
    model = tiny.bert()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
    tiny.scramble(model, scale=0.4)
    tokenizer = tiny.tokenizer()
    pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    inputs = tokenizer("red words", return_tensors="pt")
    want = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipe("red words")), want)
