"""The adapter methods that transformers gives its models (``PeftAdapterMixin``), beside the real peft."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peftless
import pytest
import real_mixin
import tiny
import torch
from peft import (
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = tiny.tokens()
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the real peft wrote; see ``real_mixin``."""
    if peftless.peft_python() is None:
        pytest.skip("there is no .venv with the real peft to compare with")
    folder = tmp_path_factory.mktemp("real")
    peftless.run_with_peft(Path(real_mixin.__file__).read_text(), folder)
    return folder


def test_every_step_as_with_the_real_peft(real: Path) -> None:
    seen = real_mixin.steps(tiny.llama(), real)
    logits, trained = load_file(real / "logits"), json.loads((real / "trained.json").read_text())
    assert seen.keys() == logits.keys()
    for what, (mine, names) in seen.items():
        torch.testing.assert_close(mine, logits[what], msg=what)
        assert names == trained[what], what
    assert not torch.allclose(logits["first"], logits["second"])
    assert not torch.allclose(logits["both"], logits["second"])
    assert torch.equal(seen["disabled"][0], seen["base"][0])
    assert torch.equal(seen["all deleted"][0], seen["base"][0])


def test_state_dict_has_the_keys_of_the_real_peft(real: Path) -> None:
    for name in ("first", "second"):
        model = tiny.llama()
        model.load_adapter(str(real / name), name)
        mine, theirs = model.get_adapter_state_dict(name), load_file(real / f"{name}.keys")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_real_peft_reads_what_the_mixin_saves(tmp_path: Path) -> None:
    if peftless.peft_python() is None:
        pytest.skip("there is no .venv with the real peft to compare with")
    model = tiny.llama()
    model.add_adapter(real_mixin.configs()["second"], "second")
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "saved")
    script = (
        "import sys, tiny, torch\n"
        "from pathlib import Path\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import save_file\n"
        "folder = Path(sys.argv[1]); mixed = tiny.llama(); mixed.load_adapter(str(folder / 'saved'))\n"
        "wrapped = PeftModel.from_pretrained(tiny.llama(), folder / 'saved')\n"
        "ids = tiny.tokens(); out = {'mixed': mixed(ids).logits, 'wrapped': wrapped(ids).logits}\n"
        "save_file(out, folder / 'out')\n"
    )
    peftless.run_with_peft(script, tmp_path)
    want = model(IDS).logits
    for name, logits in load_file(tmp_path / "out").items():
        torch.testing.assert_close(logits, want, msg=name)


def test_fresh_adapter() -> None:
    model = tiny.llama()
    before = model(IDS).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(model(IDS).logits, before)
    assert model.active_adapters() == ["default"]
    assert all("lora_" in name for name in real_mixin.trained(model))
    assert isinstance(model.model.layers[0].self_attn.q_proj, BaseTunerLayer)
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_numbers_are_base_plus_scaled_product() -> None:
    model = tiny.llama().double()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    tiny.scramble(model)
    wanted = tiny.llama().double()
    for mine, plain in zip(model.model.layers, wanted.model.layers, strict=True):
        layer = mine.self_attn.q_proj
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        plain.self_attn.q_proj.weight.data += 6 / 4 * (B @ A).detach()
    torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_what_is_wrong_is_refused() -> None:
    model = tiny.llama()
    for call in (model.active_adapters, model.disable_adapters, model.enable_adapters, model.get_adapter_state_dict):
        with pytest.raises(ValueError, match="No adapter loaded"):
            call()
    with pytest.raises(TypeError, match="PeftConfig"):
        tiny.llama().add_adapter({"r": 4})
    with pytest.raises(ValueError, match=r"not found|matches nothing"):
        tiny.llama().add_adapter(LoraConfig(target_modules=["nowhere"]))
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "one")
    for name, call in {"one": model.add_adapter, "other": None}.items():
        with pytest.raises(ValueError, match=name):
            model.set_adapter(name) if call is None else call(LoraConfig(target_modules=["q_proj"]), name)
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter(["one", "nobody"])
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter("anywhere", "one")
    with pytest.raises(ValueError, match="peft_model_id"):
        model.load_adapter(adapter_name="two")


