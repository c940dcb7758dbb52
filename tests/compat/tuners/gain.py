"""A method that a user may bring: every output of a layer is scaled by a learned number."""

SOURCE = """
import copy
import warnings
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import nn

import peft
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method


@dataclass
class GainConfig(PeftConfig):
    target_modules: Optional[list[str] | str] = field(default=None)
    exclude_modules: Optional[list[str] | str] = field(default=None)
    modules_to_save: Optional[list[str]] = field(default=None)
    strength: float = field(default=1.0)
    bias: str = field(default="none")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.GAIN
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class GainLayer(BaseTunerLayer):
    adapter_layer_names = ("gain_scale", "gain_offset")
    other_param_names = ("strength",)

    def __init__(self, base_layer, **kwargs):
        self.base_layer = base_layer
        self.gain_scale = nn.ParameterDict({})
        self.gain_offset = nn.ModuleDict({})
        self.strength = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(self, adapter_name, strength, inference_mode=False):
        self.strength[adapter_name] = strength
        self.gain_scale[adapter_name] = nn.Parameter(torch.zeros(self.out_features))
        self.gain_offset[adapter_name] = nn.Linear(self.in_features, self.out_features, bias=False)
        nn.init.zeros_(self.gain_offset[adapter_name].weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)


class GainLinear(nn.Module, GainLayer):
    def __init__(self, base_layer, adapter_name, strength, inference_mode=False, **kwargs):
        super().__init__()
        GainLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, strength, inference_mode)

    def get_delta_weight(self, adapter):
        base = self.get_base_layer().weight
        scaled = base * (self.gain_scale[adapter] * self.strength[adapter])[:, None]
        return scaled + self.gain_offset[adapter].weight

    def merge(self, safe_merge=False, adapter_names=None):
        adapter_names = check_adapters_to_merge(self, adapter_names)
        for adapter in adapter_names or []:
            if adapter in self.gain_scale:
                self.get_base_layer().weight.data += self.get_delta_weight(adapter)
                self.merged_adapters.append(adapter)

    def unmerge(self):
        if not self.merged:
            warnings.warn("nothing to unmerge")
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight = self.get_base_layer().weight.data
            weight -= self.gain_offset[adapter].weight
            weight /= (1 + self.gain_scale[adapter] * self.strength[adapter])[:, None]

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        plain = nn.functional.linear(x, self.get_base_layer().weight)
        for adapter in self.active_adapters:
            if adapter in self.gain_scale:
                result = result + plain * self.gain_scale[adapter] * self.strength[adapter]
                result = result + self.gain_offset[adapter](x)
        return result

    def __repr__(self):
        return "gain." + super().__repr__()


class GainModel(BaseTuner):
    prefix = "gain_"
    tuner_layer_cls = GainLayer
    target_module_mapping = {"gpt2": ["c_attn"]}

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name, config.strength, config.inference_mode)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(f"cannot adapt {type(base)}")
        new = GainLinear(target, adapter_name, config.strength, config.inference_mode)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)
"""

REGISTER = """
register_peft_method(name="gain", config_cls=GainConfig, model_cls=GainModel)
"""
