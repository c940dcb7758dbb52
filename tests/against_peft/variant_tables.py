"""Lines of the tables of methods for LoRA's variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

T = {"target_modules": ["layer"]}
TWO = {"target_modules": ["lin", "wide"]}


def lora(**fields: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})


def blocks(a: list[str] | None = None, b: list[str] | None = None) -> Any:
    return peft.BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=2)


LAYERS = ["linear", "linear_nobias", "wide"]
# (name, config, layers)
VARIANTS = [
    ("kasa", lora(kasa_config=peft.KasaConfig(), **T), LAYERS),
    ("kasa_rs", lora(kasa_config=peft.KasaConfig(), use_rslora=True, **T), ["linear"]),
    ("bdlora_a", lora(use_bdlora=blocks(a=["lay"]), **T), LAYERS),
    ("bdlora_b", lora(use_bdlora=blocks(b=["layer"]), **T), LAYERS),
    ("velora", lora(velora_config=peft.VeloraConfig(num_groups=5), **T), LAYERS),
    ("monteclora", lora(monteclora_config=peft.MontecloraConfig(num_samples=3, buffer_size=2), **T), LAYERS),
]
SAVED_VARIANTS = {
    "kasa": lora(kasa_config=peft.KasaConfig(beta=0.1), **TWO),
    "bdlora": lora(use_bdlora=blocks(["lin"], ["wide"]), **TWO),
    "velora": lora(velora_config=peft.VeloraConfig(num_groups=2, init_type="random"), **TWO),
    "monteclora": lora(monteclora_config=peft.MontecloraConfig(num_samples=3, buffer_size=2), **TWO),
}
