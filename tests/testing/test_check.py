"""``inlay.testing.check``: it passes what obeys the laws, and names the law that something of one's own breaks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.config import PeftConfig, TargetField, bias_setting, settings
from inlay.core import kind as kinds
from inlay.core import registry, storage
from inlay.core.affine import Affine, Site
from inlay.core.inner import Inner
from inlay.core.method import Method, P
from inlay.core.slot import Constant, Slot
from inlay.errors import ConfigError, ConfigTypeError, InlayWarning, LawError, UnknownMethodError
from inlay.kinds.linear import Linear
from inlay.testing import LAWS, LAYERS, check

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method" / "rowscale.py"
LINEAR = {"Linear": LAYERS["Linear"]}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What tests register is forgotten."""
    methods, own_kinds, storages = dict(registry._methods), list(kinds._kinds), list(storage._storages)
    loaded = set(registry._loaded)
    yield
    registry._methods.clear()
    registry._methods.update(methods)
    kinds._kinds[:] = own_kinds
    kinds._by_class.clear()
    storage._storages[:] = storages
    registry._loaded.clear()
    registry._loaded.update(loaded)


@settings
class ShiftConfig(TargetField, PeftConfig):
    """Configuration of the method of these tests."""

    peft_type = "SHIFT"
    bias: str = bias_setting("shift")


class Shift(Method):
    """Each output row of the weight is scaled by ``1 + s``."""

    config_class = ShiftConfig
    prefix = "shift_"

    def slots(self, site: Site) -> dict[str, Slot]:
        return {"s": site.slot("shift_s.*", "*experts out")}

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        return Affine(layer.weight * (1 + p.s).unsqueeze(-1), layer.bias)


