"""What the real peft does with the adapter methods of transformers' models; run where it is installed.

Writes two adapters and, for each thing that one can do with them, logits and the names of what trains.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file


def configs() -> dict[str, Any]:
    """Return the configurations of the adapters: different layers, ranks and methods of scaling."""
    from peft import LoraConfig

    return {
        "first": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "second": LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "down_proj"], use_rslora=True),
    }


def trained(model: Any) -> list[str]:
    """Return the names of the parameters that train."""
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def steps(model: Any, folder: Path) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Do everything, one thing after the other; returns logits and what trains after each."""
    ids = tiny.tokens()
    seen: dict[str, tuple[torch.Tensor, list[str]]] = {}

    def look(what: str) -> None:
        seen[what] = (model(ids).logits.detach().clone(), trained(model))

    look("base")
    model.load_adapter(str(folder / "first"), "first")
    look("one loaded")
    model.load_adapter(str(folder / "second"), "second")
    look("two loaded")
    model.set_adapter("second")
    look("second")
    model.set_adapter(["first", "second"])
    look("both")
    model.disable_adapters()
    seen["disabled"] = (model(ids).logits.detach().clone(), [])
    model.enable_adapters()
    look("enabled")
    model.set_adapter("first")
    look("first")
    model.delete_adapter("second")
    look("second deleted")
    model.load_adapter(str(folder / "second"), "trains", is_trainable=True)
    model.set_adapter("trains")
    look("trains")
    model.delete_adapter(["first", "trains"])
    look("all deleted")
    return seen


def main(folder: Path) -> None:
    """Write adapters and results."""
    warnings.simplefilter("ignore")
    for name, config in configs().items():
        model = tiny.llama()
        model.add_adapter(config, name)
        tiny.scramble(model, seed=len(name))
        model.save_pretrained(folder / name)
        save_file({k: v.contiguous() for k, v in model.get_adapter_state_dict().items()}, folder / f"{name}.keys")
    seen = steps(tiny.llama(), folder)
    save_file({what: logits for what, (logits, _) in seen.items()}, folder / "logits")
    (folder / "trained.json").write_text(json.dumps({what: names for what, (_, names) in seen.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
