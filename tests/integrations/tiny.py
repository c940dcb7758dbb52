"""Tiny models with random weights, a tokenizer made on the fly, and small sets of text: all offline, in milliseconds.

Also imported where peft is the real one, for oracles: nothing here knows Inlay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96

_SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Jamba": {
        "num_key_value_heads": 2,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Lfm2Moe": {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "Qwen3Moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}


def decoder(family: str = "Llama", cls: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """Return a decoder of two blocks in eval mode: Llama, Mistral, Mixtral, Qwen2Moe, Qwen3Moe, ...

    Experts run one by one (``experts_implementation="eager"``), which knows float64 too.
    """
    import transformers

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{family}Config")(**(values | _SIZES.get(family, {}) | changes))
    if "num_experts_per_tok" in _SIZES.get(family, {}):
        config._experts_implementation = "eager"
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}{cls}")(config).eval()


def vit(seed: int = 0, **changes: Any) -> Any:
    """Return a vision transformer of two blocks that classifies images of 3 x 16 x 16."""
    import transformers

    values: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(values | changes))).eval()


def llava(seed: int = 0) -> Any:
    """Return a LLaVA of a CLIP and a Llama of two blocks each."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=llama().config, image_token_index=VOCABULARY - 1
    )
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration(config).eval()


def llama(cls: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """Return a Llama of two blocks."""
    return decoder("Llama", cls, seed, **changes)


def mixtral(cls: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """Return a Mixtral of two blocks with four experts each."""
    return decoder("Mixtral", cls, seed, **changes)


def qwen2_moe(cls: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """Return a Qwen2-MoE of two blocks with four experts and a shared one each."""
    return decoder("Qwen2Moe", cls, seed, **changes)


def qwen3_moe(cls: str = "ForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """Return a Qwen3-MoE of two blocks with four experts each."""
    return decoder("Qwen3Moe", cls, seed, **changes)


def gpt2(cls: str = "LMHeadModel", seed: int = 0, **changes: Any) -> Any:
    """Return a GPT-2 of two blocks."""
    import transformers

    values: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    return getattr(transformers, f"GPT2{cls}")(transformers.GPT2Config(**(values | changes))).eval()


def bert(cls: str = "Model", seed: int = 0, **changes: Any) -> Any:
    """Return a BERT of two blocks; ``cls`` is what comes after ``Bert``: ``ForSequenceClassification``."""
    import transformers

    values: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(seed)
    return getattr(transformers, f"Bert{cls}")(transformers.BertConfig(**(values | changes))).eval()


def t5(cls: str = "ForConditionalGeneration", seed: int = 0, **changes: Any) -> Any:
    """Return a T5 of two blocks a side."""
    import transformers

    values: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    values |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(seed)
    return getattr(transformers, f"T5{cls}")(transformers.T5Config(**(values | changes))).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    """Return random token ids without the special ones (0 to 3), (batch, length)."""
    return torch.randint(4, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def scramble(model: nn.Module, marker: str = "lora_", scale: float = 0.1, seed: int = 2) -> None:
    """Give all parameters whose name has ``marker`` random values, so that adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if marker in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


SENTENCES = [
    "the cat sat on the mat",
    "a dog ran over the hill",
    "small models learn small words",
    "the hill is green and the mat is red",
    "a cat and a dog ran home",
    "red words are small words",
    "models sat on a green hill",
    "the dog learned the words",
]


def tokenizer(chat: bool = True) -> Any:
    """Return a word tokenizer of :data:`VOCABULARY` ids or fewer: pad 0, bos 1, eos 2, unk 3.

    Args:
        chat: give it a chat template.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<mask>"]
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    known = {word: number for number, word in enumerate([*specials, *words])}
    assert len(known) <= VOCABULARY
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="right",
        model_max_length=64,
    )
    if chat:
        made.chat_template = (
            "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' </s> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
        )
    return made


def language_rows(count: int = 8) -> list[dict[str, Any]]:
    """Return examples for a causal language model: ``input_ids`` and ``labels``, all of one length."""
    ids = tokens(count, 10)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def class_rows(count: int = 8, classes: int = 2) -> list[dict[str, Any]]:
    """Return examples for a classifier: ``input_ids`` and a label."""
    return [{"input_ids": row, "labels": number % classes} for number, row in enumerate(tokens(count, 10))]
