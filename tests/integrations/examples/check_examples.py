"""What peft's documentation shows, as users write it: only ``import peft`` and plain torch or transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn


class MLP(nn.Module):
    """The model of the guide to custom models."""

    def __init__(self, num_units_hidden: int = 40) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, X: Tensor) -> Tensor:
        return self.seq(X)


class ConvNet(nn.Module):
    """Like a network of timm: blocks of 1x1 convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv_dw": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                    "mlp": nn.ModuleDict({"fc1": nn.Conv2d(8, 16, 1), "fc2": nn.Conv2d(16, 8, 1)}),
                }
            )
            for _ in range(2)
        )
        self.head = nn.ModuleDict({"fc": nn.Linear(8, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = x + stage["mlp"]["fc2"](torch.relu(stage["mlp"]["fc1"](stage["conv_dw"](x))))
        return self.head["fc"](x.mean((2, 3)))


def trained(model: nn.Module, data: Tensor, targets: Tensor, lr: float = 1e-2, steps: int = 5) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    criterion = nn.CrossEntropyLoss()
    losses = []
    for _ in range(steps):
        loss = criterion(model(data), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_quick_tour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(tiny.gpt2(), peft_config)
    model.print_trainable_parameters()
    # 2 blocks x r x (32 in + 96 out of c_attn)
    assert "trainable params: 2,048" in capsys.readouterr().out
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "output_dir")
    tiny.gpt2().save_pretrained(tmp_path / "base")
    model.eval()
    expected = model(tiny.tokens()).logits
    config = PeftConfig.from_pretrained(tmp_path / "output_dir")
    assert isinstance(config, LoraConfig)
    again = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "output_dir")
    torch.testing.assert_close(again(tiny.tokens()).logits, expected)
    assert again.generate(input_ids=tiny.tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(tmp_path / "output_dir")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "output_dir")
    torch.testing.assert_close(auto(tiny.tokens()).logits, expected)


def test_custom_mlp(tmp_path: Path) -> None:
    X, y = torch.rand((64, 20)), torch.randint(0, 2, (64,))
    config = LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
    module = MLP()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    peft_model = get_peft_model(copy.deepcopy(module), config)
    losses = trained(peft_model, X, y)
    assert losses[-1] < losses[0]
    for name, value in peft_model.base_model.named_parameters():
        plain = name.removeprefix("model.").replace(".base_layer", "").replace(".original_module", "")
        if plain in before:
            assert torch.equal(value, before[plain])
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(module, tmp_path)
    torch.testing.assert_close(loaded(X), peft_model.eval()(X))
    names = [name for name, parameter in loaded.named_parameters() if "lora" in name]
    assert "base_model.model.seq.0.lora_A.default.weight" in names


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=r".*\.mlp\.fc\d", modules_to_save=["head.fc"]),
        LoraConfig(target_modules=["stem", "fc1", "fc2"], use_dora=True),
        LoHaConfig(target_modules=["fc1", "fc2"]),
        IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_convolutional_network(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ConvNet()
    x, y = torch.rand(8, 3, 6, 6), torch.randint(0, 5, (8,))
    model = get_peft_model(copy.deepcopy(net), config)
    losses = trained(model, x, y)
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net, tmp_path)(x), model(x))
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules="all-linear"),
        LoraConfig(
            task_type="CAUSAL_LM", use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "o_proj"]
        ),
        IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4),
        VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8),
        get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_bias": True}),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_language_model_with_each_method(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), config)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trainable
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tiny.tokens()
    first = None
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first
    model.eval()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny.llama(), tmp_path)(ids).logits, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, tiny.llama()(ids).logits)


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    for number, rank in enumerate((2, 4)):
        one = get_peft_model(tiny.llama(), LoraConfig(r=rank, target_modules=["q_proj"]))
        tiny.scramble(one, seed=number)
        one.save_pretrained(tmp_path / f"adapter{number}")
    ids = tiny.tokens()
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter0", adapter_name="zero")
    zero = model(ids).logits
    model.load_adapter(tmp_path / "adapter1", adapter_name="one")
    torch.testing.assert_close(model(ids).logits, zero)
    model.set_adapter("one")
    one = model(ids).logits
    assert not torch.allclose(one, zero)
    mixed = model(ids, adapter_names=["zero", "one"]).logits
    torch.testing.assert_close(mixed, torch.cat([zero[:1], one[1:]]), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["zero", "one"])
    assert model.active_adapters == ["zero", "one"]
    model.delete_adapter("one")
    model.set_adapter("zero")
    torch.testing.assert_close(model(ids).logits, zero)
    with pytest.raises(ValueError, match="one"):
        model.set_adapter("one")


def test_mixed_adapter_types() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 20)
    base = MLP()
    plain = base(x)
    peft_model = get_peft_model(base, LoraConfig(target_modules=["seq.0"]), adapter_name="first", mixed=True)
    assert isinstance(peft_model, PeftMixedModel)
    peft_model.add_adapter("second", LoHaConfig(target_modules=["seq.0", "seq.2"]))
    peft_model.set_adapter(["first", "second"])
    assert peft_model.active_adapters == ["first", "second"]
    for marker in ("lora_", "hada_"):
        tiny.scramble(peft_model, marker, 0.3)
    both = peft_model(x)
    peft_model.set_adapter("first")
    first = peft_model(x)
    assert len({round(float(out.sum()), 4) for out in (plain, first, both)}) == 3
    with peft_model.disable_adapter():
        torch.testing.assert_close(peft_model(x), plain)
    peft_model.set_adapter(["first", "second"])
    torch.testing.assert_close(peft_model.merge_and_unload()(x), both, rtol=1e-4, atol=1e-5)


