"""The contract of a method: its tensors, and one map from a layer to a layer.

An additive method gives ``slots`` and ``delta``. Any other gives ``slots`` and ``rewrite``, and ``forward`` where
activation space is cheaper. A method names no layer class, no storage, no adapter and no device.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from inlay.config.defaults import default_targets
from inlay.core.affine import Affine, Delta, Site
from inlay.core.hooks import Hooks
from inlay.core.patterns import pattern_key, pattern_value
from inlay.core.slot import Init, Slot, zeros
from inlay.errors import TargetError, UnsupportedError

if TYPE_CHECKING:
    from inlay.core.inner import Inner
else:
    Inner = Any  # named in annotations alone; to import it takes as long as all of this

__all__ = ["Inner", "Method", "P"]

# What a pattern field is called that says another number for some modules, where that is not ``<field>_pattern``.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


class P:
    """What one adapter has at one site: its tensors by role and its numbers, as attributes.

    ``p.A``, ``p.B`` (tensors), ``p.scaling`` (a number), ``p.drop(x)`` (the adapter's dropout, the identity in eval
    mode and on indices), ``p.training``; while ``prepare`` runs ``p.measured``, see :attr:`Method.measured`.
    """

    scaling: float = 1.0
    training: bool = False
    measured: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, dropout: Any = None) -> None:
        self._dropout = dropout

    if TYPE_CHECKING:

        def __getattr__(self, role: str) -> Any: ...

    def get(self, role: str) -> Tensor | None:
        """Return a tensor that this site may lack."""
        return getattr(self, role, None)

    def having(self, **tensors: Tensor) -> P:
        """Return the same with other tensors for some roles."""
        other = P(self._dropout)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(tensors)
        return other

    def drop(self, x: Tensor) -> Tensor:
        """Apply the adapter's dropout to features."""
        if self._dropout is None or not x.is_floating_point():
            return x
        return self._dropout(x)


@cache
def _patterned(cls: type[Method]) -> tuple[str, ...] | None:
    """Return ``patterned`` of a class, None where a subclass answers otherwise than the class that declared it."""
    answers = {"alike", "numbers", "options", "patterned", "note", "refuse", "slots"}
    first = next(one for one in cls.__mro__ if not answers.isdisjoint(one.__dict__))
    return first.__dict__.get("patterned")


