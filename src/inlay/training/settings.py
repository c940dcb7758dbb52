"""What one training run is told: every setting once, with its type, bounds, default and help text.

The command line makes its flags from this class, and ``--config run.yaml`` is read into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from inlay.errors import CheckpointMissingError, ConfigError, ConfigTypeError, UnknownFieldError, did_you_mean

WHAT, ADAPTER, OPTIMISER, RUNNING = "What to train", "Adapter", "Optimisation", "Running"


Count = Annotated[int, Meta(ge=1)]
Length = Annotated[int, Meta(ge=2)]
Natural = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Paths = Annotated[list[str], Meta(min_length=1)]


def _about(panel: str, text: str) -> Meta:
    return Meta(description=text, extra={"panel": panel})


class RunConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Settings of one run; the field descriptions are the help texts of ``inlay train``."""

    model: Annotated[str, _about(WHAT, "Model name on the hub, or a folder")]
    data: Annotated[Paths, _about(WHAT, "Training files: .jsonl, .txt or .md")]
    task: Annotated[str, _about(WHAT, "causal-lm or classify")]
    output: Annotated[str, _about(WHAT, "New folder for adapter, metrics, plot and checkpoints")]
    eval_data: Annotated[list[str], _about(WHAT, "Files to evaluate on, never trained on")] = []
    eval_fraction: Annotated[
        Share, _about(WHAT, "Share of the training data to hold out when there is no --eval-data")
    ] = 0.0
    text_field: Annotated[str, _about(WHAT, "JSONL field that holds the text")] = "text"
    label_field: Annotated[str, _about(WHAT, "JSONL field that holds the label (classify)")] = "label"
    max_length: Annotated[
        Length | None, _about(WHAT, "Tokens per example; default: 512 for causal-lm, 256 for classify")
    ] = None
    pack: Annotated[bool, _about(WHAT, "causal-lm: fill every example from neighbouring texts")] = True

    method: Annotated[
        str, _about(ADAPTER, "lora, dora, rslora, qalora, kasa, ia3, loha, oft, vera, fourierft, ...")
    ] = "lora"
    rank: Annotated[Count | None, _about(ADAPTER, "Rank, for methods that have one")] = None
    alpha: Annotated[float | None, _about(ADAPTER, "Scale numerator, for methods that have one")] = None
    dropout: Annotated[Share | None, _about(ADAPTER, "Dropout before the adapter")] = None
    init: Annotated[
        str | bool | None,
        _about(
            ADAPTER, "How the adapter starts: gaussian, pissa, olora, loftq, eva, corda, lora_ga, ...; false: random"
        ),
    ] = None
    init_examples: Annotated[
        Count, _about(ADAPTER, "Training examples that eva, corda and lora_ga measure before the first step")
    ] = 64
    target: Annotated[
        list[str] | str | None,
        _about(ADAPTER, "Modules to adapt by name, or all-linear; default: the model family's usual ones"),
    ] = None
    set: Annotated[
        dict[str, Any],
        _about(ADAPTER, "Any other field of the method's configuration, as field=value or field.option=value"),
    ] = {}

    epochs: Annotated[Positive, _about(OPTIMISER, "Passes over the training data")] = 3.0
    max_steps: Annotated[Count | None, _about(OPTIMISER, "Stop after this many steps instead of --epochs")] = None
    batch_size: Annotated[Count, _about(OPTIMISER, "Examples per step and process")] = 8
    accumulate: Annotated[Count, _about(OPTIMISER, "Batches whose gradients make one step")] = 1
    lr: Annotated[Positive, _about(OPTIMISER, "Peak learning rate")] = 3e-4
    schedule: Annotated[str, _about(OPTIMISER, "linear, cosine, constant or constant_with_warmup")] = "linear"
    warmup_steps: Annotated[Natural, _about(OPTIMISER, "Steps over which the learning rate rises")] = 0
    weight_decay: Annotated[NotNegative, _about(OPTIMISER, "AdamW weight decay")] = 0.0
    max_grad_norm: Annotated[NotNegative, _about(OPTIMISER, "Clip the gradient's norm here; 0 for never")] = 1.0
    seed: Annotated[Seed, _about(OPTIMISER, "Seed of initial values, data order and dropout")] = 0

    precision: Annotated[str, _about(RUNNING, "fp32, bf16 or fp16 (mixed; weights stay as loaded)")] = "fp32"
    cpu: Annotated[bool, _about(RUNNING, "Train on the CPU although there is an accelerator")] = False
    gradient_checkpointing: Annotated[bool, _about(RUNNING, "Recompute activations to save memory")] = False
    log_steps: Annotated[Count, _about(RUNNING, "Steps between lines of metrics.jsonl")] = 10
    eval_steps: Annotated[Count | None, _about(RUNNING, "Steps between evaluations; default: every epoch")] = None
    eval_batch_size: Annotated[Count, _about(RUNNING, "Examples per evaluation batch and process")] = 32
    save_steps: Annotated[Count, _about(RUNNING, "Steps between checkpoints")] = 200
    keep_checkpoints: Annotated[Count, _about(RUNNING, "How many checkpoints to keep")] = 2