def test_second_adapter_warns_as_peft_does() -> None:
    model = tiny.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "one")
    with pytest.warns(UserWarning, match="adapters already"):
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "two")
    assert list(model.peft_config) == ["one", "two"]
    assert model.active_adapters() == ["two"]


def test_deleting_all_leaves_a_model_that_takes_new_ones() -> None:
    model = tiny.llama()
    base = model(IDS).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "one")
    tiny.scramble(model)
    model.delete_adapter("one")
    assert not hasattr(model, "peft_config")
    assert model._hf_peft_config_loaded is False
    assert torch.equal(model(IDS).logits, base)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]), "one")
    tiny.scramble(model)
    assert model.active_adapters() == ["one"]
    assert not torch.allclose(model(IDS).logits, base)


METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "lora_bias": LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "full copy": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "token rows": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[5, 7]),
    "parameters": LoraConfig(r=4, target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "fourierft": FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable_tokens": TrainableTokensConfig(token_indices=[5, 7]),
}


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_every_way(method: str, tmp_path: Path) -> None:
    """Saved by the mixin or the wrapper, loaded by the mixin or the wrapper: always the same outputs."""
    base = tiny.llama(num_key_value_heads=2)(IDS).logits
    for saver in ("mixin", "wrapper"):
        config = copy.deepcopy(METHODS[method])
        model = saved = tiny.llama(num_key_value_heads=2)
        if saver == "mixin":
            model.add_adapter(config)
        else:
            saved = get_peft_model(model, config)
        for marker in (
            "lora_",
            "ia3_",
            "hada_",
            "oft_",
            "lambda",
            "fourierft",
            "ln_tuning",
            "modules_to_save",
            "delta",
        ):
            tiny.scramble(model, marker)
        want = model.eval()(IDS).logits
        assert not torch.allclose(want, base, atol=1e-3)
        saved.save_pretrained(tmp_path / saver)
        files = {file.name for file in (tmp_path / saver).iterdir()}
        others = {"README.md", "generation_config.json", "inlay.json"}
        assert files - others == {"adapter_config.json", "adapter_model.safetensors"}
        mixed = tiny.llama(num_key_value_heads=2)
        report = mixed.load_adapter(str(tmp_path / saver))
        assert not report.missing_keys
        assert not report.unexpected_keys
        assert not report.mismatched_keys
        wrapped = PeftModel.from_pretrained(tiny.llama(num_key_value_heads=2), tmp_path / saver)
        torch.testing.assert_close(mixed(IDS).logits, want, msg=f"{saver} to mixin")
        torch.testing.assert_close(wrapped(IDS).logits, want, msg=f"{saver} to wrapper")


