"""Every error and warning that Inlay raises itself.

::

    InlayError
    ├── ConfigError (ValueError)            a config field has a wrong value
    │   ├── ConfigTypeError (TypeError)     ... or a wrong type
    │   ├── UnknownFieldError (TypeError)   a field that does not exist
    │   └── UnknownMethodError (KeyError)   a peft_type that no available method has
    ├── TargetError (ValueError)            a pattern, module or parameter that is not there
    │   ├── ContainerError (TypeError)      a list of modules, which has no forward pass
    │   └── NoTargetError                   nothing at all was matched
    ├── AdapterNameError (ValueError)       an unsafe, duplicate or unknown adapter name
    │   └── UnknownAdapterError (KeyError)
    ├── UnsupportedError (ValueError)       mathematics or the layer forbids it; one sentence says why
    │   ├── NotAvailableError (NotImplementedError)   a part of PEFT that Inlay does not have yet
    │   ├── ConversionError (TypeError)     an adapter that has no LoRA in its place
    │   └── CombinationError (RuntimeError)           adapters that cannot be combined as asked
    │       └── NoCombinationError (AttributeError)   ... because their method has no combination
    ├── MergeError (ValueError)             a merge that would lose or corrupt something
    │   └── NoBiasError (RuntimeError)      ... a bias, because the layer has no place for one
    ├── RoutingError (ValueError)           adapters chosen per sample that cannot be honoured
    ├── StateError (RuntimeError)           an operation that does not fit the model's present state
    ├── CheckpointError (ValueError)        an adapter folder or file that cannot be used
    │   ├── CheckpointMissingError (FileNotFoundError)
    │   ├── CheckpointKeyError (TypeError)  a configuration without a key that each one has
    │   └── CheckpointMismatchError (RuntimeError)   keys or shapes that do not fit
    ├── MissingExtraError (ImportError)     an optional dependency is not installed
    └── LawError (AssertionError)           a method, kind or storage of one's own breaks a law

    InlayWarning (UserWarning)              something ran, but not quite as one may think
    └── TargetWarning (RuntimeWarning)      a pattern that matches nothing, where that is let pass

Each error also derives from the builtin that PEFT raises in the same place, so that code written
against PEFT catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterNameError",
    "CheckpointError",
    "CheckpointKeyError",
    "CheckpointMismatchError",
    "CheckpointMissingError",
    "CombinationError",
    "ConfigError",
    "ConfigTypeError",
    "ContainerError",
    "ConversionError",
    "InlayError",
    "InlayWarning",
    "LawError",
    "MergeError",
    "MissingExtraError",
    "NoBiasError",
    "NoCombinationError",
    "NoTargetError",
    "NotAvailableError",
    "RoutingError",
    "StateError",
    "TargetError",
    "TargetWarning",
    "UnknownAdapterError",
    "UnknownFieldError",
    "UnknownMethodError",
    "UnsupportedError",
]


class InlayError(Exception):
    """Root of everything that Inlay raises on purpose."""


class ConfigError(InlayError, ValueError):
    """A configuration field has a value that cannot be used; the message names the field."""


class ConfigTypeError(ConfigError, TypeError):
    """A configuration field has a value of the wrong type."""


class UnknownFieldError(ConfigError, TypeError):
    """A keyword or field that the configuration class does not have."""


class UnknownMethodError(ConfigError, KeyError):
    """A ``peft_type`` that no available method has."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class TargetError(InlayError, ValueError):
    """A pattern, module or parameter was asked for and is not in the model."""


class ContainerError(TargetError, TypeError):
    """A list or dict of modules where a module with a forward pass is needed."""


class NoTargetError(TargetError):
    """Nothing in the model matches the configuration."""


class AdapterNameError(InlayError, ValueError):
    """An adapter name that is unsafe or already taken."""


class UnknownAdapterError(AdapterNameError, KeyError):
    """An adapter name that this model does not have."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnsupportedError(InlayError, ValueError):
    """What was asked cannot be done on this layer, storage or method; the message says why."""


class NotAvailableError(UnsupportedError, NotImplementedError):
    """A method or function of PEFT that this version of Inlay does not have."""


class ConversionError(UnsupportedError, TypeError):
    """An adapter whose update no LoRA can hold, on some layer or at all."""


class CombinationError(UnsupportedError, RuntimeError):
    """Adapters that cannot be combined in the way that was asked for; the model is as it was."""


class NoCombinationError(CombinationError, AttributeError):
    """Adapters of a method that has no way of being combined."""


class MergeError(InlayError, ValueError):
    """A merge or unmerge was refused; model weights are as they were before the call."""


class NoBiasError(MergeError, UnsupportedError, RuntimeError):
    """An update with a bias cannot be written into a layer that has none."""


class RoutingError(InlayError, ValueError):
    """Adapters chosen per sample or per call that cannot be honoured."""


class StateError(InlayError, RuntimeError):
    """The operation does not fit the state the model is in."""


class CheckpointError(InlayError, ValueError):
    """An adapter folder or file is damaged, or is not an adapter."""


class CheckpointMissingError(CheckpointError, FileNotFoundError):
    """A file that should be there is not."""


class CheckpointKeyError(CheckpointError, TypeError):
    """A configuration file without a key that each one has."""


class CheckpointMismatchError(CheckpointError, RuntimeError):
    """Keys or shapes of a checkpoint do not fit the model."""


class MissingExtraError(InlayError, ImportError):
    """An optional dependency is needed and not installed; the message says how to get it."""


class LawError(InlayError, AssertionError):
    """A law that every method, kind and storage must obey does not hold."""


class InlayWarning(UserWarning):
    """Something worth knowing happened, and the call went on."""


class TargetWarning(InlayWarning, RuntimeWarning):
    """A pattern that matches nothing, where a policy lets that pass."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return up to ``most`` entries of ``known`` that look like ``name``, the closest first."""
    known = sorted(set(known))
    found = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    if len(found) < most:
        # A dotted path is close to a name when its last part is, so `q_prj` finds `layers.0.q_proj`.
        by_leaf: dict[str, str] = {}
        for path in known:
            by_leaf.setdefault(path.rpartition(".")[2], path)
        for leaf in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=most, cutoff=0.6):
            if by_leaf[leaf] not in found:
                found.append(by_leaf[leaf])
    return found[:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for an error message, or an empty string."""
    found = nearest(name, known)
    return f" Did you mean {' or '.join(repr(candidate) for candidate in found)}?" if found else ""