FIELDS = {field.name: field for field in msgspec.structs.fields(RunConfig)}
CHOICES = {
    "schedule": ("linear", "cosine", "constant", "constant_with_warmup"),
    "precision": ("fp32", "bf16", "fp16"),
}
# A resumed run may watch itself differently; everything else decides the result and has to stay.
MAY_CHANGE_ON_RESUME = frozenset({"output", "keep_checkpoints"})


def build(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Return the typed settings in ``values``; ``origin`` (a file or "command line") goes into messages.

    Raises:
        UnknownFieldError: a key that is no setting.
        ConfigTypeError, ConfigError: a wrong type, a value out of bounds, or a setting that is missing.
    """
    for name in values:
        if name not in FIELDS:
            raise UnknownFieldError(f"{origin}: there is no setting {name!r}.{did_you_mean(str(name), FIELDS)}")
    missing = [name for name, field in FIELDS.items() if field.required and values.get(name) is None]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"{origin}: {flags} missing; give it as a flag or in the --config file")
    for name, value in values.items():
        _check(name, value, origin)
    config = msgspec.convert(dict(values), RunConfig, strict=False)
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            found = getattr(config, name)
            raise ConfigError(
                f"{origin}: {name} is {found!r}, expected one of {', '.join(allowed)}.{did_you_mean(found, allowed)}"
            )
    if config.eval_data and config.eval_fraction:
        raise ConfigError(f"{origin}: eval_data and eval_fraction exclude each other; give one of them")
    return config


def _check(name: str, value: Any, origin: str) -> None:
    """Convert one value alone, so that the message can name its field."""
    try:
        # strict=False reads "1e-4" as a number: YAML 1.1 takes it for a string.
        msgspec.convert(value, FIELDS[name].type, strict=False)
    except msgspec.ValidationError as error:
        text = re.sub(r" - at `\$(.*)`$", r" (at \1)", str(error))
        kind = ConfigTypeError if "got" in text else ConfigError
        raise kind(f"{origin}: {name} is {value!r}: {text[:1].lower()}{text[1:]}") from None


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML in which a repeated key is an error instead of the last one winning in silence."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings written in a YAML file, unchecked but for being one mapping of unique keys.

    Raises:
        CheckpointMissingError: there is no such file.
        ConfigError: not YAML, or not a mapping.
    """
    if not path.is_file():
        raise CheckpointMissingError(f"--config: there is no file {str(path)!r}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected a mapping of settings")
    return values


def parse_assignments(pairs: list[str], flag: str) -> dict[str, Any]:
    """Turn ``["use_rslora=true", "init_weights=false"]`` into a dict with YAML values."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{flag} {pair!r}: expected field=value")
        if name in values:
            raise ConfigError(f"{flag} gives {name!r} twice")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag} {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    return values


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write every setting, defaults included, as a file that ``--config`` reads back to the same run."""
    path.write_text(yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