def written(folder: Path, config: LoraConfig | None = None, base: Path | None = None) -> torch.Tensor:
    """Write an adapter with random values; returns the logits with it."""
    model = tiny.llama()
    model.add_adapter(config or LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tiny.scramble(model)
    if base is not None:
        tiny.llama().save_pretrained(base)
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return model(IDS).logits


def test_from_pretrained_of_an_adapter_folder(tmp_path: Path) -> None:
    want = written(tmp_path / "adapter", base=tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(model(IDS).logits, want)
    assert model.active_adapters() == ["default"]
    assert not real_mixin.trained(model.model.layers)
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", adapter_kwargs={"revision": None})
    torch.testing.assert_close(named(IDS).logits, want)


def test_adapter_beside_a_whole_model(tmp_path: Path) -> None:
    want = written(tmp_path)
    tiny.llama().save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, want)


def test_model_without_head_takes_the_adapter_of_one_with(tmp_path: Path) -> None:
    written(tmp_path / "adapter", base=tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    trunk = AutoModel.from_pretrained(tmp_path / "base")
    trunk.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(trunk(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("low", [False, True])
def test_state_dict_and_config_given(low: bool, tmp_path: Path) -> None:
    want = written(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for keys in (tensors, {key.removeprefix("base_model.model."): value for key, value in tensors.items()}):
        model = tiny.llama()
        model.load_adapter(
            adapter_state_dict=dict(keys),
            peft_config=PeftConfig.from_pretrained(tmp_path),
            adapter_name="given",
            low_cpu_mem_usage=low,
        )
        torch.testing.assert_close(model(IDS).logits, want)
        assert model.active_adapters() == ["given"]


def test_bin_file_and_subfolder(tmp_path: Path) -> None:
    want = written(tmp_path / "top" / "below")
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "top"), adapter_kwargs={"subfolder": "below"})
    torch.testing.assert_close(model(IDS).logits, want)
    file = tmp_path / "top" / "below" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "top" / "below"), use_safetensors=False)
    torch.testing.assert_close(model(IDS).logits, want)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        tiny.llama().load_adapter(str(tmp_path))
    written(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter"):
        tiny.llama().load_adapter(str(tmp_path))


def test_frozen_unless_asked(tmp_path: Path) -> None:
    written(tmp_path)
    frozen, open_ = tiny.llama().train(), tiny.llama().train()
    frozen.load_adapter(str(tmp_path))
    open_.load_adapter(str(tmp_path), is_trainable=True)
    assert not [name for name in real_mixin.trained(frozen) if "lora_" in name]
    assert not frozen.training
    assert [name for name in real_mixin.trained(open_) if "lora_" in name]
    assert open_.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("way", ["asked", "auto"])
def test_hotswap(way: str, tmp_path: Path) -> None:
    first = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = tiny.llama()
    model.add_adapter(first)
    tiny.scramble(model, seed=11)
    model.save_pretrained(tmp_path / "first")
    tiny.scramble(model, seed=12)
    model.save_pretrained(tmp_path / "second")
    want = model(IDS).logits
    swapped = tiny.llama()
    if way == "auto":
        swapped.enable_peft_hotswap(target_rank=8)
    swapped.load_adapter(str(tmp_path / "first"), adapter_name="default")
    held = swapped.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    before = swapped(IDS).logits
    swapped.load_adapter(str(tmp_path / "second"), adapter_name="default", hotswap=True if way == "asked" else "auto")
    torch.testing.assert_close(swapped(IDS).logits, want)
    assert not torch.allclose(before, want)
    assert swapped.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape == held.shape
    assert list(swapped.peft_config) == ["default"]


def test_hotswap_wants_an_adapter_of_that_name_and_lora(tmp_path: Path) -> None:
    written(tmp_path)
    model = tiny.llama()
    with pytest.raises(ValueError, match="hotswap"):
        model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    model.add_adapter(IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "default")
    with pytest.raises(ValueError, match="LoRA"):
        model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    with pytest.raises(RuntimeError, match="before loading"):
        model.enable_peft_hotswap()


def test_classifier_with_a_full_copy_of_its_head(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = tiny.bert("ForSequenceClassification", num_labels=3)
    base = model(IDS).logits
    model.add_adapter(config)
    assert torch.equal(model(IDS).logits, base)
    assert [n for n in real_mixin.trained(model) if "lora_" not in n] == [
        "classifier.modules_to_save.default.bias",
        "classifier.modules_to_save.default.weight",
    ]
    tiny.scramble(model, "modules_to_save")
    tiny.scramble(model)
    want = model(IDS).logits
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, base)
    model.enable_adapters()  # of transformers, which leaves full copies switched off
    assert isinstance(model.classifier, ModulesToSaveWrapper)
    model.classifier.enable_adapters(True)
    torch.testing.assert_close(model(IDS).logits, want)
    tiny.bert("ForSequenceClassification", num_labels=3).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(again(IDS).logits, want)


def test_encoder_decoder(tmp_path: Path) -> None:
    model = tiny.t5()
    model.add_adapter(LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    tiny.scramble(model)
    want = model(IDS, labels=IDS).logits
    model.save_pretrained(tmp_path)
    again = tiny.t5()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again(IDS, labels=IDS).logits, want)


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.add_adapter(LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    tiny.scramble(model)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = tiny.gpt2()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again(IDS).logits, want)


def test_state_dict_of_a_copy_and_of_given_values() -> None:
    model = tiny.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    tiny.scramble(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)
    given = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    assert all(not value.any() for value in model.get_adapter_state_dict(state_dict=given).values())
    assert get_peft_model_state_dict(twin).keys() == model.get_adapter_state_dict().keys()


def test_full_state_dict_instead_of_peft_format(tmp_path: Path) -> None:
    model = tiny.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_peft_format=False)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys
    assert not any(key.startswith("base_model") for key in keys)
    again = tiny.llama()
    report: Any = again.load_adapter(str(tmp_path))
    assert not report.missing_keys
    shutil.rmtree(tmp_path)
