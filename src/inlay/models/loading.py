"""Loading adapters onto a model, and into a wrapper."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay.config.files import HUB_KEYWORDS
from inlay.core.active import set_trainable
from inlay.core.collect import uncollected
from inlay.core.holder import put_in_eval_mode
from inlay.core.policy import Policy
from inlay.core.registry import method_class
from inlay.core.state import State
from inlay.errors import ConfigError, UnknownFieldError, UnsupportedError, did_you_mean
from inlay.models.tuner import tuner_class

if TYPE_CHECKING:
    from inlay.models.wrapper import Wrapper

__all__ = ["LoadOptions", "load_all_onto", "load_into", "load_onto", "refuse_unknown"]

# Keywords of PEFT that say where accelerate is to put an offloaded model's parts.
_DISPATCH = frozenset({"device_map", "max_memory", "offload_buffers", "offload_dir", "offload_folder", "offload_index"})
_OWN = frozenset({"config", "ignore_mismatched_sizes", "subfolder", "torch_device"})


@dataclass(frozen=True)
class LoadOptions:
    """How an adapter is loaded.

    Attributes:
        trainable: let it train; otherwise it is frozen and the model is put in eval mode.
        autocast: adapters of a half-precision model are held in float32.
        low_memory: create tensors when their values are read.
        config: used instead of the file's.
        key_mapping: regular expression -> replacement for the file's keys.
        ignore_sizes: leave tensors of another shape out.
        device: where files are read to.
        subfolder: a folder inside the one that is given.
        hub: keywords of the Hub client.
    """

    trainable: bool = False
    autocast: bool = True
    low_memory: bool = False
    config: Any = None
    key_mapping: dict[str, str] | None = None
    ignore_sizes: bool = False
    device: str | None = None
    subfolder: str | None = None
    hub: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def gathered(
        cls, where: str, kwargs: dict[str, Any], *, ephemeral: bool, model: nn.Module, policy: Policy, **given: Any
    ) -> LoadOptions:
        """Sort a loading function's keywords.

        Raises:
            UnsupportedError: keywords that would move an offloaded model. Where nothing is offloaded they mean nothing,
                and the policy says whether that is let pass.
            UnknownFieldError: any other unknown keyword.
        """
        for name in sorted(_DISPATCH & kwargs.keys()):
            if policy.strict_load or _offloaded(model):
                raise UnsupportedError(f"{where}: {name}: loading adapters onto an offloaded model is not available")
            del kwargs[name]
        if ephemeral:
            raise UnsupportedError(f"{where}: ephemeral_gpu_offload is not available")
        known = {*HUB_KEYWORDS, *_OWN}
        refuse_unknown({key: value for key, value in kwargs.items() if key not in known}, where, known)
        values: dict[str, Any] = {
            "config": kwargs.get("config"),
            "ignore_sizes": bool(kwargs.get("ignore_mismatched_sizes", False)),
            "device": kwargs.get("torch_device"),
            "subfolder": kwargs.get("subfolder"),
            "hub": {key: value for key, value in kwargs.items() if key in HUB_KEYWORDS},
        }
        values.update((key, value) for key, value in given.items() if value is not None)
        return cls(**values)


def _offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps parts of a model on the CPU or on disk while others lie elsewhere."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 and bool(places & {"cpu", "disk"})


def refuse_unknown(kwargs: dict[str, Any], where: str, known: set[str]) -> None:
    """Raise for the first keyword that is left over.

    Raises:
        UnknownFieldError: there is one.
    """
    for key in kwargs:
        raise UnknownFieldError(f"{where}() got an unexpected keyword argument {key!r}.{did_you_mean(key, known)}")


def read_adapter(
    model: nn.Module, model_id: str | os.PathLike[str], options: LoadOptions
) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the tensors of a folder or repository."""
    from inlay.checkpoint import load_adapter_files, load_peft_weights

    mapping = options.key_mapping
    if mapping is None:  # models that were renamed inside say how
        mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
    if options.config is None:
        return load_adapter_files(
            model_id, options.subfolder, device=options.device, key_mapping=mapping, **options.hub
        )
    method_class(options.config.peft_type)
    tensors = load_peft_weights(model_id, options.device, mapping, subfolder=options.subfolder, **options.hub)
    return options.config, tensors


