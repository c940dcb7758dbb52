from __future__ import annotations

import pytest
from config_classes import HadamardConfig, TokensConfig

from inlay.core import registry


@pytest.fixture(autouse=True)
def known_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registry answer with the two classes above, whichever methods are installed."""
    for config in (HadamardConfig, TokensConfig):
        fake = type("Method", (), {"config_class": config})
        monkeypatch.setitem(registry._methods, config.peft_type.value, fake)