def test_low_level_injection() -> None:
    class DummyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 10)
            self.linear = nn.Linear(10, 10)
            self.lm_head = nn.Linear(10, 10)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lm_head(self.linear(self.embedding(input_ids)))

    lora_config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
    torch.manual_seed(0)
    base = DummyModel()
    model = inject_adapter_in_model(lora_config, copy.deepcopy(base))
    assert type(model) is DummyModel
    ids = torch.LongTensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(model(ids), base(ids))
    assert "lora_A" in str(model)
    tiny.scramble(model)
    peft_state_dict = get_peft_model_state_dict(model)
    assert sorted(peft_state_dict) == ["linear.lora_A.weight", "linear.lora_B.weight"]
    other = inject_adapter_in_model(lora_config, copy.deepcopy(base))
    outcome = set_peft_model_state_dict(other, peft_state_dict)
    assert not outcome.unexpected_keys
    torch.testing.assert_close(other.eval()(ids), model.eval()(ids))
    low = inject_adapter_in_model(lora_config, copy.deepcopy(base), low_cpu_mem_usage=True)
    assert low.linear.lora_A["default"].weight.device.type == "meta"
    set_peft_model_state_dict(low, peft_state_dict, low_cpu_mem_usage=True)
    torch.testing.assert_close(low.eval()(ids), model(ids))
    by_keys = inject_adapter_in_model(LoraConfig(r=64), copy.deepcopy(base), state_dict=peft_state_dict)
    assert isinstance(by_keys.linear.lora_A, nn.ModuleDict)
    assert isinstance(by_keys.linear.lora_A["default"], nn.Linear)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_model_merging(combination: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="norobots")
    model.add_adapter("adcopy", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.scramble(model)
    options = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
    model.add_weighted_adapter(["norobots", "adcopy"], [2.0, 0.3], "merge", combination_type=combination, **options)
    model.set_adapter("merge")
    assert "merge" in model.peft_config
    ids = tiny.tokens()
    if combination == "cat":  # exact: the sum of both updates
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        expected = 2.0 * layer.get_delta_weight("norobots") + 0.3 * layer.get_delta_weight("adcopy")
        torch.testing.assert_close(layer.get_delta_weight("merge"), expected, rtol=1e-4, atol=1e-6)
    output = model(ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["merge"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "merge")
    torch.testing.assert_close(loaded(ids).logits, output, rtol=1e-4, atol=1e-5)


def test_hotswapping_with_torch_compile(tmp_path: Path) -> None:
    for number, (rank, alpha) in enumerate(((4, 8), (8, 4))):
        one = get_peft_model(tiny.llama(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        tiny.scramble(one, seed=number)
        one.save_pretrained(tmp_path / f"adapter{number}")
    ids = tiny.tokens()
    expected = [PeftModel.from_pretrained(tiny.llama(), tmp_path / f"adapter{n}")(ids).logits for n in (0, 1)]
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter0")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids).logits, expected[0], rtol=1e-4, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, tmp_path / "adapter1", adapter_name="default")
            torch.testing.assert_close(compiled(ids).logits, expected[1], rtol=1e-4, atol=1e-5)


def test_quantised_preparation_and_status() -> None:
    model = peft.prepare_model_for_kbit_training(tiny.llama(), use_gradient_checkpointing=False)
    assert not any(value.requires_grad for value in model.parameters())
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    status = model.get_model_status()
    assert status.num_adapter_layers == 2
    assert status.active_adapters == ["default"]
    assert [layer.module_type for layer in model.get_layer_status()] == ["lora.Linear"] * 2
    assert status.peft_types == {"default": "LORA"}


def test_custom_layer() -> None:
    """Registering a layer of one's own for a kind that peft does not know."""
    from peft.tuners.lora import LoraLayer

    class LoraLSTM(nn.Module, LoraLayer):
        def __init__(self, base_layer: nn.LSTM, adapter_name: str, **kwargs: Any) -> None:
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            width = base_layer.hidden_size
            self.lora_A[adapter_name] = nn.Linear(width, 2, bias=False)
            self.lora_B[adapter_name] = nn.Linear(2, width, bias=False)
            nn.init.zeros_(self.lora_B[adapter_name].weight)

        def forward(self, x: Tensor) -> Any:
            out, state = self.base_layer(x)
            if not self.disable_adapters:
                for name in self.active_adapters:
                    out = out + self.lora_B[name](self.lora_A[name](out))
            return out, state

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    config = LoraConfig(target_modules=["lstm", "out"])
    config._register_custom_module({nn.LSTM: LoraLSTM})
    torch.manual_seed(0)
    base = Net()
    x, y = torch.randn(8, 5, 6), torch.randint(0, 2, (8,))
    plain = base(x)
    model = get_peft_model(base, config)
    assert isinstance(base.lstm, LoraLSTM)
    torch.testing.assert_close(model(x), plain)
    losses = trained(model, x, y)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain)
    assert any("lstm.lora_A" in key for key in get_peft_model_state_dict(model))
