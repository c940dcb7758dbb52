"""Run the laws on a method that someone else wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inlay.config.types import method_name
from inlay.core.merge import merge
from inlay.core.method import Method
from inlay.core.plan import plan
from inlay.errors import ConfigError, InlayError, LawError, MergeError, UnsupportedError, did_you_mean
from inlay.methods.ia3 import IA3Config
from inlay.methods.ln_tuning import LNTuningConfig
from inlay.methods.lora import LoraConfig
from inlay.testing.laws import LAWS
from inlay.testing.layers import LAYERS, LayerCase, Pair
from inlay.testing.subject import Subject

__all__ = ["Checked", "check"]

# Laws of gradients are for float64, where a difference is a mistake and no rounding; the others for what is used.
EXACT = {"gradients_are_those_through_the_rewritten_weight", "numeric_gradient"}
DTYPES = (torch.float32, torch.bfloat16)
# A second adapter of the same layers is of the first of these that is another method, and goes there and back.
COMPANIONS: dict[str, Callable[..., Any]] = {
    "LORA": lambda **target: LoraConfig(r=4, lora_alpha=6, **target),
    "IA3": lambda **target: IA3Config(feedforward_modules=[], **target),
    "LN_TUNING": lambda **target: LNTuningConfig(**target),
}


@dataclass(frozen=True)
class MethodTrial:
    """A method on one layer, in one dtype; what the laws ask for."""

    method: type[Method]
    make: Callable[..., Any]
    case: LayerCase
    dtype: torch.dtype

    def config(self, method: str | None = None, layers: tuple[str, ...] = ("first", "last")) -> Any:
        return COMPANIONS.get(method or "", self.make)(**self.case.target(layers))

    @cached_property
    def companion(self) -> str:
        own = method_name(self.method.config_class.peft_type)
        for name, make in COMPANIONS.items():
            trial = MethodTrial(self.method, make, self.case, self.dtype)
            if name != own and refusal(trial) is None and trial.unmergeable is None:
                return name
        return own

    def model(self) -> Pair:
        model = self.case.model(self.dtype)
        return model.eval() if self.method.samples else model  # noise obeys no law; in eval mode there is none

    def batch(self) -> Tensor:
        return self.case.batch(self.dtype)

    @property
    def axis(self) -> int:
        return self.case.axis

    @property
    def padding(self) -> int | None:
        return self.case.padding

    @property
    def fresh_changes(self) -> bool:
        return not self.method(self.config()).identity

    @property
    def renormalises(self) -> bool:
        return any(getattr(module, "max_norm", None) is not None for module in self.model().modules())

    @property
    def numeric(self) -> bool:
        return not self.method.detaches

    @cached_property
    def unmergeable(self) -> str | None:
        subject = Subject(self)
        try:
            merge(subject.state)
        except (MergeError, UnsupportedError) as error:
            return str(error)
        return None


def refusal(trial: MethodTrial) -> str | None:
    """Return the sentence with which planning refuses a method on a layer, or None."""
    try:
        plan(trial.model(), trial.config())
    except InlayError as error:
        return str(error)
    return None


@dataclass
class Checked:
    """What :func:`check` found: for each layer how many laws were run, or why the method does not go there.

    Attributes:
        held: layer -> how many laws were run, dtypes counted apart.
        refused: layer -> the method's sentence.
        unmergeable: layer -> why a merge is refused.
    """

    held: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, [*self.held, *self.refused]), default=0)
        lines = [
            f"{name:{width}}  {count} laws hold"
            + (f"; not merged: {self.unmergeable[name]}" if name in self.unmergeable else "")
            for name, count in self.held.items()
        ]
        return "\n".join([*lines, *(f"{name:{width}}  refused: {why}" for name, why in self.refused.items())])


def check(
    method: type[Method],
    make_config: Callable[..., Any] | None = None,
    *,
    layers: Mapping[str, LayerCase] | None = None,
    laws: Iterable[str] | None = None,
    needed: Iterable[str] = ("Linear",),
) -> Checked:
    """Run the laws that every method of Inlay obeys on a method of one's own.

    ::

        from inlay.testing import check
        print(check(MyMethod, lambda **target: MyConfig(r=4, **target)))

    Args:
        method: a subclass of :class:`inlay.core.method.Method`, registered.
        make_config: makes its config, given the fields that choose layers (``target_modules=[...]``); by default the
            method's config class with its own defaults. The layers have 2 to 12 features, so ranks must be small.
        layers: what to try it on, by name; by default :data:`inlay.testing.LAYERS`.
        laws: names of laws to run, by default all of :data:`inlay.testing.LAWS`.
        needed: layers that may not be refused.

    Returns:
        On which layers the laws hold, and on which the method is refused with which sentence.

    Raises:
        LawError: a law does not hold; the message names the layer, the dtype, the law and the difference.
        ConfigError: a law or layer that does not exist, or a config that is not the method's.
    """
    layers = LAYERS if layers is None else layers
    chosen = dict(LAWS)
    if laws is not None:
        for name in (laws := list(laws)):
            if name not in LAWS:
                raise ConfigError(f"no law is called {name!r}.{did_you_mean(name, list(LAWS))}")
        chosen = {name: LAWS[name] for name in laws}
    missing = [name for name in needed if name not in layers]
    if missing:
        raise ConfigError(f"needed: {missing} is not among the layers {list(layers)}")
    done = Checked()
    for name, case in layers.items():
        trial = MethodTrial(method, make_config or method.config_class, case, DTYPES[0])
        config = trial.config()
        if not isinstance(config, method.config_class):
            raise ConfigError(
                f"{method.__name__} wants a {method.config_class.__name__}, found {type(config).__name__}"
            )
        why = refusal(trial)
        if why is not None:
            if name in needed:
                raise LawError(f"{method.__name__} is refused on {name}: {why}")
            done.refused[name] = why
            continue
        done.held[name] = 0
        if trial.unmergeable is not None:
            done.unmergeable[name] = trial.unmergeable
        for law, function in chosen.items():
            for dtype in (torch.float64,) if law in EXACT else DTYPES:
                try:
                    function(MethodTrial(method, trial.make, case, dtype))
                except Exception as error:
                    raise LawError(f"{method.__name__} on {name} in {dtype}: {law}: {error}") from error
                done.held[name] += 1
    return done
