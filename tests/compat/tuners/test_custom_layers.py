"""``LoraConfig._register_custom_module``: a user's LoRA layer for a class of modules that no kind knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import BOTH, OURS, fill, run

SOURCE = '''
import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn


class LoraLSTM(nn.Module, LoraLayer):
    """The input of an LSTM gets a low-rank update."""

    def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.said = sorted(kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        width = self.get_base_layer().input_size
        self.lora_A[adapter_name] = nn.Linear(width, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, width, bias=False)
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def merge(self, safe_merge=False, adapter_names=None):
        for name in adapter_names or self.active_adapters:
            base = self.get_base_layer()
            delta = self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]
            base.weight_ih_l0.data += base.weight_ih_l0.data @ delta
            self.merged_adapters.append(name)

    def forward(self, x):
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.lora_A:
                    x = x + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return self.base_layer(x)


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def make(**options):
    config = LoraConfig(target_modules=["rnn", "out"], r=2, **options)
    config._register_custom_module({nn.LSTM: LoraLSTM})
    return config
'''


def batch():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))


def alike(use):
    theirs, ours = (use(run(SOURCE, root)) for root in BOTH)
    for a, b in zip(theirs, ours, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        else:
            assert a == b


def test_a_custom_layer_runs_trains_and_switches():
    def use(world):
        model = world.get_peft_model(world.Speech(), world.make())
        said = model.base_model.model.rnn.said
        fill(model)
        seen = [said, model(batch()), {name: p.requires_grad for name, p in model.named_parameters()}]
        model(batch()).pow(2).mean().backward()
        seen.append(model.base_model.model.rnn.lora_B["default"].weight.grad)
        model.add_adapter("b", world.make(lora_alpha=16))
        fill(model)
        model.set_adapter("b")
        seen += [model(batch()), {name: p.requires_grad for name, p in model.named_parameters()}]
        with model.disable_adapter():
            seen.append(model(batch()))
        return [*seen, [one.module_type for one in model.get_layer_status()], model.get_nb_trainable_parameters()]

    alike(use)


def test_a_custom_layer_saves_loads_and_merges(tmp_path):
    def use(world):
        model = world.get_peft_model(world.Speech(), world.make())
        fill(model)
        folder = tmp_path / world.peft.__name__
        model.save_pretrained(folder)
        keys = sorted(world.peft.get_peft_model_state_dict(model))
        config = world.make()
        config.inference_mode = True
        again = world.PeftModel.from_pretrained(world.Speech(), folder, config=config)
        before = model(batch())
        bare = model.merge_and_unload()
        return [keys, before, again(batch()), bare(batch()), type(bare.rnn).__name__, type(bare.out).__name__]

    alike(use)


def test_the_configuration_saves_as_any_other():
    world = run(SOURCE, OURS)
    assert "_custom_modules" not in world.make().to_dict()


def test_a_merge_that_fails_in_a_custom_layer_leaves_every_layer_as_it_was():
    world = run(SOURCE, OURS)
    model = world.get_peft_model(world.Speech(), world.make())
    fill(model)
    with torch.no_grad():
        model.base_model.model.rnn.lora_B["default"].weight.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.base_model.model.rnn.merged
    assert not model.base_model.model.out.merged


def test_combining_adapters_on_a_custom_layer_is_refused_not_skipped():
    world = run(SOURCE, OURS)
    model = world.get_peft_model(world.Speech(), world.make())
    model.add_adapter("b", world.make())
    names = sorted(model.state_dict())
    with pytest.raises(ValueError, match="rnn"):
        model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c", "linear")
    assert sorted(model.state_dict()) == names


def test_unmerging_calls_the_layer_and_is_bitwise():
    world = run(SOURCE, OURS)

    class Whole(world.LoraLSTM):
        def unmerge(self):
            self.called = True
            self.merged_adapters.clear()  # does not even put the weight back

    config = world.LoraConfig(target_modules=["rnn"], r=2)
    config._register_custom_module({nn.LSTM: Whole})
    model = world.get_peft_model(world.Speech(), config)
    fill(model)
    before = model.base_model.model.rnn.base_layer.weight_ih_l0.detach().clone()
    model.merge_adapter()
    assert not torch.equal(before, model.base_model.model.rnn.base_layer.weight_ih_l0)
    model.unmerge_adapter()
    assert model.base_model.model.rnn.called
    assert torch.equal(before, model.base_model.model.rnn.base_layer.weight_ih_l0)
