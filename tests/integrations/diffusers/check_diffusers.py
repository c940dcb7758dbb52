"""diffusers: adapters of its models and pipelines, in every style of key that it reads.

The oracle is the plain model whose weights had the update added by hand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.transformers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
Factors = dict[str, tuple[Tensor, Tensor, float]]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return CLIPTextModel(config).eval()


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
    ).eval()
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.model_max_length = 16
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=DDIMScheduler(num_train_timesteps=10),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }


def flux_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def out(model: nn.Module) -> Tensor:
    inputs = flux_inputs() if isinstance(model, FluxTransformer2DModel) else unet_inputs()
    with torch.no_grad():
        return model(**inputs).sample


def factors(model: nn.Module, names: list[str], seed: int, rank: int = 3, alpha: float | None = None) -> Factors:
    """Return random A and B for the layers whose path ends with one of the names."""
    generator = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(path.endswith(f".{name}") for name in names):
            down = torch.randn(rank, layer.in_features, generator=generator) * 0.3
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.3
            found[path] = (down, up, float(alpha if alpha is not None else rank))
    assert found
    return found


@torch.no_grad()
def folded(model: nn.Module, *updates: tuple[Factors, float]) -> nn.Module:
    """Return the model with updates added to its weights, each times a number."""
    model = copy.deepcopy(model)
    for update, scale in updates:
        for path, (down, up, alpha) in update.items():
            model.get_submodule(path).weight += scale * alpha / down.shape[0] * (up @ down)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


def peft_keys(prefix: str, update: Factors) -> dict[str, Tensor]:
    keys = {}
    for path, (down, up, _) in update.items():
        keys[f"{prefix}.{path}.lora_A.weight"], keys[f"{prefix}.{path}.lora_B.weight"] = down, up
    return keys


def diffusers_keys(prefix: str, update: Factors) -> dict[str, Tensor]:
    """The style of diffusers before it used peft: ``attn1.processor.to_q_lora.down.weight``."""
    keys = {}
    for path, (down, up, _) in update.items():
        above, _, name = path.partition(".to_")
        name = f"to_{name}".removesuffix(".0")
        keys[f"{prefix}.{above}.processor.{name}_lora.down.weight"] = down
        keys[f"{prefix}.{above}.processor.{name}_lora.up.weight"] = up
    return keys


def kohya_keys(prefix: str, update: Factors) -> dict[str, Tensor]:
    """The style of kohya-ss: ``lora_unet_down_blocks_...lora_down.weight`` with an alpha for each layer."""
    keys = {}
    for path, (down, up, alpha) in update.items():
        name = f"lora_{prefix}_{path.replace('.', '_')}"
        keys[f"{name}.lora_down.weight"], keys[f"{name}.lora_up.weight"] = down, up
        keys[f"{name}.alpha"] = torch.tensor(alpha)
    return keys


@pytest.mark.parametrize("make", [unet, flux])
def test_a_model_takes_switches_scales_fuses_and_drops_adapters(make: Any, tmp_path: Path) -> None:
    plain = make()
    expected = out(plain)
    model = make()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=PROJECTIONS), "first")
    first = out(model)
    assert not torch.allclose(first, expected)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    assert all(isinstance(layer, (LoraLayer, Linear)) for layer in layers)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "second")
    model.set_adapter("first")
    close(out(model), first)
    update = {
        path: (layer.lora_A["first"].weight.detach(), layer.lora_B["first"].weight.detach(), 8.0)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "first" in layer.lora_A
    }
    other = {
        path: (layer.lora_A["second"].weight.detach(), layer.lora_B["second"].weight.detach(), 8.0)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "second" in layer.lora_A
    }
    close(first, out(folded(plain, (update, 1.0))))
    model.set_adapters(["first", "second"], [0.5, 2.0])
    both = out(folded(plain, (update, 0.5), (other, 2.0)))
    close(out(model), both)
    model.fuse_lora()
    close(out(model), both)
    model.unfuse_lora()
    close(out(model), both)
    model.set_adapters(["first"], [1.0])
    model.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["first"])
    close(out(model), out(folded(plain, (update, 0.5))))
    model.unfuse_lora()
    model.set_adapters(["first"], [1.0])
    close(out(model), first)
    model.disable_adapters()
    assert torch.equal(out(model), expected)
    model.enable_adapters()
    model.disable_lora()
    assert torch.equal(out(model), expected)
    model.enable_lora()
    assert model.active_adapters() == ["first"]
    model.save_lora_adapter(tmp_path, adapter_name="first")
    model.delete_adapters("first")
    model.set_adapters(["second"], [1.0])
    close(out(model), out(folded(plain, (other, 1.0))))
    model.unload_lora()
    assert torch.equal(out(model), expected)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    fresh = make()
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="back", weight_name="pytorch_lora_weights.safetensors")
    close(out(fresh), first)


def test_an_adapter_trains_and_its_tensors_are_pefts() -> None:
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=PROJECTIONS))
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    before = None
    for _ in range(3):
        loss = model(**unet_inputs()).sample.pow(2).mean()
        before = before or loss.item()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < before
    keys = get_peft_model_state_dict(model)
    assert len(keys) == len(trained)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) and ".default." not in key for key in keys)


@pytest.mark.parametrize("style", [peft_keys, diffusers_keys, kohya_keys])
def test_a_pipeline_loads_every_style_of_keys(style: Any) -> None:
    pipe = pipeline()
    alpha = 1.5 if style is kohya_keys else None
    update = factors(pipe.unet, PROJECTIONS, seed=5, alpha=alpha)
    expected = out(folded(pipe.unet, (update, 1.0)))
    texts = tiny.tokens(2, 6)
    written = style("unet", update)
    reading = None
    if style is not diffusers_keys:
        reading = factors(pipe.text_encoder, ["q_proj", "v_proj", "out_proj"], seed=6, alpha=alpha)
        if style is kohya_keys:  # its names are those of the encoder inside a CLIP model
            written |= style("te", {f"text_model.{path.removeprefix('text_model.')}": x for path, x in reading.items()})
        else:
            written |= style("text_encoder", reading)
    with torch.no_grad():
        heard = folded(pipe.text_encoder, (reading or {}, 1.0))(texts).last_hidden_state
    pipe.load_lora_weights(written, adapter_name="style")
    close(out(pipe.unet), expected)
    with torch.no_grad():
        close(pipe.text_encoder(texts).last_hidden_state, heard)


def test_a_pipeline_mixes_fuses_saves_and_drops_adapters(tmp_path: Path) -> None:
    pipe = pipeline()
    plain = copy.deepcopy(pipe.unet)
    before = out(plain)
    first, second = (factors(pipe.unet, PROJECTIONS, seed=seed, rank=rank) for seed, rank in ((5, 3), (6, 2)))
    pipe.load_lora_weights(peft_keys("unet", first), adapter_name="first")
    pipe.load_lora_weights(peft_keys("unet", second), adapter_name="second")
    assert set(pipe.get_list_adapters()["unet"]) == {"first", "second"}
    pipe.set_adapters(["first", "second"], adapter_weights=[0.7, 0.3])
    assert pipe.get_active_adapters() == ["first", "second"]
    mixed = out(folded(plain, (first, 0.7), (second, 0.3)))
    close(out(pipe.unet), mixed)
    pipe.fuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 2
    close(out(pipe.unet), mixed)
    pipe.unfuse_lora(components=["unet"])
    close(out(pipe.unet), mixed)
    pipe.set_adapters("first", {"unet": {"down": 0.5}})  # weights by block, the rest stays at 1
    blocks = {path: value for path, value in first.items() if path.startswith("down_blocks")}
    close(out(pipe.unet), out(folded(plain, (first, 1.0), (blocks, -0.5))))
    pipe.set_adapters("first", 1.0)
    picture = pipe("the cat sat", num_inference_steps=1, height=8, width=8, output_type="latent", guidance_scale=1.0)
    assert torch.isfinite(picture.images).all()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="first"))
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters()["unet"] == ["first"]
    close(out(pipe.unet), out(folded(plain, (first, 1.0))))
    pipe.disable_lora()
    assert torch.equal(out(pipe.unet), before)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(out(pipe.unet), before)
    other = pipeline()
    other.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    close(out(other.unet), out(folded(plain, (first, 1.0))))


def test_hot_swapping_in_a_compiled_model() -> None:
    """Adapters of other rank and scale take the place of one without compiling again."""
    plain = unet()
    names = PROJECTIONS
    first = factors(plain, names, seed=5, rank=4)
    second = factors(plain, names, seed=6, rank=2)
    model = unet()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(peft_keys("unet", first), prefix="unet", adapter_name="hot")
    compiled = torch.compile(model, backend="aot_eager")
    close(out(compiled), out(folded(plain, (first, 1.0))))
    model.load_lora_adapter(peft_keys("unet", second), prefix="unet", adapter_name="hot", hotswap=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(out(compiled), out(folded(plain, (second, 1.0))))


def test_hot_swapping_in_a_pipeline() -> None:
    pipe = pipeline()
    plain = copy.deepcopy(pipe.unet)
    first, second = (factors(pipe.unet, PROJECTIONS, seed=seed, rank=rank) for seed, rank in ((5, 3), (6, 2)))
    pipe.enable_lora_hotswap(target_rank=3)
    pipe.load_lora_weights(peft_keys("unet", first), adapter_name="hot")
    close(out(pipe.unet), out(folded(plain, (first, 1.0))))
    pipe.load_lora_weights(peft_keys("unet", second), adapter_name="hot", hotswap=True)
    close(out(pipe.unet), out(folded(plain, (second, 1.0))))
