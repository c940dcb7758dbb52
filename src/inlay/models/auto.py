"""Base model and adapter from the adapter's folder alone."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, ClassVar

from inlay.config import PeftConfig
from inlay.config.files import HUB_KEYWORDS
from inlay.errors import CheckpointError, ConfigError, MissingExtraError, did_you_mean
from inlay.models.skeleton import AUTO_CLASSES, transformers_library
from inlay.models.tasks import wrapper_class

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

# Libraries whose classes an adapter's configuration may name; a file must not be able to import anything else.
LIBRARIES = ("diffusers", "transformers")


class AutoPeftModel:
    """Loads the base model that an adapter names, then the adapter. Use ``from_pretrained``; there are no instances."""

    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} has no instances; use {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load base model and adapter.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub repository; its configuration names the base.
            adapter_name: the adapter's name here.
            is_trainable: make the adapter trainable.
            config: a configuration to use instead of the one in the folder.
            revision: the adapter's revision. That of the base model stands in the configuration.
            import_allowlist: libraries whose model class the configuration may name (where it has no task); by default
                diffusers and transformers.
            kwargs: what ``huggingface_hub`` takes goes to both loads; ``subfolder``, ``autocast_adapter_dtype``,
                ``key_mapping`` and ``ignore_mismatched_sizes`` to the adapter's; the rest (``dtype``, ``device_map``,
                ...) to the base model's.

        Returns:
            The wrapper that :meth:`inlay.PeftModel.from_pretrained` returns.

        Raises:
            CheckpointMissingError: no adapter there.
            CheckpointError: the configuration names no base model.
            ConfigError: the task is another one than this class stands for, or the configuration names a class
                that may not be imported.
            MissingExtraError: transformers is not installed.
        """
        library = transformers_library(f"{cls.__name__}.from_pretrained")
        for_adapter = {
            key: kwargs.pop(key)
            for key in ("subfolder", "autocast_adapter_dtype", "key_mapping", "ignore_mismatched_sizes")
            if key in kwargs
        }
        hub = {key: value for key, value in kwargs.items() if key in HUB_KEYWORDS}
        if revision is not None:
            hub["revision"] = revision
        if config is None:
            config = PeftConfig.from_pretrained(
                pretrained_model_name_or_path, subfolder=for_adapter.get("subfolder"), **hub
            )
        base_name = config.base_model_name_or_path
        if not base_name:
            raise CheckpointError(
                f"{os.fspath(pretrained_model_name_or_path)!r}: the configuration names no base model; load one and "
                "use PeftModel.from_pretrained(model, folder)"
            )
        allowed = LIBRARIES if import_allowlist is None else tuple(import_allowlist)
        target = cls._base_class(library, config, allowed)
        base = target.from_pretrained(base_name, **{**kwargs, "revision": config.revision or "main"})
        wrapper: Any = wrapper_class(cls.task or config.task_type)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, for_adapter.get("subfolder"), hub)
        return wrapper.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **for_adapter,
            **hub,
        )

    @classmethod
    def _base_class(cls, library: Any, config: Any, allowed: tuple[str, ...]) -> Any:
        """Return the class that loads the base model."""
        task = None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))
        if cls.task is not None:
            if task is not None and task != cls.task:
                raise ConfigError(f"{cls.__name__} is for {cls.task}, and the adapter's task_type is {task}")
            return getattr(library, AUTO_CLASSES[cls.task])
        if task in AUTO_CLASSES:
            return getattr(library, AUTO_CLASSES[task])
        named = config.auto_mapping or {}
        name, module = named.get("base_model_class"), str(named.get("parent_library", ""))
        if not isinstance(name, str):
            raise ConfigError(
                "the adapter's configuration has neither task_type nor auto_mapping.base_model_class, so the class of "
                "its base model is not known; use one of the AutoPeftModelFor... classes"
            )
        return _named_class(module, name, allowed)

    @classmethod
    def _fit_vocabulary(cls, base: Any, folder: Any, subfolder: str | None, hub: dict[str, Any]) -> None:
        """Give the base model rows for tokens that a tokenizer saved beside the adapter has beyond its own."""
        local = os.path.join(os.fspath(folder), subfolder or "")
        if not os.path.isfile(os.path.join(local, "tokenizer_config.json")):
            return
        library = transformers_library("Reading the tokenizer beside an adapter")
        tokenizer = library.AutoTokenizer.from_pretrained(local)
        rows = base.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            base.resize_token_embeddings(len(tokenizer))


def _named_class(module: str, name: str, allowed: tuple[str, ...]) -> Any:
    """Import the model class that a configuration names, from libraries that are allowed only."""
    if not any(module == library or module.startswith(f"{library}.") for library in allowed):
        raise ConfigError(
            f"auto_mapping: the configuration wants {name!r} imported from {module!r}, and only "
            f"{', '.join(allowed)} may be imported because a file says so; if that library can be trusted, give "
            f"import_allowlist=[{module.partition('.')[0]!r}]"
        )
    try:
        library = import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"auto_mapping: the base model's class is in {module!r}: {error}") from error
    found = getattr(library, name, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ConfigError(f"auto_mapping: {module}.{name} is no model class.{did_you_mean(name, dir(library))}")
    return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """:class:`AutoPeftModel` for CAUSAL_LM."""

    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """:class:`AutoPeftModel` for SEQ_2_SEQ_LM."""

    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """:class:`AutoPeftModel` for SEQ_CLS."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """:class:`AutoPeftModel` for TOKEN_CLS."""

    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """:class:`AutoPeftModel` for QUESTION_ANS."""

    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """:class:`AutoPeftModel` for FEATURE_EXTRACTION."""

    task = "FEATURE_EXTRACTION"
