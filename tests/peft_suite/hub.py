"""A cache folder of the Hugging Face hub with stand-ins for what PEFT's tests download: tiny models of random weights.

Run with real PEFT in the environment, which writes the adapters: ``python hub.py FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

_TEXT = [
    "The quick brown fox jumps over the lazy dog. I am a test of a tokenizer with some words in it.",
    "USER: What are these? ASSISTANT: Be yourself; everyone else is already taken. Hello world, 0123456789!",
]
_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer learned from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<s>", "</s>", "<mask>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=512,
    )


def _opt(hidden: int = 16, layers: int = 5, vocab: int = 50265, **more: Any) -> tf.OPTConfig:
    return tf.OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocab,
        max_position_embeddings=512,
        **{**_IDS, **more},
    )


def _gpt2(width: int = 32, layers: int = 5, vocab: int = 1000) -> tf.GPT2Config:
    return tf.GPT2Config(
        n_embd=width, n_layer=layers, n_head=4, vocab_size=vocab, n_positions=512, **{**_IDS, "pad_token_id": None}
    )


def _decoder(cls: type[Any], vocab: int = 32000, **more: Any) -> Any:
    return cls(
        **{
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab,
            "max_position_embeddings": 512,
            **_IDS,
            **more,
        }
    )


def _encoder(cls: type[Any], **more: Any) -> Any:
    return cls(
        **{
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "vocab_size": 1124,
            "max_position_embeddings": 512,
            "type_vocab_size": 16,
            **more,
        }
    )


def _t5(vocab: int = 1103, layers: int = 5) -> tf.T5Config:
    return tf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=layers,
        num_heads=4,
        vocab_size=vocab,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def _bart() -> tf.BartConfig:
    return tf.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4,
        decoder_ffn_dim=4,
        vocab_size=50265,
        max_position_embeddings=100,
    )


_LLAMA = tf.LlamaConfig
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 4}

# Repository -> (name of the model's class in transformers, its config).
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    **{f"{owner}-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _opt) for owner in ("peft", "hf")},
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", lambda: _opt(64, 12, 50272)),
    "facebook/opt-125m": ("OPTForCausalLM", lambda: _opt(64, 12, 50272)),
    "facebook/opt-350m": ("OPTForCausalLM", lambda: _opt(64, 4, 50272)),
    "gpt2": ("GPT2LMHeadModel", lambda: _gpt2(48, 4, 50257)),
    "openai-community/gpt2": ("GPT2LMHeadModel", lambda: _gpt2(48, 4, 50257)),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _gpt2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _gpt2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _gpt2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        lambda: tf.GPTJConfig(n_embd=32, n_layer=5, n_head=4, rotary_dim=4, vocab_size=1000, n_positions=512),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        lambda: tf.GPTNeoXConfig(
            hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, vocab_size=1024
        ),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        lambda: tf.BloomConfig(hidden_size=32, n_layer=5, n_head=4, vocab_size=1024),
    ),
    "bigscience/bloomz-560m": (
        "BloomForCausalLM",
        lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=1024),
    ),
    **{
        f"{owner}-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", lambda: _decoder(_LLAMA))
        for owner in ("peft", "trl", "hf")
    },
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        lambda: _decoder(_LLAMA),
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM",
        lambda: _decoder(tf.MistralConfig, hidden_size=32, intermediate_size=37),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        lambda: _decoder(tf.Qwen2Config, hidden_size=8, intermediate_size=32, num_key_value_heads=2),
    ),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", lambda: _decoder(tf.Qwen2Config)),
    "Qwen/Qwen2-0.5B": (
        "Qwen2ForCausalLM",
        lambda: _decoder(tf.Qwen2Config, tie_word_embeddings=True),
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", lambda: _decoder(tf.Qwen3Config, head_dim=4)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        lambda: _decoder(tf.Gemma3TextConfig, hidden_size=32, head_dim=8, intermediate_size=37, sliding_window=64),
    ),
    "hf-internal-testing/Mixtral-tiny": (
        "MixtralForCausalLM",
        lambda: _decoder(tf.MixtralConfig, num_local_experts=8, num_experts_per_tok=2, hidden_size=32),
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        lambda: _decoder(tf.Qwen3MoeConfig, **_EXPERTS),
    ),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", lambda: _decoder(tf.Qwen3MoeConfig, **_EXPERTS)),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        lambda: _decoder(
            tf.GptOssConfig,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=4,
            hidden_size=16,
            intermediate_size=32,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.3,  # an adapter of its experts has to show in the output
        ),
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        lambda: _decoder(
            tf.Llama4TextConfig,
            intermediate_size_mlp=64,
            intermediate_size=32,
            num_local_experts=4,
            head_dim=4,
            interleave_moe_layer_step=1,
        ),
    ),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        lambda: tf.FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=1000, state_size=8),
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (
        "NemotronHForCausalLM",
        lambda: _decoder(
            tf.NemotronHConfig,
            hybrid_override_pattern="M*-M",
            num_hidden_layers=4,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            head_dim=4,
        ),
    ),
    "peft-internal-testing/tiny-random-gemma4-E2B": (
        "Gemma4ForConditionalGeneration",
        lambda: tf.Gemma4Config(
            text_config=_decoder(
                tf.Gemma4TextConfig,
                vocab=1000,
                hidden_size=32,
                head_dim=8,
                num_hidden_layers=2,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=1000,
                num_kv_shared_layers=0,
                layer_types=["sliding_attention", "full_attention"],
            ).to_dict(),
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            audio_config=None,
        ),
    ),
    **{
        f"peft-internal-testing/tiny-random-{name}": ("T5ForConditionalGeneration", _t5)
        for name in ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration-calibrated")
    },
    "google/flan-t5-small": ("T5ForConditionalGeneration", lambda: _t5(32128, 8)),
    "google/flan-t5-base": ("T5ForConditionalGeneration", lambda: _t5(32128, 2)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _bart),
    "peft-internal-testing/tiny-random-BertModel": ("BertLMHeadModel", lambda: _encoder(tf.BertConfig)),
    "hf-internal-testing/tiny-random-BertModel": ("BertLMHeadModel", lambda: _encoder(tf.BertConfig)),
    "bert-base-uncased": ("BertForMaskedLM", lambda: _encoder(tf.BertConfig, num_hidden_layers=12)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        lambda: _encoder(tf.BertConfig),
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", lambda: _encoder(tf.RobertaConfig)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        lambda: _encoder(tf.RobertaConfig),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        lambda: _encoder(tf.DebertaConfig, relative_attention=True, pos_att_type="c2p|p2c", type_vocab_size=0),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        lambda: _encoder(tf.DebertaV2Config, relative_attention=False, type_vocab_size=0),
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        lambda: tf.ResNetConfig(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3),
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection",
        lambda: tf.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=5,
            num_attention_heads=4,
            vocab_size=1000,
            projection_dim=32,
        ),
    ),
    "openai/whisper-tiny-stand-in": (
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            vocab_size=1000,
            num_mel_bins=80,
            max_source_positions=30,
            max_target_positions=40,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
        ),
    ),
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration": (
        "LlavaForConditionalGeneration",
        lambda: tf.LlavaConfig(
            text_config=_decoder(_LLAMA, vocab=1000),
            vision_config=tf.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            image_token_id=5,
        ),
    ),
}

_BASE = "peft-internal-testing/tiny-random-OPTForCausalLM"
# Repository of a LoRA adapter -> (Auto class, base, task_type, target modules).
ADAPTERS: dict[str, tuple[str, str, str | None, list[str]]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("CausalLM", _BASE, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "SequenceClassification",
        _BASE,
        "SEQ_CLS",
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "QuestionAnswering",
        _BASE,
        "QUESTION_ANS",
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "",
        _BASE,
        "FEATURE_EXTRACTION",
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "Seq2SeqLM",
        "peft-internal-testing/tiny-random-t5",
        "SEQ_2_SEQ_LM",
        ["q", "v"],
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "TokenClassification",
        "hf-internal-testing/tiny-random-gpt2",
        "TOKEN_CLS",
        ["c_attn"],
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "SpeechSeq2Seq",
        "openai/whisper-tiny-stand-in",
        None,
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/gpt2-lora-random": ("CausalLM", "gpt2", "CAUSAL_LM", ["c_attn"]),
    "peft-internal-testing/opt-125m-dummy-lora": (
        "CausalLM",
        "peft-internal-testing/opt-125m",
        "CAUSAL_LM",
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/tiny-opt-lora-revision": ("CausalLM", _BASE, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "peft-internal-testing/test-lora-subfolder": ("CausalLM", _BASE, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "ybelkada/test-st-lora": ("CausalLM", _BASE, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "peft-internal-testing/tiny-random-BertModel-lora": (
        "CausalLM",
        "hf-internal-testing/tiny-random-BertModel",
        "CAUSAL_LM",
        ["query", "value"],
    ),
}
_REVISIONS = {
    "peft-internal-testing/tiny-opt-lora-revision": ["test"],
    "peft-internal-testing/tiny-random-BertModel": ["v2.0.0"],
    "peft-internal-testing/tiny-random-BertModel-lora": ["v1.2.3"],
}
_SUBFOLDERS = {"peft-internal-testing/test-lora-subfolder": "test"}


class Hub:
    """Writes repositories in the layout of the hub's cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def snapshot(self, repo: str, revision: str = "main") -> Path:
        """Return the folder of the files of one revision; a second revision is a second snapshot."""
        root = self.folder / ("models--" + repo.replace("/", "--"))
        commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        return snapshot

    def models(self) -> None:
        words = tokenizer()
        for repo, (name, config) in MODELS.items():
            for revision in ["main", *_REVISIONS.get(repo, [])]:
                torch.manual_seed(int(hashlib.sha1(f"{repo}{revision}".encode()).hexdigest()[:6], 16))
                try:
                    model = getattr(tf, name)(config())
                    model.save_pretrained(self.snapshot(repo, revision))
                    words.save_pretrained(self.snapshot(repo, revision))
                except Exception as error:  # the tests that need it are then skipped on both sides
                    print(f"{repo}: {type(error).__name__}: {error}", file=sys.stderr)
                    shutil.rmtree(self.snapshot(repo, revision).parents[1])
                    break
        pictures = self.snapshot("peft-internal-testing/tiny-random-ResNetForImageClassification")
        tf.ConvNextImageProcessorPil(size={"shortest_edge": 48}).save_pretrained(pictures)

    def adapters(self) -> None:
        from peft import LoraConfig, get_peft_model

        for repo, (task, base, task_type, targets) in ADAPTERS.items():
            auto = getattr(tf, f"AutoModelFor{task}" if task else "AutoModel")
            for revision in ["main", *_REVISIONS.get(repo, [])]:
                torch.manual_seed(0)
                config = LoraConfig(task_type=task_type, target_modules=targets, init_lora_weights=False)
                model = get_peft_model(auto.from_pretrained(base), config)
                if task_type is None:
                    model.peft_config["default"].auto_mapping = {
                        "base_model_class": "WhisperForConditionalGeneration",
                        "parent_library": "transformers.models.whisper.modeling_whisper",
                    }
                folder = self.snapshot(repo, revision)
                model.save_pretrained(folder / _SUBFOLDERS.get(repo, ""))
        self._extended_vocabulary("peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab", 50269, "main")
        self._extended_vocabulary("peft-internal-testing/opt-tokenizer-revision", None, "my-revision")

    def _extended_vocabulary(self, repo: str, size: int | None, revision: str) -> None:
        """Write an adapter with embeddings of ``size`` rows (None: as its tokenizer, which has new words)."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        words = tokenizer()
        if size is None:
            words.add_tokens([f"<new{number}>" for number in range(3)])
        model = tf.AutoModelForCausalLM.from_pretrained(_BASE)
        if size is None:
            model.resize_token_embeddings(len(words))
        else:
            words.add_tokens([f"<new{number}>" for number in range(size - len(words))])
            model.resize_token_embeddings(size)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
        for name in {"main", revision}:
            folder = self.snapshot(repo, name)
            wrapped.save_pretrained(folder, save_embedding_layers=True)
            words.save_pretrained(folder)

    def diffusion(self) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=[32, 64],
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
            latent_channels=4,
        )
        text = tf.CLIPTextModel(
            tf.CLIPTextConfig(
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=5,
                num_attention_heads=4,
                vocab_size=1000,
                max_position_embeddings=77,
                bos_token_id=2,
                eos_token_id=3,
                pad_token_id=1,
            )
        )
        folder = self.snapshot("hf-internal-testing/tiny-sd-pipe")
        with tempfile.TemporaryDirectory() as place:
            clip = self._clip_tokenizer(Path(place))
            StableDiffusionPipeline(
                vae=vae,
                text_encoder=text,
                tokenizer=clip,
                unet=unet,
                scheduler=DDIMScheduler(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)

    def _clip_tokenizer(self, place: Path) -> Any:
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (place / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (place / "merges.txt").write_text("#version: 0.2\n")
        return tf.CLIPTokenizer.from_pretrained(place, model_max_length=77)


def main(folder: Path) -> None:
    """Write every repository; what fails is named, and the tests that need it then fail on both sides."""
    hub = Hub(folder)
    for part in (hub.models, hub.diffusion, hub.adapters):
        try:
            part()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
