"""What PEFT's layers have to give an adapter fresh values: functions that differ in name and in config fields alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from inlay.compat.layers.mixins import refill
from inlay.core.layer import AdaptedLayer

__all__ = ["MEMBERS"]

NEEDED = inspect.Parameter.empty
# Layer -> function -> config fields that it sets, and its arguments beside the adapter's name, which are fields
# as well, with their defaults.
_RESETS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "c3a.layer.C3ALayer": {"reset_c3a_parameters": ({}, {"init_weights": NEEDED})},
    "delora.layer.DeloraLayer": {"reset_delora_parameters": ({}, {"init_weights": True, "delora_lambda": 15.0})},
    "frod.layer.FrodLayer": {"reset_frod_parameters": ({"init_weights": True}, {})},
    "lily.layer.LilyLayer": {"reset_lily_parameters": ({}, {"init_weights": True})},
    "lokr.layer.LoKrLayer": {
        "reset_adapter_parameters": ({"init_weights": True}, {}),
        "reset_adapter_parameters_random": ({"init_weights": False}, {}),
        "reset_adapter_parameters_lycoris_way": ({"init_weights": "lycoris"}, {}),
    },
    "miss.layer.MissLayer": {
        "reset_miss_parameters": ({"init_weights": True}, {"r": NEEDED}),
        "reset_miss_parameters_random": ({"init_weights": False}, {}),
        "reset_bat_parameters": ({"init_weights": "bat"}, {"r": NEEDED}),
        "reset_mini_parameters": ({"init_weights": "mini"}, {"r": NEEDED, "mini_r": NEEDED}),
    },
    "poly.layer.PolyLayer": {"reset_poly_parameters": ({}, {"init_weights": NEEDED})},
    "pvera.layer.PveraLayer": {"reset_pvera_parameters": ({"init_weights": True}, {"d_initial": 0.1})},
    "randlora.layer.RandLoraLayer": {"reset_randlora_parameters": ({"init_weights": True}, {})},
    "shira.layer.ShiraLayer": {"reset_shira_parameters": ({"init_weights": True}, {})},
    "vblora.layer.VBLoRALayer": {"reset_vblora_logits": ({}, {"init_logits_std": NEEDED})},
    "waveft.layer.WaveFTLayer": {"reset_wave_parameters": ({"init_weights": True}, {})},
}


def _reset(name: str, fields: dict[str, Any], arguments: dict[str, Any]) -> Callable[..., None]:
    """Return a function that gives an adapter fresh values, under PEFT's name and with PEFT's arguments."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind), inspect.Parameter("adapter_name", kind)]
    parameters += [inspect.Parameter(one, kind, default=default) for one, default in arguments.items()]
    signature = inspect.Signature(parameters)

    def reset(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        values = dict(bound.arguments)
        layer, adapter = values.pop("self"), values.pop("adapter_name")
        refill(layer, adapter, **fields, **values)
        for entry in layer._each([adapter]) if isinstance(layer, AdaptedLayer) else ():
            if entry.method.needs_base:
                with torch.no_grad():
                    entry.method.prepare(entry.site, layer.params(entry), layer.base_affine())

    reset.__name__ = reset.__qualname__ = name
    reset.__doc__ = "Give an adapter fresh values, as its method draws them."
    reset.__signature__ = signature  # type: ignore[attr-defined]  # functions may have one
    return reset


MEMBERS: dict[str, type[Any]] = {
    f"tuners.{home}": type(
        f"{home.rpartition('.')[2]}Resets",
        (),
        {
            "__doc__": "What gives adapters fresh values.",
            **{name: _reset(name, *said) for name, said in resets.items()},
        },
    )
    for home, resets in _RESETS.items()
}
