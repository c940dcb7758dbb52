"""A method that stands for another one: what it says of itself is what the other says."""

from __future__ import annotations

from collections.abc import Iterable

from inlay.core.method import Method

__all__ = ["Around"]


class Around(Method):
    """Base class of methods that carry out another method elsewhere than it was planned for.

    Args:
        method: the other one.
        further: class attributes that are the other's as well, beside those that every one has.
    """

    def __init__(self, method: Method, further: Iterable[str] = ()) -> None:
        super().__init__(method.config)
        self.method = method
        self.prefix_patterns = method.prefix_patterns
        for name in ("config_class", "prefix", "dropout_field", "mergeable", "mixed", "unread", *further):
            setattr(self, name, getattr(method, name))

    @property
    def identity(self) -> bool:
        return self.method.identity

    @property
    def commutes(self) -> bool:
        return self.method.commutes

    @property
    def skip_probability(self) -> float:
        return self.method.skip_probability
