"""A policy decides what is strict and what follows PEFT. It is set by the entry function and lives on the State."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INLAY", "PEFT", "Policy", "default_policy", "set_default_policy"]


@dataclass(frozen=True)
class Policy:
    """How one model treats what PEFT leaves open or gets wrong.

    Attributes:
        name: ``inlay`` or ``peft``.
        strict_targets: a pattern that matches nothing is an error; otherwise only "nothing matched at all" is.
        strict_load: missing or unexpected checkpoint keys are an error; otherwise missing keys warn.
        unfreeze_on_activation: activating an adapter makes it trainable.
        keep_frozen: an adapter loaded for inference stays frozen when it is activated.
        any_methods: adapters of different methods may share one plain ``PeftModel``.
        eval_on_load: loading an adapter for inference puts the model in eval mode.
        compute: ``base`` runs adapter products in the input's dtype, ``adapter`` in the adapter's dtype.
        own_seed: initial values come from seed, site and slot; otherwise from torch's global random stream.
        peft_layers: layers that PEFT treats in a way of its own behave as there (the doubled update of an attention's
            output projection, dropout that is ignored in weight space, one full copy of a module at a time).
        starts_over: a model that is wrapped already may be wrapped again, and an adapter's name taken again: the older
            one is replaced, with a warning.
        own_dropout: an adapter's dropout may draw its mask in a cheaper way than ``torch.nn.functional.dropout``, one
            for all layers that read the same input, and DoRA's acts on the low-rank update alone.
        share_inputs: layers that read the same tensor go down to their ranks in one product, which changes the last
            bits of what they give, from the second forward on. None: on accelerators only, where launches cost more
            than the products; on a CPU three narrow products cost what one does.
        adds_every_term: a wrapped model's loss has every term of its methods, also those that PEFT leaves to the
            training loop (``Method.adds_penalty``).
        prefix_patterns: a pattern key may be a whole dotted prefix of a path.
        lenient_combining: combining adapters into a name that exists changes nothing, and one adapter alone is only
            scaled, whatever rank is asked for.
    """

    name: str
    strict_targets: bool
    strict_load: bool
    unfreeze_on_activation: bool
    keep_frozen: bool
    any_methods: bool
    eval_on_load: bool
    compute: str
    own_seed: bool
    peft_layers: bool
    starts_over: bool
    own_dropout: bool
    share_inputs: bool | None
    adds_every_term: bool
    prefix_patterns: bool
    lenient_combining: bool


INLAY = Policy(
    name="inlay",
    strict_targets=True,
    strict_load=True,
    unfreeze_on_activation=True,
    keep_frozen=True,
    any_methods=True,
    eval_on_load=True,
    compute="base",
    own_seed=True,
    peft_layers=False,
    starts_over=False,
    own_dropout=True,
    share_inputs=None,
    adds_every_term=True,
    prefix_patterns=True,
    lenient_combining=False,
)
PEFT = Policy(
    name="peft",
    strict_targets=False,
    strict_load=False,
    unfreeze_on_activation=True,
    keep_frozen=False,
    any_methods=False,
    eval_on_load=True,
    compute="adapter",
    own_seed=False,
    peft_layers=True,
    starts_over=True,
    own_dropout=False,
    share_inputs=None,
    adds_every_term=False,
    prefix_patterns=False,
    lenient_combining=True,
)

_default = INLAY


def default_policy() -> Policy:
    """Return the policy of what is created by a class that both namespaces share, such as ``PeftModel(model, config)``.

    The functions of a namespace (``inlay.get_peft_model``) name theirs.
    """
    return _default


def set_default_policy(policy: Policy) -> None:
    """Set :func:`default_policy` for this process."""
    global _default
    _default = policy
