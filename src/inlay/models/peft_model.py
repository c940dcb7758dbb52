"""``PeftModel``: the wrapper with its files and its figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from inlay.config import PeftConfig, write_atomically
from inlay.config.hub import PushToHub
from inlay.core.layer import AdaptedLayer
from inlay.core.policy import Policy, default_policy
from inlay.errors import ConfigError
from inlay.models import counting
from inlay.models.backprop import is_checkpointing
from inlay.models.loading import LoadOptions, load_all_onto, load_into, load_onto, refuse_unknown
from inlay.models.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from inlay.models.tuner import tuner_class
from inlay.models.wrapper import Wrapper

__all__ = ["PeftModel"]

T = TypeVar("T", bound="PeftModel")


class PeftModel(PushToHub, Wrapper):
    """A model with adapters: forwards like the model, and adds, chooses, merges, saves and loads adapters.

    The bare model is changed in place and stands at ``base_model.model``; attributes that the wrapper does not have
    are the bare model's.

    Args:
        model: the bare model.
        peft_config: the first adapter's configuration.
        adapter_name: its name.
        autocast_adapter_dtype: create adapters of a half-precision model in float32.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, for a load to fill.

    Raises:
        what :func:`inlay.plan` raises; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        tuner = tuner_class(peft_config.peft_type)
        options = {"autocast": autocast_adapter_dtype, "low_memory": low_cpu_mem_usage}
        self._begin(model, default_policy(), tuner, peft_config, adapter_name, **options)

    # -- what there is --------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters, packed 4-bit weights counted in full."""
        return counting.count(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio in one line; warns where adapters save no memory or nothing trains."""
        counting.show(self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of each adapted layer; see :func:`inlay.get_layer_status`."""
        return layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of the model; see :func:`inlay.get_model_status`."""
        return model_status(self)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The bare model's dtype."""
        return getattr(self.get_base_model(), "dtype", None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer of an adapter has an update that :func:`inlay.convert_to_lora` approximates.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        from inlay.combine import no_lora_at

        self.state.record(adapter_name)
        layers = [layer for layer in self.state.layers() if isinstance(layer, AdaptedLayer)]
        held = [layer for layer in layers if adapter_name in layer.entries]
        return bool(held) and all(no_lora_at(layer, adapter_name) is None for layer in held)

    def save_pretrained(
        self,
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
            path_initial_model_for_weight_conversion: where an adapter whose start changed base weights (PiSSA, OLoRA,
                CorDA, LoRA-GA) was saved before it was trained; it is then saved as an ordinary LoRA of twice the rank
                over the original base weights.
            state_dict: (keyword) values to save instead of the model's own.

        Raises:
            UnknownAdapterError: there is no such adapter.
            CheckpointError: the folder is a file, or a tensor cannot be saved. Files are replaced whole or not at all.
            UnsupportedError: ``path_initial_model_for_weight_conversion`` is given for another method than LoRA.
            CheckpointMismatchError: that folder holds an adapter of other layers or ranks.
        """
        from inlay.checkpoint import save_adapters

        state_dict = kwargs.pop("state_dict", None)
        refuse_unknown(kwargs, "save_pretrained", {"state_dict"})
        save_adapters(
            self,
            save_directory,
            selected_adapters=selected_adapters,
            safe_serialization=safe_serialization,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            state_dict=state_dict,
            initial=path_initial_model_for_weight_conversion,
        )

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
        return cls.loaded(
            model,
            model_id,
            adapter_name,
            default_policy(),
            adapters,
            LoadOptions.gathered(
                "from_pretrained",
                kwargs,
                ephemeral=ephemeral_gpu_offload,
                model=model,
                policy=default_policy(),
                trainable=is_trainable,
                config=config,
                autocast=autocast_adapter_dtype,
                low_memory=low_cpu_mem_usage,
                key_mapping=key_mapping,
            ),
        )

    @classmethod
    def loaded(
        cls: type[T],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        name: str,
        policy: Policy,
        adapters: str | None,
        options: LoadOptions,
    ) -> Any:
        """Do what :meth:`from_pretrained` does, under a policy."""
        checkpointing = is_checkpointing(model)  # asked of every module, so before there are more of them
        if adapters is None:
            wrapper = load_onto(cls, model, model_id, name, policy, options)
        elif adapters != "all":
            raise ConfigError(f"from_pretrained: adapters: expected 'all' or None, found {adapters!r}")
        elif options.config is not None or options.subfolder is not None or name != "default":
            raise ConfigError("from_pretrained: adapters='all' takes names and configurations as they were saved")
        else:
            wrapper = load_all_onto(cls, model, model_id, policy, options)
        if checkpointing:
            wrapper.prepare_model_for_gradient_checkpointing(model)
        return wrapper

    def load_adapter(
        self,
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
        options = LoadOptions.gathered(
            "load_adapter",
            kwargs,
            ephemeral=ephemeral_gpu_offload,
            model=self.get_base_model(),
            policy=self.state.policy,
            trainable=is_trainable,
            device=torch_device,
            autocast=autocast_adapter_dtype,
            low_memory=low_cpu_mem_usage,
            key_mapping=key_mapping,
        )
        return load_into(self, model_id, adapter_name, options)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the facts that the model knows into ``README.md`` of a folder, keeping what else stands there."""
        from inlay.checkpoint import model_card

        path = Path(output_dir, "README.md")
        existing = path.read_text(encoding="utf-8") if path.is_file() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model_card(self.get_base_model(), self.peft_config, existing))
