"""The functions that put adapters into a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.config import PeftConfig
from inlay.core.plan import Plan
from inlay.core.plan import plan as make_plan
from inlay.core.policy import INLAY, Policy
from inlay.core.state import State, find_state
from inlay.errors import ConfigTypeError, StateError, UnknownMethodError
from inlay.models import operate
from inlay.models.again import replaced
from inlay.models.mixed import PeftMixedModel
from inlay.models.peft_model import PeftModel
from inlay.models.tasks import wrapper_class
from inlay.models.tuner import tuner_class

__all__ = ["get_peft_config", "get_peft_model", "inject", "inject_adapter_in_model", "plan", "wrap"]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put an adapter into a model, in place, and return the wrapper that drives it.

    Args:
        model: the bare model; all its parameters are frozen.
        peft_config: the adapter's configuration. Its ``task_type`` chooses the wrapper's class; where the base model
            came from is recorded in it.
        adapter_name: the adapter's name.
        mixed: return a :class:`PeftMixedModel`, whose adapters may be of any methods.
        autocast_adapter_dtype: create adapters of a half-precision model in float32.
        revision: the base model's revision on the Hub, recorded in the configuration.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, for a load to fill.

    Raises:
        TargetError: a pattern matches nothing, or a match cannot be adapted.
        UnsupportedError: the method cannot work on a matched layer; the message says why.
        AdapterNameError: the name is unsafe or taken.
        StateError: the model is a wrapper already. In each case the model is unchanged.
    """
    return wrap(
        model,
        peft_config,
        adapter_name,
        policy=INLAY,
        mixed=mixed,
        autocast=autocast_adapter_dtype,
        revision=revision,
        low_memory=low_cpu_mem_usage,
    )


def wrap(
    model: nn.Module,
    config: Any,
    name: str,
    *,
    policy: Policy,
    mixed: bool = False,
    autocast: bool = True,
    revision: str | None = None,
    low_memory: bool = False,
) -> PeftModel:
    """Do what :func:`get_peft_model` does, under a policy."""
    operate.refuse_prompts(config)
    cls: type[PeftModel] = PeftMixedModel if mixed else wrapper_class(config.task_type)
    wrapper = cls.__new__(cls)
    tuner = cls.tuner or tuner_class(config.peft_type)
    wrapper._begin(model, policy, tuner, config, name, autocast=autocast, low_memory=low_memory)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or model.__dict__.get("name_or_path") or None
    if revision is not None:
        config.revision = revision
    return wrapper


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model, in place, without a wrapper, and activate it.

    Args:
        peft_config: the adapter's configuration, of any method that works on layers.
        model: the model.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, for a load to fill.
        state_dict: an adapter's tensors; the layers that its keys name are adapted instead of what the configuration
            says. Values are not loaded: `set_peft_model_state_dict` does that.

    Returns:
        ``model``, whose attribute ``peft_config`` holds the configurations by adapter name.

    Raises:
        UnsupportedError: a method that learns virtual tokens, or a layer that the method cannot adapt.
        what :func:`get_peft_model` raises. In each case the model is unchanged.
    """
    return inject_bare(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, policy=INLAY)


def inject_bare(
    config: Any,
    model: nn.Module,
    name: str,
    low_memory: bool,
    state_dict: dict[str, Tensor] | None,
    *,
    policy: Policy,
    autocast: bool = True,
) -> nn.Module:
    """Do what :func:`inject_adapter_in_model` does, under a policy."""
    operate.refuse_prompts(config)
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    own = tuner_class(config.peft_type)
    with replaced(root, name, policy):
        if own.injects(config):
            tuner = own.within(root, find_state(root) or State(policy=policy))
            state = tuner._put_in(config, name, autocast=autocast, low_memory=low_memory, state_dict=state_dict)
        else:
            state = operate.add(
                root, config, name, policy=policy, autocast=autocast, low_memory=low_memory, state_dict=state_dict
            )
    operate.activate(state, name)
    return model


def plan(
    model: Any,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    policy: Policy | None = None,
    autocast_adapter_dtype: bool = True,
) -> Plan:
    """Resolve a configuration against a model without changing or allocating anything; print the result to read it.

    Args:
        model: a model on any device, also meta and also with adapters; or what describes one: a configuration of
            transformers, the same as a dict, or the path or Hub name of one.
        config: the adapter's configuration.
        adapter_name: the adapter's name.
        policy: strictness; by default the model's own, or Inlay's.
        autocast_adapter_dtype: adapters of a half-precision model are created in float32.

    Raises:
        TargetError: a pattern matches nothing, or a match cannot be adapted.
        UnsupportedError: the method cannot work on a matched layer; the message says why.
        AdapterNameError: the name is unsafe or taken.
        MissingExtraError: ``model`` describes one, and transformers is not installed.
    """
    operate.refuse_prompts(config)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif not isinstance(model, nn.Module):
        from inlay.models.skeleton import skeleton

        model = skeleton(model, config.task_type)
    return make_plan(model, config, adapter_name, policy=policy, autocast_adapter_dtype=autocast_adapter_dtype)


def inject(plan: Plan, *, low_cpu_mem_usage: bool = False, seed: int | None = None) -> nn.Module:
    """Apply a plan to its model, in place; the adapter is active if it is the model's first.

    Args:
        plan: from :func:`plan`.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, for a load to fill.
        seed: what initial values are drawn from, together with site and slot; by default ``torch.initial_seed()``.

    Returns:
        The bare model.

    Raises:
        StateError: the model was changed since it was planned, or the plan was made from a description of a model.
            The model is unchanged.
    """
    if not isinstance(plan, Plan):
        raise ConfigTypeError(f"expected a plan, found {type(plan).__name__}; make one with inlay.plan(model, config)")
    if plan.model.__dict__.get("_is_skeleton"):
        raise StateError("this plan was made from a description of a model; plan again with the model itself")
    operate.apply(plan.model, plan, low_memory=low_cpu_mem_usage, seed=seed)
    return plan.model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Return the configuration that a dict with ``peft_type`` describes.

    Raises:
        UnknownMethodError: no or an unknown ``peft_type``.
        ConfigError: a wrong value.
    """
    if "peft_type" not in config_dict:
        raise UnknownMethodError("get_peft_config: the key 'peft_type' is missing, which names the method")
    return PeftConfig.from_peft_type(**config_dict)
