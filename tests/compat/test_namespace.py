"""The table of names is what the installed peft has, and every name resolves or says why it does not."""

from __future__ import annotations

import importlib
import json
from importlib.resources import files

import peft
import pytest

from inlay.compat import namespace
from inlay.config import COMPATIBLE_PEFT_VERSION
from inlay.errors import NotAvailableError, UnsupportedError
from tests.compat.record_names import record


def test_the_table_is_that_of_the_installed_peft():
    assert peft.__version__ == COMPATIBLE_PEFT_VERSION
    assert json.loads(files("inlay.compat").joinpath("names.json").read_text()) == record()


@pytest.mark.parametrize("module", sorted(namespace.table()))
def test_every_module_can_be_imported(module):
    own = importlib.import_module(f"{namespace.ROOT}.{module}".rstrip("."))
    assert set(own.__all__) == {name for name in namespace.table()[module] if not name.startswith("_")}
    assert set(own.__all__) <= set(dir(own))


def test_every_public_name_of_the_root_is_there():
    import inlay.compat.peft as own

    missing = [name for name in peft.__all__ if not hasattr(own, name)]
    assert not missing


def test_names_lead_to_one_object():
    """A name that peft imports into many modules is one object everywhere."""
    import inlay
    from inlay.compat.peft.tuners import LoraConfig, lora
    from inlay.compat.peft.tuners.lora import config

    assert LoraConfig is lora.LoraConfig is config.LoraConfig is inlay.LoraConfig


def test_what_both_have_is_one_class():
    import inlay
    import inlay.compat.peft as own

    both = [name for name in inlay.__all__ if name in peft.__all__ and isinstance(getattr(inlay, name), type)]
    assert len(both) > 20
    assert all(getattr(own, name) is getattr(inlay, name) for name in both)


def test_constants_are_equal():
    differing = []
    for module, names in namespace.table().items():
        for name, (home, original, kind) in names.items():
            if home != module or kind != "v" or name.startswith("_") or not name.isupper():
                continue
            try:
                own = namespace.value_of(home, original, kind)
                theirs = getattr(importlib.import_module(f"peft.{module}"), name)
            except (AttributeError, ImportError):
                continue
            if isinstance(theirs, (str, int, tuple, list, set, dict)) and name.startswith("PEFT_TYPE") is False:
                differing += [name] if own != theirs and not _values_equal(own, theirs) else []
    assert not differing


def _values_equal(own: object, theirs: object) -> bool:
    """Compare mappings from tasks to classes by the classes' names."""
    shown = [{str(key): getattr(value, "__name__", value) for key, value in dict(x).items()} for x in (own, theirs)]
    return isinstance(theirs, dict) and shown[0] == shown[1]


def test_prefixes_are_equal():
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as theirs

    from inlay.compat.peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as own

    assert {key.value: own[key] for key in own} == {key.value: value for key, value in theirs.items()}


def test_what_is_not_built_can_be_imported_and_is_loud():
    from inlay.compat.peft import PrefixTuningConfig, XLoraConfig, create_arrow_model

    with pytest.raises(NotAvailableError, match=r"XLoraConfig is not available"):
        XLoraConfig(hidden_size=4)
    with pytest.raises(UnsupportedError, match="create_arrow_model"):
        create_arrow_model()
    assert not isinstance(object(), PrefixTuningConfig)
    with pytest.raises(AttributeError, match="not available"):
        _ = XLoraConfig.anything


def test_a_wrong_name_suggests_the_right_one():
    import inlay.compat.peft as own

    with pytest.raises(AttributeError, match="Did you mean 'LoraConfig'"):
        _ = own.LoraConfg
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{namespace.ROOT}.tuners.nothing")
