"""The EVA start: principal directions of what layers read, and ranks shared out by what they explain."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from inlay.config.starts import EvaConfig
from inlay.core.layer import AdaptedLayer
from inlay.errors import ConfigError, ConfigTypeError, UnsupportedError
from inlay.inits.calibration import Spot, in_mode, inputs_of, rows, spots, unseen
from inlay.inits.eva import Watched, fingerprint, group, watch
from inlay.models.eva_ranks import place_directions

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]

ModelInputs = Callable[[Any, Any], Any]
LayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a dict of keywords."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Return the places (n, 2) of the tokens that count: neither padding nor, by default, without a label.

    Raises:
        ConfigTypeError: the batch is no dict.
    """
    if not isinstance(model_input, dict):
        raise ConfigTypeError(f"expected a dict of model inputs, found {type(model_input).__name__}")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    options = peft_config.eva_config or EvaConfig()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows of a layer's input at the tokens that count.

    Raises:
        ConfigTypeError: the input is no tensor and starts with none.
    """
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        raise ConfigTypeError(
            f"{layer_name!r} receives a {type(layer_input).__name__}; give prepare_layer_inputs_fn for such layers"
        )
    return layer_input[model_input.T.unbind()]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the principal directions of what each layer reads, as many as the rank that it is to have.

    Args:
        model: a ``PeftModel``, whose adapter is switched off meanwhile, or a model without adapters.
        dataloader: batches; gone through again until the directions stand still.
        peft_config: needed for a model without adapters.
        forward_fn: ``forward_fn(model, batch)``; by default ``model(**batch)``.
        prepare_model_inputs_fn: ``f(batch, peft_config)``, whose result the next argument's function gets; by default
            the places of the tokens that count.
        prepare_layer_inputs_fn: ``f(layer_input, model_inputs, layer_name)``, the rows (n, features) that count, or a
            dict of such by layer; None takes all rows, in the layer's own view: patches of a convolution, say.
        adapter_name: which adapter.
        gather_distributed_inputs: collect rows from all processes.
        show_progress_bar: show how many layers are done.

    Returns:
        Layer name, as ``model.named_modules()`` has it -> (rank, fan_in). The rank may be 0.

    Raises:
        ConfigError: no configuration, no batches, or functions for layers that there are not.
        UnsupportedError: batches are too small for the ranks.
    """
    config = peft_config
    wrapped = hasattr(model, "peft_config")
    if config is None:
        if not wrapped:
            raise ConfigError("peft_config is required for a model that is no PeftModel")
        config = model.peft_config[adapter_name]  # type: ignore[index]  # a wrapper or a bare model has it
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ConfigError("dataloader is empty")
    options = config.eva_config or EvaConfig()
    places = _adapted(model, adapter_name) if wrapped else spots(model, config)
    places = [spot for spot in places if unseen(spot) is None and not spot.site.lookup and spot.site.groups == 1]
    functions = _functions(prepare_layer_inputs_fn, places)
    run_model = forward_fn or forward_fn_dict
    device = _device(model)
    most = options.rho
    if most > 1000:
        most = min(most, max(max(p.shape, default=1) for p in model.parameters()) // config.r)

    def run(batch: Any, see: Callable[[str, Tensor], None], names: set[str]) -> None:
        batch = _moved(batch, device)
        context = copy.deepcopy(batch) if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)

        def seen(spot: Spot, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            function = functions[spot.name]
            found = rows(spot, args, kwargs)
            if function is not None and not spot.site.kernel and spot.kind.name != "attention":
                found = function(args if args else next(iter(kwargs.values())), context, spot.name)
                found = found.reshape(-1, found.shape[-1])
            see(spot.name, _gathered(found) if gather_distributed_inputs else found)

        with inputs_of([spot for spot in places if spot.name in names], seen):
            run_model(model, batch)

    watched = {spot.name: Watched(spot.r, _most(spot, most)) for spot in places}
    if not watched:
        raise UnsupportedError("EVA: none of the adapter's layers has inputs that could be observed")
    prints: dict[str, str] = {}
    with _off(model, wrapped), in_mode(model, False):

        def note(name: str, found: Tensor) -> None:
            prints.setdefault(name, fingerprint(found))

        run(next(iter(dataloader)), note, set(watched))
        missed = sorted(watched.keys() - prints.keys())
        if missed:
            raise UnsupportedError(f"EVA: a forward never reached {', '.join(map(repr, missed[:5]))}")
        group(watched, prints)
        ranks = watch(watched, dataloader, run, options.tau, _shower(show_progress_bar))
    found: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        pca = watched[watched[name].like or name].pca
        assert pca is not None
        directions = pca.components_[:rank].clone()
        if options.whiten:
            directions /= pca.singular_values_[:rank].sqrt().unsqueeze(1)
        found[name] = directions if device is None else directions.to(device)
    return found


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter with ``init_lora_weights="eva"`` its start, and each layer its share of the ranks.

    Layers whose share is nothing are taken out; the adapter's configuration then names the rest, with their ranks.

    Args:
        model: a ``PeftModel``; it may have been made with ``low_cpu_mem_usage=True``.
        dataloader: see :func:`get_eva_state_dict`, as the other arguments are; not needed with ``eva_state_dict``.
        eva_state_dict: what that function returned.

    Raises:
        ConfigError: ``model`` is no ``PeftModel``, the adapter starts in another way, or there is neither data nor a
            dict, or several adapters are active.
    """
    if not hasattr(model, "peft_config"):
        raise ConfigError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ConfigError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter, found "
            f"{', '.join(map(repr, model.active_adapters))}"
        )
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        raise ConfigError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`, found "
            f"{model.peft_config[adapter_name].init_lora_weights!r}"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    place_directions(model, adapter_name, eva_state_dict)


def _adapted(model: Any, adapter: str) -> list[Spot]:
    """Return the layers that have an adapter, by their names in a wrapper."""
    found = []
    for name, layer in model.named_modules():
        for entry in layer.entries.get(adapter, ()) if isinstance(layer, AdaptedLayer) else ():
            if "r" in entry.options and entry.home is None:
                found.append(
                    Spot(
                        name,
                        layer.base_layer,
                        layer.kind,
                        entry.site,
                        entry.options["r"] // entry.site.groups,
                        entry.method,
                    )
                )
    return found


def _most(spot: Spot, rho: float) -> int:
    return min(round(spot.r * rho), spot.site.fan_in)


def _functions(given: Any, places: list[Spot]) -> dict[str, LayerInputs | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys((spot.name for spot in places), given)
    unknown = given.keys() - {spot.name for spot in places}
    if unknown:
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{', '.join(map(repr, sorted(unknown)))}"
        )
    return {spot.name: given.get(spot.name) for spot in places}


def _device(model: nn.Module) -> torch.device | None:
    found = {p.device for p in model.parameters() if p.device.type != "meta"}
    return next(iter(found)) if len(found) == 1 else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return type(batch)({key: _moved(value, device) for key, value in batch.items()})  # type: ignore[call-arg]  # as BatchEncoding
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


def _off(model: Any, wrapped: bool) -> Any:
    return model.disable_adapter() if wrapped else nullcontext()


def _gathered(found: Tensor) -> Tensor:
    """Return the rows of all processes, which may have different numbers of them."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found
    size = torch.tensor([len(found)], device=found.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(one) for one in sizes)
    padded = found.new_zeros(longest, *found.shape[1:])
    padded[: len(found)] = found
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(one)] for part, one in zip(parts, sizes, strict=True)])


def _shower(on: bool) -> Callable[[int, int], None]:
    last = [-1]

    def show(done: int, total: int) -> None:
        if on and done != last[0]:
            print(f"EVA: {done} of {total} layers have converged", file=sys.stderr)
            last[0] = done

    return show
