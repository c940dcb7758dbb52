"""Loading the pretrained half: tokenizer and base model, and the base that a saved adapter belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlay.errors import CheckpointError, CheckpointMissingError, ConfigError, MissingExtraError, UnsupportedError
from inlay.training.tasks import Task, task_for_type
from inlay.training.tasks.classify import Classify, head_options

LABELS_FILE = "labels.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# how transformers calls the layer whose rows are the classes
HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight", ".classification_head.out_proj.weight")


def transformers_library() -> Any:
    """Return the transformers module, quiet below errors.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"{error.name or 'transformers'} is not installed: pip install 'inlay[train]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def _about_model(model: str) -> Iterator[None]:
    """Turn the many ways in which a model cannot be loaded into one error that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise CheckpointMissingError(f"model {model!r} cannot be loaded: {text[:600]}") from error


def load_tokenizer(model: str) -> Any:
    """Return the model's tokenizer with a padding token (the end token where there is none of its own).

    Raises:
        CheckpointMissingError: no such model, or it has no tokenizer.
        UnsupportedError: there is no token to pad with.
    """
    transformers = transformers_library()
    with _about_model(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UnsupportedError(f"the tokenizer of {model!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str, auto_class: str, tokenizer: Any = None, **options: Any) -> Any:
    """Return the pretrained model under a head of ``auto_class``; weights keep the dtype they were saved in.

    Raises:
        CheckpointMissingError: no such model, or no such head for it.
    """
    transformers = transformers_library()
    with _about_model(model):
        base = getattr(transformers, auto_class).from_pretrained(model, **options)
    if tokenizer is not None and base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id  # classification heads look for the last real token
    return base


def skeleton(model: str, auto_class: str) -> Any:
    """Return the model built from its configuration on the meta device: shapes and names, no weights."""
    import torch

    transformers = transformers_library()
    with _about_model(model):
        config = transformers.AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` as written.

    Raises:
        CheckpointMissingError: no folder, or no such file in it.
        CheckpointError: it is not a JSON object with a ``peft_type``.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = "holds no adapter_config.json" if folder.is_dir() else "is no folder"
        raise CheckpointMissingError(f"adapter {str(folder)!r} {what}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise CheckpointError(f"{path} names no peft_type: not an adapter's configuration")
    return values


def read_labels(folder: Path) -> list[str] | None:
    """Return the label names stored beside an adapter, or None where there are none."""
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except (ValueError, KeyError, TypeError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels) or len(labels) < 2:
        raise CheckpointError(f"{path} is damaged: expected an object with a list of names under 'labels'")
    return labels


def load_adapted(
    adapter: Path, model: str | None, wanted: type[Task] | None = None, dtype: Any = None
) -> tuple[Any, Any, list[str] | None]:
    """Return ``(PeftModel in eval mode, tokenizer, label names)`` for a saved adapter.

    Args:
        adapter: folder of the adapter.
        model: the base; None takes the one that the adapter names.
        wanted: the task that the caller can serve; None takes any.
        dtype: dtype to load the base in; None keeps the saved one.

    Raises:
        ConfigError: no base is known, or the adapter is for another task.
        CheckpointMissingError, CheckpointError: folder, config or model that cannot be read.
    """
    import inlay

    values = read_adapter_config(adapter)
    task = task_for_type(values.get("task_type"))
    if task is None or (wanted is not None and task is not wanted):
        expected = wanted.task_type if wanted is not None else "a task that inlay train knows"
        raise ConfigError(f"adapter {str(adapter)!r} has task_type {values.get('task_type')!r}, expected {expected}")
    source = model or values.get("base_model_name_or_path")
    if not source:
        raise ConfigError(f"adapter {str(adapter)!r} does not name its base model; give --model")
    tokenizer = load_tokenizer(source)
    labels = read_labels(adapter)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    outputs = _head_outputs(adapter) if labels is None and task is Classify else None
    if labels is not None:
        options.update(head_options(labels))
    elif outputs is not None:
        options["num_labels"] = outputs
    base = load_base(source, task.auto_class, tokenizer, **options)
    adapted = inlay.PeftModel.from_pretrained(base, str(adapter))
    adapted.eval()
    return adapted, tokenizer, labels


def _head_outputs(folder: Path) -> int | None:
    """Return the number of classes of an adapter without names for them: the rows of the last layer it saved whole."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            heads = [name for name in file.keys() if name.endswith(HEADS)]  # noqa: SIM118 (no mapping)
            return file.get_slice(heads[-1]).get_shape()[0] if heads else None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def accelerator_device() -> Any:
    """Return the device to try an adapter on: the accelerator if there is one."""
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def length_limit(model_config: Any, tokenizer: Any) -> int | None:
    """Return the most tokens the model can read, or None where nothing says so."""
    known = [getattr(model_config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    limits = [int(limit) for limit in known if limit is not None and 0 < limit < 10**9]
    return min(limits, default=None)