class Method(Hooks):
    """Base class of every method; see the module's docstring for what a subclass gives.

    Class attributes:
        config_class: the method's config dataclass.
        prefix: what its slot names start with (``lora_``).
        dropout_field: the config field that holds the dropout probability on the layer's input, if there is one.
        mergeable: False where the update depends on the data.
        samples: ``forward`` draws noise in training, which no weight can stand for; a merge writes its mean.
        own_backward: in training the gradients are others than those of the rewritten weight.
        adds_penalty: whether PEFT adds what ``penalty`` gives to a model's loss, and not the user.
        couples: what a sample gets depends on the other samples of its batch.
        reads_tasks: ``forward`` chooses by the task of each sample.
        mixed: whether PEFT lets the method take part in a mixed model.
        ties: layers that share the weight of an adapted embedding are adapted with it, without being asked.
        detaches: something is held constant in backward on purpose, so that finite differences see another slope.
        scales_rows: ``forward`` is nothing but ``inner.plus`` with a gain (DoRA), which has a fast path over the base.
        unread: options that the mathematics does not read; compiled code must not depend on their values.
        shown: config fields that can be read on a layer by adapter name (``layer.use_dora["default"]``).
        numbers: config fields that are the ``options`` of a layer, where a pattern field may say otherwise of one.
        patterned: the pattern fields of the config, where they are all that tells sites of one form apart: ``slots``,
            ``options``, ``refuse`` and ``note`` are then asked once for all alike. None: they are asked for every site.
    """

    config_class: ClassVar[type[Any]]
    prefix: ClassVar[str]
    dropout_field: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = True
    samples: ClassVar[bool] = False
    own_backward: ClassVar[bool] = False
    adds_penalty: ClassVar[bool] = True
    couples: ClassVar[bool] = False
    reads_tasks: ClassVar[bool] = False
    mixed: ClassVar[bool] = False
    ties: ClassVar[bool] = False
    detaches: ClassVar[bool] = False
    scales_rows: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ()
    patterned: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.prefix_patterns = True  # set from the policy when a plan is made

    def by_pattern(self, field: str, site: Site, default: Any) -> Any:
        """Return the value that a pattern field of the config (``rank_pattern``) gives for a site."""
        return pattern_value(getattr(self.config, field), site.patterns or site.name, default, self.prefix_patterns)

    def number(self, field: str, site: Site) -> Any:
        """Return a number of the config, or the one that its pattern field gives instead for a site."""
        value, pattern = getattr(self.config, field), _PATTERNS.get(field, f"{field}_pattern")
        return self.by_pattern(pattern, site, value) if getattr(self.config, pattern, None) else value

    def means(self, field: str, key: str, site: Site) -> bool:
        """Whether a key of a pattern field of the config means a site."""
        return pattern_key([key], site.name, self.prefix_patterns) is not None

    def alike(self, site: Site) -> Hashable:
        """Return a key that two sites have in common if this method treats them alike, their names aside."""
        fields = _patterned(type(self))  # type: ignore[arg-type]  # mypy takes a class for unhashable
        if fields is None:
            return site
        values = (self.by_pattern(field, site, None) for field in fields if getattr(self.config, field))
        return site.form, *values

    # -- what a method must give --------------------------------------------------------------------------------

    def slots(self, site: Site) -> dict[str, Slot]:
        """Return the tensors at a site, by role."""
        raise NotImplementedError

    def delta(self, site: Site, p: P) -> Delta:
        """Return the update before ``p.scaling``, as an operator of its own for each call."""
        raise NotImplementedError(f"{type(self).__name__} has no delta")

    # -- what follows from it, unless the method says otherwise ----------------------------------------------------

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter leaves the output as it is."""
        return bool(getattr(self.config, "init_weights", True))

    def still_or(self, noise: Init) -> Init:
        """Return zeros where a fresh adapter leaves the output as it is, and ``noise`` where it does not."""
        return zeros if self.identity else noise

    @property
    def additive(self) -> bool:
        """Whether the method only adds an update that does not depend on the layer's weight."""
        return type(self).rewrite is Method.rewrite

    @property
    def commutes(self) -> bool:
        """Whether the method only adds something that does not depend on what is below it on the layer."""
        return self.additive

    def update(self, site: Site, p: P) -> Delta:
        """Return the update with ``p.scaling`` applied."""
        return self.delta(site, p).scaled(p.scaling)

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        """Return what is added to the weight, in its stored shape, or the matrix that the weight is multiplied with.

        Raises:
            UnsupportedError: there is no such matrix.
        """
        if type(self).delta is Method.delta:
            raise UnsupportedError(f"{type(self).__name__} has no matrix that it adds to the weight of {site.name!r}")
        return site.to_stored(self.update(site, p).dense())

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        """Weight space: return the adapted map. ``layer`` is what is below, ``base`` the untouched layer."""
        return layer.add(self.update(site, p))

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        """Activation space: return the adapted output; must equal the layer run with ``rewrite``'s result."""
        if self.additive:
            return inner.plus(x, p, self.update(site, p))
        return inner.run(x, self.rewrite(site, p, inner.affine(), inner.base_affine()))

    @classmethod
    def variant(cls, config: Any) -> type[Method]:
        """Return the class that carries out ``config``: this one, or a variant of it."""
        return cls

    # -- optional ----------------------------------------------------------------------------------------------------

    def options(self, site: Site) -> dict[str, Any]:
        """Return the numbers of a site (``r``, ``scaling``, ...) that users may read and change on the layer."""
        return {field: self.number(field, site) for field in self.numbers}

    def refuse(self, site: Site) -> str | None:
        """Return one sentence that says why mathematics forbids this method at the site, or None."""
        return None

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        """Return the tensors that sites share; they live at the model's root, once per adapter.

        Asked once, when all sites are known and before any tensor is made: a method whose initial values at one site
        depend on the others remembers here what it needs of them.
        """
        return {}

    def shared_at(self, site: Site, shared: dict[str, Slot]) -> dict[str, Slot]:
        """Return which of the shared tensors one site uses, by the roles that they have there; by default all."""
        return shared

    def note(self, site: Site) -> str | None:
        """Return one sentence on what is done otherwise than the config says at a site, or None; it warns."""
        return None

    def conflict(self, site: Site, below: Method) -> str | None:
        """Return one sentence that says why this cannot be active above another method on a layer, or None."""
        return None

    def implied(self, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        """Return the config fields that were left to the model, with the values that the model gives them.

        Raises:
            TargetError: the model gives none.
        """
        from inlay.core.banks import layout_of

        config = self.config
        if config.target_modules is not None:
            return {}
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        targets = default_targets(kind, model_type) if model_type else None
        parameters = getattr(config, "target_parameters", None)
        if targets is not None and parameters and layout_of(model).banks:
            return {}  # as in PEFT, where a model's experts are stacked, naming parameters replaces the defaults
        if targets is None:
            if parameters or getattr(config, "trainable_token_indices", None):
                return {}  # these say enough
            family = f"the model family {model_type!r} has no default" if model_type else "the model names no family"
            raise TargetError(
                f"target_modules is not set and {family} (config.model_type); set target_modules, for instance to "
                "'all-linear'"
            )
        return {"target_modules": targets if isinstance(targets, str) else set(targets)}

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        """Set initial values that depend on the base weight; may return a new base."""
        return None

    @property
    def skip_probability(self) -> float:
        """Chance that a training forward leaves the adapter out of a layer altogether."""
        return float(getattr(self.config, "module_dropout", 0.0) or 0.0)

    @property
    def dropout(self) -> float:
        """Chance that an element of a layer's input is dropped in training."""
        return 0.0 if self.dropout_field is None else float(getattr(self.config, self.dropout_field) or 0.0)

    @property
    def needs_base(self) -> bool:
        """Whether ``prepare`` is to be called."""
        return type(self).prepare is not Method.prepare

    @property
    def rebases(self) -> bool:
        """Whether ``prepare`` returns a new base; it is then called also where the adapter's values are loaded."""
        return False

    @property
    def base_cause(self) -> str:
        """What in the config makes ``prepare`` return a new base, in the words of a message."""
        return f"the start {getattr(self.config, 'init_lora_weights', None)!r}"

    @property
    def measured(self) -> tuple[str, ...]:
        """Attributes of base modules where a calibration pass leaves what ``prepare`` needs, and which it uses up."""
        return ()

    def bias_mode(self) -> str:
        """Return ``none``, ``all`` or ``<method>_only``: which base biases train."""
        return getattr(self.config, "bias", "none") or "none"