@uncollected
def load_onto(
    cls: type[Wrapper],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    name: str,
    policy: Policy,
    options: LoadOptions,
) -> Any:
    """Return a new wrapper around ``model`` with one adapter."""
    from inlay.models.tasks import wrapper_class

    config, tensors = read_adapter(model, model_id, options)
    tuner = cls.tuner or tuner_class(config.peft_type)
    wrapper = wrapper_class(config.task_type, cls).around(model, policy, tuner)
    # Before there are more modules to go through, unless adapters are there already.
    early = policy.eval_on_load and not options.trainable and not wrapper.state.records
    modes = [(module, module.training) for module in model.modules()] if early else []
    try:
        if early:
            wrapper.eval()
        _enter(wrapper, name, config, tensors, options, model_id)
    except BaseException:
        for module, mode in modes:
            module.training = mode
        raise
    return wrapper


@uncollected
def load_all_onto(
    cls: type[Wrapper], model: nn.Module, model_id: str | os.PathLike[str], policy: Policy, options: LoadOptions
) -> Any:
    """Return a new wrapper around ``model`` with every adapter of a folder, as they were saved."""
    from inlay.checkpoint import load_adapter_files, load_all, read_manifest
    from inlay.models.operate import take_out
    from inlay.models.tasks import wrapper_class

    if options.key_mapping is not None or options.ignore_sizes or options.low_memory:
        raise ConfigError(
            "from_pretrained: adapters='all' cannot be combined with key_mapping, ignore_mismatched_sizes or "
            "low_cpu_mem_usage; load the adapters one by one"
        )
    manifest = read_manifest(model_id, **options.hub)
    first = next(iter(manifest.folders.values())) or None
    config, _ = load_adapter_files(model_id, first, **options.hub)
    tuner = cls.tuner or tuner_class(config.peft_type)
    wrapper = wrapper_class(config.task_type, cls).around(model, policy, tuner)
    fresh = not wrapper.state.records
    modes = {module: module.training for module in model.modules()}
    try:
        load_all(
            wrapper,
            model_id,
            "all",
            is_trainable=options.trainable,
            autocast_adapter_dtype=options.autocast,
            **options.hub,
        )
    except BaseException:
        if fresh:
            take_out(model, wrapper.state, merged=False)
        for module, mode in modes.items():
            module.training = mode
        raise
    return wrapper


@uncollected
def load_into(wrapper: Wrapper, model_id: str | os.PathLike[str], name: str, options: LoadOptions) -> Any:
    """Add an adapter to a wrapper, or fill one that it has; return missing and unexpected keys."""
    config, tensors = read_adapter(wrapper.get_base_model(), model_id, options)
    if name not in wrapper.state.records:
        wrapper.check_method(config)
    return _enter(wrapper, name, config, tensors, options, model_id)


def _enter(
    wrapper: Wrapper, name: str, config: Any, tensors: dict[str, Tensor], options: LoadOptions, source: object
) -> Any:
    from inlay.checkpoint import load_tensors
    from inlay.checkpoint.mapped import release_of

    result = []

    def fill(fresh: State | None) -> None:
        result.append(
            load_tensors(
                wrapper,
                tensors,
                name,
                ignore_mismatched_sizes=options.ignore_sizes,
                source=str(source),
                version=config.peft_version,
                release=release_of(tensors),
                fresh=fresh,
            )
        )

    known = name in wrapper.state.records
    if known:
        fill(None)
        wrapper.state.records[name].frozen &= not options.trainable
    else:
        config.inference_mode = not options.trainable
        # Where keys may be missing, tensors must have initial values.
        complete = wrapper.state.policy.strict_load and not options.ignore_sizes
        wrapper.base_model.add(
            config,
            name,
            autocast=options.autocast,
            low_memory=options.low_memory,
            initialise=not complete,
            held=tensors,
            then=fill,
        )
    if options.trainable:
        set_trainable(wrapper.state, [name], True)
    elif wrapper.state.policy.eval_on_load:
        looked_at = known or wrapper.state.records[name].method.dropout > 0.0
        put_in_eval_mode(wrapper, wrapper.state, [name] if looked_at else ())
    return result[0]