def test_the_example_obeys_the_laws_and_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 60
    spec = importlib.util.spec_from_file_location("rowscale", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rowscale", module)  # pickle looks classes up there
    spec.loader.exec_module(module)
    own = module.RowScale
    layers = {name: LAYERS[name] for name in ("Linear without bias", "Conv2d in groups", "Embedding")}
    done = check(own, layers=layers, needed=layers, laws=[law for law in LAWS if law != "compiled_equals_eager"])
    assert list(done.held) == list(layers)
    assert min(done.held.values()) > len(LAWS)  # most run in two dtypes
    assert "laws hold" in str(done)


def test_what_is_refused_is_told() -> None:
    class Particular(Shift):
        def refuse(self, site: Site) -> str | None:
            return "it has a kernel" if site.kernel else None

    inlay.register(Particular)
    layers = {name: LAYERS[name] for name in ("Linear", "Conv1d")}
    done = check(Particular, layers=layers, laws=["fresh_adapter_changes_nothing"])
    assert done.held == {"Linear": 2}
    assert "it has a kernel" in done.refused["Conv1d"]
    assert "it has a kernel" in str(done)
    with pytest.raises(LawError, match=r"Particular is refused on Conv1d: .*it has a kernel"):
        check(Particular, layers=layers, needed=["Conv1d"], laws=[])


class OtherForward(Shift):
    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        return inner(x) * (1 + p.s) * 1.01


class Changing(Shift):
    def slots(self, site: Site) -> dict[str, Slot]:
        return {"s": site.slot("shift_s.*", "*experts out", Constant(0.5))}


class Forgetful(Shift):
    def slots(self, site: Site) -> dict[str, Slot]:
        return {"s": site.slot("shift_s.*", "*experts out", options={"saved": False})}


class Detached(Shift):
    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        return inner.run(x, super().rewrite(site, _half(p), inner.affine(), inner.base_affine()))


def _half(p: P) -> P:
    half = P()
    half.s = (p.s + p.s.detach()) / 2
    return half


class InPlace(Shift):
    """The untouched weight does not stay untouched."""

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        with torch.no_grad():
            base.weight.mul_(1.01)
        return super().rewrite(site, p, layer, base)


class Mixing(Shift):
    """Samples of a batch see each other."""

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        return inner(x) + p.s * x.mean()


class Erratic(Shift):
    """The initial values come from elsewhere than the seed."""

    def slots(self, site: Site) -> dict[str, Slot]:
        return {"s": site.slot("shift_s.*", "*experts out", _anything)}


def _anything(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(1.0, 2.0)


class Leaky(Shift):
    """Something of the adapter is left when it is switched off."""

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        with torch.no_grad():
            inner.layer.base_layer.bias.add_(0.01)
        return inner(x)


class Unpicklable(Shift):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.function = lambda: None


BROKEN = [
    (OtherForward, "forward_is_the_layer_with_rewritten_weights"),
    (OtherForward, "two_methods_on_one_layer"),
    (OtherForward, "merge_then_unmerge_is_the_original"),
    (Changing, "fresh_adapter_changes_nothing"),
    (Erratic, "same_seed_gives_the_same_adapter"),
    (Leaky, "switched_off_it_is_the_base"),
    (Leaky, "eject_gives_back_the_model"),
    (InPlace, "merged_and_switched_off_is_the_base"),
    (Forgetful, "state_dict_into_an_adapter_of_another_name"),
    (Forgetful, "saved_is_all_that_trains"),
    (Leaky, "copy_is_equal_and_independent"),
    (Unpicklable, "pickled_is_equal_and_independent"),
    (Detached, "gradients_are_those_through_the_rewritten_weight"),
    (Detached, "numeric_gradient"),
    (Mixing, "each_sample_as_if_alone"),
    (Leaky, "checkpointed_equals_plain"),
    (Leaky, "compiled_equals_eager"),
]


@pytest.mark.parametrize(("method", "law"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_law_is_named(method: type[Method], law: str) -> None:
    inlay.register(method)
    with pytest.raises(LawError, match=rf"{method.__name__} on Linear in torch\.\w+: {law}: \S"):
        check(method, layers=LINEAR, laws=[law])


def test_each_law_is_broken_by_something() -> None:
    assert {law for _, law in BROKEN} == set(LAWS)


def test_an_unknown_law_or_layer() -> None:
    with pytest.raises(ConfigError, match=r"'numeric_gradients'.*'numeric_gradient'"):
        check(Shift, laws=["numeric_gradients"])
    with pytest.raises(ConfigError, match="'Conv9d'"):
        check(Shift, needed=["Conv9d"])


# -- entering --------------------------------------------------------------------------------------------------------


def test_only_methods_kinds_and_storages_are_entered() -> None:
    with pytest.raises(ConfigTypeError, match="expected a subclass of Method, Kind or Storage"):
        inlay.register(nn.Linear)

    class Nameless(Method):
        pass

    with pytest.raises(ConfigTypeError, match=r"Nameless\.config_class"):
        inlay.register(Nameless)
    inlay.register(Shift)
    inlay.register(Shift)
    with pytest.raises(ConfigError, match=r"'SHIFT' is already registered by .*Shift"):
        inlay.register(Changing)


class Twice(nn.Module):
    """A layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class TwiceKind(Linear):
    name = "twice"

    def claims(self, module: Any) -> bool:
        return isinstance(module, Twice)

    def site(self, name: str, module: Any) -> Site:
        return Site(name, self.name, 3, 5)


class Halves(storage.Storage):
    """Weights that are held as whole numbers, half a unit each."""

    name = "halves"

    def claims(self, module: nn.Module) -> bool:
        return getattr(module, "halves", False)

    def read(self, module: nn.Module, name: str) -> Tensor:
        tensor: Tensor = getattr(module, name)
        return tensor / 2 if not tensor.is_floating_point() else tensor


class EntryPoint:
    """What ``importlib.metadata`` gives for an entry."""

    def __init__(self, name: str, thing: Any) -> None:
        self.name, self.value, self.thing = name, f"own:{name}", thing

    def load(self) -> Any:
        if isinstance(self.thing, Exception):
            raise self.thing
        return self.thing


def installed(monkeypatch: pytest.MonkeyPatch, *things: Any) -> None:
    entries = [EntryPoint(f"E{index}", thing) for index, thing in enumerate(things)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == "inlay.methods" else [])


def test_an_installed_method_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Shift)
    config = inlay.PeftConfig.from_peft_type(peft_type="SHIFT", target_modules=["0"])
    assert isinstance(config, ShiftConfig)
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(3, 2)), config)
    assert any("shift_s" in name for name, _ in model.named_parameters())


def test_an_installed_kind_is_asked_about_an_unknown_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, TwiceKind)
    model = inlay.inject_adapter_in_model(
        inlay.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), nn.Sequential(Twice())
    )
    x = torch.randn(2, 5)
    layer = model[0]
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    assert torch.allclose(model(x), x @ (layer.base_layer.weight + update).T, atol=1e-6)


def test_an_installed_storage_is_asked_about_an_unknown_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 2, bias=False)
    del layer.weight
    layer.register_buffer("weight", torch.tensor([[1, 2, 3], [4, 5, 6]]))
    layer.halves = True  # type: ignore[assignment]
    installed(monkeypatch)
    with pytest.raises(inlay.InlayError, match="no installed storage reads"):
        storage.read(layer, "weight")
    installed(monkeypatch, Halves)
    assert torch.equal(storage.read(layer, "weight"), torch.tensor([[0.5, 1.0, 1.5], [2.0, 2.5, 3.0]]))


def test_a_package_that_cannot_be_loaded_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ImportError("no module named nothing"), Shift)
    with pytest.warns(InlayWarning, match=r"E0 = 'own:E0'.*no module named nothing"):
        assert registry.config_class("SHIFT") is ShiftConfig
    with pytest.raises(UnknownMethodError, match=r"'SHIFTS'.*'SHIFT'"):
        registry.config_class("SHIFTS")
