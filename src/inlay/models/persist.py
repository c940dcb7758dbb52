"""Saving a wrapped model's adapters, and loading them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from inlay.config import PeftConfig
from inlay.config.files import HUB_KEYWORDS
from inlay.core.inject import set_trainable
from inlay.core.policy import INLAY, Policy
from inlay.core.registry import method_class
from inlay.core.state import State
from inlay.errors import ConfigError, UnknownFieldError, UnsupportedError, did_you_mean
from inlay.models.tuner import tuner_class

if TYPE_CHECKING:
    from inlay.models.peft_model import PeftModel

__all__ = ["Persistent"]

T = TypeVar("T", bound="Persistent")

# Keywords of PEFT that say where accelerate is to put an offloaded model's parts.
_DISPATCH = frozenset({"device_map", "max_memory", "offload_buffers", "offload_dir", "offload_folder", "offload_index"})
_OWN = frozenset({"ignore_mismatched_sizes", "subfolder", "torch_device"})


class Persistent:
    """Adds saving and loading to ``PeftModel``."""

    def save_pretrained(
        self: PeftModel,  # type: ignore[misc]
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters, their configurations and a model card; never the base model.

        The adapter ``default`` goes into the folder itself, any other into a folder of its name below. All together
        can be loaded again with ``from_pretrained(..., adapters="all")``.

        Args:
            save_directory: the folder; made where needed.
            safe_serialization: safetensors; False writes a pickle of tensors.
            selected_adapters: which; by default all.
            save_embedding_layers: whether the embeddings' own weights are saved too; ``"auto"`` when they are adapted
                or resized.
            is_main_process: False takes part in gathering sharded tensors and writes nothing.
            path_initial_model_for_weight_conversion: not available; refused.
            state_dict: (keyword) values to save instead of the model's own.

        Raises:
            UnknownAdapterError: there is no such adapter.
            CheckpointError: the folder is a file, or a tensor cannot be saved. Files are replaced whole or not at all.
            UnsupportedError: ``path_initial_model_for_weight_conversion`` is given.
        """
        from inlay.checkpoint import save_adapters

        if path_initial_model_for_weight_conversion is not None:
            raise UnsupportedError(
                "path_initial_model_for_weight_conversion belongs to initialisers that change the base weights, none "
                "of which is available"
            )
        state_dict = kwargs.pop("state_dict", None)
        _refuse(kwargs, "save_pretrained", {"state_dict"})
        save_adapters(
            self,
            save_directory,
            names=selected_adapters,
            safe_serialization=safe_serialization,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            state_dict=state_dict,
        )
        if is_main_process:
            self.create_or_update_model_card(os.fspath(save_directory))

    @classmethod
    def from_pretrained(
        cls: type[T],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        adapters: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter onto a base model, which is changed in place.

        Args:
            model: the bare model.
            model_id: local folder or Hub repository.
            adapter_name: the adapter's name here, whatever it was when it was saved.
            is_trainable: make it trainable; otherwise it is frozen and the model is put in eval mode.
            config: a configuration to use instead of the one in the folder.
            autocast_adapter_dtype: adapters of a half-precision model are held in float32.
            ephemeral_gpu_offload: not available; refused.
            low_cpu_mem_usage: create the adapter's tensors when their values are read, not before.
            key_mapping: regular expression -> replacement for the keys of the file; by default what the model says in
                ``_checkpoint_conversion_mapping``.
            adapters: ``"all"`` loads every adapter that was saved together, with names, order, active set and scales.
            kwargs: ``subfolder``, ``torch_device`` (where tensors are read to), ``ignore_mismatched_sizes``, and what
                ``huggingface_hub.hf_hub_download`` takes (``revision``, ``token``, ``cache_dir``, ...).

        Returns:
            A wrapper of the class that the configuration's ``task_type`` asks for.

        Raises:
            CheckpointMissingError: no adapter there.
            CheckpointError: a damaged file.
            CheckpointMismatchError: tensors that do not fit the model.
            UnknownFieldError: an unknown keyword.
            what :func:`inlay.plan` raises. In each case the model is as before.
        """
        return cls._from_pretrained(
            model,
            model_id,
            adapter_name,
            policy=INLAY,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            adapters=adapters,
            **kwargs,
        )

    @classmethod
    def _from_pretrained(
        cls: type[T],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        policy: Policy,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        adapters: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load under a policy; see :meth:`from_pretrained`."""
        from inlay.models.tasks import wrapper_class

        _check_keywords(kwargs, ephemeral_gpu_offload, "from_pretrained")
        if adapters is not None:
            if adapters != "all":
                raise ConfigError(f"from_pretrained: adapters: expected 'all' or None, found {adapters!r}")
            if config is not None or adapter_name != "default":
                raise ConfigError(
                    "from_pretrained: adapters='all' restores names and configurations as they were saved"
                )
            from inlay.models.collection import load_collection

            return load_collection(
                cls,
                model,
                model_id,
                policy=policy,
                is_trainable=is_trainable,
                autocast=autocast_adapter_dtype,
                low_memory=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
        read = _read(model, model_id, config, key_mapping, kwargs)
        target: Any = wrapper_class(read[0].task_type, cls)
        wrapper = target.around(model, policy, tuner_class(read[0].peft_type))
        wrapper._load(adapter_name, *read, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, kwargs, model_id)
        wrapper.prepare_model_for_gradient_checkpointing(model, only_if_on=True)
        return wrapper

    def load_adapter(
        self: PeftModel,  # type: ignore[misc]
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add an adapter from a folder or the Hub, without activating it; a known name is loaded into again.

        Args:
            torch_device: where the file's tensors are read to, before they go to the model's own devices.
            others: see :meth:`from_pretrained`.

        Returns:
            A named tuple with ``missing_keys`` and ``unexpected_keys``.

        Raises:
            what :meth:`from_pretrained` raises; the model is then as before.
        """
        if torch_device is not None:
            kwargs["torch_device"] = torch_device
        _check_keywords(kwargs, ephemeral_gpu_offload, "load_adapter")
        read = _read(self.get_base_model(), model_id, kwargs.pop("config", None), key_mapping, kwargs)
        if adapter_name not in self.state.records:
            self._check_method(read[0])
        return self._load(
            adapter_name, *read, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, kwargs, model_id
        )

    def _load(
        self: PeftModel,  # type: ignore[misc]
        name: str,
        config: Any,
        tensors: dict[str, Tensor],
        is_trainable: bool,
        autocast: bool,
        low_memory: bool,
        kwargs: dict[str, Any],
        source: object,
    ) -> Any:
        from inlay.checkpoint import load_tensors

        result = []

        def fill(state: State) -> None:
            result.append(
                load_tensors(
                    self,
                    tensors,
                    name,
                    ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
                    source=str(source),
                )
            )

        if name in self.state.records:
            fill(self.state)
            if is_trainable:
                self.state.records[name].frozen = False
                set_trainable(self.state, [name], True)
        else:
            config.inference_mode = not is_trainable
            strict = self.state.policy.strict_load and not kwargs.get("ignore_mismatched_sizes", False)
            self.base_model.add(
                config, name, autocast=autocast, low_memory=low_memory, initialise=not strict, then=fill
            )
            if is_trainable:
                set_trainable(self.state, [name], True)
        if not is_trainable and self.state.policy.eval_on_load:
            self.eval()
        return result[0]

    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:  # type: ignore[misc]
        """Write the facts that the model knows into ``README.md`` of a folder, keeping what else stands there."""
        from inlay.models.card import write_card

        write_card(self, output_dir)


def _read(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    config: Any,
    key_mapping: dict[str, str] | None,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Tensor]]:
    """Return a configuration and the tensors of a folder or repository."""
    from inlay.checkpoint import load_adapter_files, load_peft_weights

    if key_mapping is None:
        key_mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
    hub = {key: value for key, value in kwargs.items() if key in HUB_KEYWORDS}
    device, subfolder = kwargs.get("torch_device"), kwargs.get("subfolder")
    if config is None:
        return load_adapter_files(model_id, subfolder, device=device, key_mapping=key_mapping, **hub)
    method_class(config.peft_type)
    return config, load_peft_weights(model_id, device, key_mapping, subfolder=subfolder, **hub)


def _check_keywords(kwargs: dict[str, Any], ephemeral: bool, where: str) -> None:
    given = sorted(_DISPATCH & kwargs.keys())
    if given:
        raise UnsupportedError(f"{where}: {given[0]}: loading adapters onto an offloaded model is not available")
    if ephemeral:
        raise UnsupportedError(f"{where}: ephemeral_gpu_offload is not available")
    known = {*HUB_KEYWORDS, *_OWN, *({"config"} if where == "load_adapter" else ())}
    _refuse({key: value for key, value in kwargs.items() if key not in known}, where, known)


def _refuse(kwargs: dict[str, Any], where: str, known: set[str]) -> None:
    for key in kwargs:
        raise UnknownFieldError(f"{where}() got an unexpected keyword argument {key!r}.{did_you_mean(key, known)}")
