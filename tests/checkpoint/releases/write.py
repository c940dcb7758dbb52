"""Runs inside one release of peft: write a folder per case. Called by ``make.py``, with the release on the path."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bases import base, logits, shake
from cases import CASES, Case
from safetensors.torch import load_file, save_file
from torch import nn

warnings.filterwarnings("ignore")

import peft  # noqa: E402


class PlainConfig:
    """What releases before 0.5 ask of any model: a transformers-like configuration."""

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "plain"}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def stand(case: Case) -> nn.Module:
    """Return the case's base model, as this release wants it."""
    model = base(case.base)
    if case.form == "compiled":
        model = torch.compile(model, backend="eager")
    if case.base == "net" and version(peft.__version__) < (0, 5):
        model.config = PlainConfig()
        model.prepare_inputs_for_generation = lambda *args, **kwargs: None
    return model


def config_of(case: Case) -> Any:
    name, fields = case.config
    return getattr(peft, name)(**json.loads(json.dumps(fields)))


def make(case: Case, folder: Path) -> torch.Tensor:
    """Write one adapter folder; return what the adapted model answers."""
    first, *others = case.names
    torch.manual_seed(0)
    if first == "default":
        model = peft.get_peft_model(stand(case), config_of(case))
    else:  # get_peft_model took no name at first
        model = peft.PeftModel(stand(case), config_of(case), first)
    for name in others:
        model.add_adapter(name, config_of(case))
        model.set_adapter(name)
        shake(model)
    if others:
        model.set_adapter(first)
    shake(model)
    model.eval()
    answer = logits(model)
    model.save_pretrained(str(folder), **dict(case.save))
    if case.form in ("raw", "parallel"):
        write_by_hand(case, model, folder)
    if case.merged:
        return logits(model.merge_and_unload())
    for name in others:
        model.set_adapter(name)
        save_file({"y": logits(model)}, folder / name / "answer.safetensors")
    return answer


def write_by_hand(case: Case, model: nn.Module, folder: Path) -> None:
    """Replace the weights by what a training script of its own would write."""
    for old in folder.glob("adapter_model.*"):
        old.unlink()
    if case.form == "raw":
        values = {key: value for key, value in model.state_dict().items() if "lora_" in key or "modules_to_save" in key}
    else:
        around = nn.DataParallel(model)
        values = peft.get_peft_model_state_dict(model, state_dict=around.state_dict())
    torch.save(values, folder / "adapter_model.bin")


def reread(case: Case, folder: Path) -> torch.Tensor:
    """What this release itself answers after loading the folder."""
    place = folder if case.names[0] == "default" else folder / case.names[0]
    return logits(peft.PeftModel.from_pretrained(stand(case), str(place)).eval())


def read_answers(folder: Path) -> dict[str, torch.Tensor]:
    """Take the answers of further adapters out of the folder, where ``make`` left them."""
    found = {}
    for path in folder.rglob("answer.safetensors"):
        found[path.parent.name] = load_file(path)["y"].contiguous()
        path.unlink()
    return found


def write_configs(out: Path) -> None:
    """Every method's configuration with nothing set: as a file, and as a pickle."""
    for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if "AdaLora" in cls.__name__ and version(peft.__version__) >= (0, 14):
            config = cls(total_step=10)
        elif cls.__name__.startswith("AdaptionPrompt"):
            config = cls(adapter_len=2, adapter_layers=1)
        else:
            try:
                config = cls()
            except Exception:  # needs what its method needs; not built in Inlay, or covered by a case
                continue
        folder = out / "configs" / getattr(kind, "value", kind)
        config.save_pretrained(str(folder))
        (folder / "config.pickle").write_bytes(pickle.dumps(config, protocol=4))


def main(out: Path, only: list[str]) -> None:
    answers: dict[str, torch.Tensor] = {}
    report: dict[str, str] = {}
    for name, case in CASES.items():
        if only and name not in only:
            continue
        if not version(case.since) <= version(peft.__version__) <= version(case.until):
            continue
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            plain = logits(stand(case))
            answers[name] = make(case, folder).contiguous()
            assert (answers[name] - plain).abs().max() > 1e-2, "the adapter changes nothing"
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            answers.pop(name, None)
            report[name] = f"not made: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        for extra in [*folder.rglob("README.md"), *folder.rglob(".gitattributes")]:
            extra.unlink()
        answers |= {f"{name}/{second}": answer for second, answer in read_answers(folder).items()}
        try:
            own = reread(case, folder).contiguous()
            same = torch.allclose(own, answers[name], rtol=1e-5, atol=1e-5)
            report[name] = "made" if same or case.merged else "made; this release reads it with other outputs"
            if not same and not case.merged:
                answers[f"{name}/reread"] = own
        except Exception as error:
            report[name] = f"made; this release cannot read it: {type(error).__name__}: {str(error)[:160]}"
    write_configs(out)
    save_file(answers, out / "outputs.safetensors")
    (out / "made.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
