"""Files of tensors, written and read without their library: byte for byte its own files, and no other values."""

from __future__ import annotations

import json

import pytest
import torch
from call_counts import calls
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.checkpoint.mapped import MappedTensors, mapped_tensors
from inlay.checkpoint.stored import storable, store
from inlay.core.collect import uncollected

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]
DTYPES += [torch.int32, torch.float32, torch.float64, torch.int64]


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        for name, shape in ((f"z{i}", (3, 2)), (f'a "{i}" é', (i,)), (f"s{i}", ()), (f"e{i}", (0, 4))):
            tensors[name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return tensors


def test_files_are_those_of_the_library(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    store(tensors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found, right = mapped_tensors(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert found is not None
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name])


def test_views_and_aliases_are_written_in_full(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"row": whole[1], "column": whole[:, 2], "turned": whole.mT, "whole": whole, "again": whole}
    assert storable(tensors)
    store({**tensors, "parameter": nn.Parameter(whole[1:3])}, tmp_path / "file")
    found = load_file(tmp_path / "file")
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
    assert torch.equal(found["parameter"], whole[1:3])


@pytest.mark.parametrize(
    "value", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()]
)
def test_the_unusual_is_left_to_the_library(value):
    assert not storable({"usual": torch.zeros(1), "value": value})


def test_reading_is_private_and_can_be_done_again(tmp_path):
    store({"x": torch.ones(5000)}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    first, second = mapped_tensors(tmp_path / "file"), mapped_tensors(tmp_path / "file")
    assert isinstance(first, MappedTensors)
    assert first.nbytes == 20_000
    first["x"].zero_()
    assert torch.equal(second["x"], torch.ones(5000))
    assert (tmp_path / "file").read_bytes() == before
    second.release()
    assert torch.equal(second["x"], torch.ones(5000))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["x"].update(data_offsets=[0, 12]),
        lambda header: header["x"].update(data_offsets=[8, 24]),
        lambda header: header["x"].update(shape=[-4]),
        lambda header: header["x"].update(shape=[4.0]),
        lambda header: header["x"].update(dtype="F99"),
        lambda header: header["x"].pop("shape"),
        lambda header: header.update(y=header["x"]),
        lambda header: header.update(x=3),
    ],
    ids=range(8),
)
def test_a_header_that_is_not_plainly_right_is_left_to_the_library(tmp_path, change):
    store({"x": torch.ones(4)}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert mapped_tensors(tmp_path / "file") is None
    with pytest.raises(inlay.InlayError, match="file"):
        inlay.checkpoint.files.read_tensors(_named(tmp_path / "file"))


def _named(path):
    """Give a file the name by which it is read as this format."""
    return path.rename(path.with_suffix(".safetensors"))


# -- loading counts --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def model():
    torch.manual_seed(0)
    return Net()


CONFIG = {"r": 4, "target_modules": r"layers\.\d+", "init_lora_weights": False}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    inlay.get_peft_model(model(), inlay.LoraConfig(**CONFIG)).save_pretrained(tmp_path)
    return tmp_path


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators make, views of others left out, and the copies."""

    def __init__(self):
        super().__init__()
        self.nbytes, self.copies = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "copy" in function._schema.name:
            self.copies.append((function._schema.name, len(args[0])))
        elif isinstance(result, torch.Tensor) and function._schema.name in _MAKING:
            self.nbytes += result.nbytes
        return result


_MAKING = {"aten::empty", "aten::empty_like", "aten::zeros", "aten::clone", "aten::_to_copy", "aten::new_zeros"}
_MAKING |= {"aten::empty.memory_format"}


def test_each_tensor_is_made_once_and_copied_once(folder):
    wrapper = inlay.PeftModel.from_pretrained(model(), folder)
    size = sum(p.nbytes for n, p in wrapper.named_parameters() if "lora_" in n)
    with Allocations() as first:
        wrapper.load_adapter(folder, "second")
    assert first.copies == [("aten::_foreach_copy_", 12)]
    assert first.nbytes == size
    with Allocations() as again:  # into what is there
        wrapper.load_adapter(folder, "second")
    assert again.copies == [("aten::_foreach_copy_", 12)]
    assert again.nbytes == 0


def test_other_precisions_are_rounded_on_the_way(folder):
    for base, autocast in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float64, True)):
        wrapper = inlay.PeftModel.from_pretrained(model().to(base), folder, autocast_adapter_dtype=autocast)
        file = inlay.load_peft_weights(folder)
        for key, value in inlay.get_peft_model_state_dict(wrapper).items():
            assert torch.equal(value, file[key].to(value.dtype))


def test_the_fortieth_load_makes_as_many_calls_as_the_fourth(folder):
    wrapper = inlay.PeftModel.from_pretrained(model(), folder)
    found = []
    for i in range(40):
        found.append(calls(lambda name=f"a{i}": wrapper.load_adapter(folder, name)).total())
    # Names of adapters are gathered for a few messages and books: one call or two for each of them, not for each layer.
    assert found[39] - found[3] <= 3 * 36
    assert found[39] < 1.1 * found[3]


def test_modes_are_right_after_a_load(folder):
    """Eval mode everywhere, also where an earlier adapter trained; PEFT's rule. Trainable ones leave modes alone."""
    wrapper = inlay.PeftModel.from_pretrained(model(), folder, is_trainable=True)
    assert wrapper.training
    assert all(module.training for module in wrapper.modules())
    wrapper.load_adapter(folder, "frozen", autocast_adapter_dtype=False)
    assert not any(module.training for module in wrapper.modules())
    wrapper.load_adapter(folder, "another")
    assert not any(module.training for module in wrapper.modules())
    failing = model().train()
    with pytest.raises(inlay.InlayError):
        inlay.PeftModel.from_pretrained(failing, folder, config=inlay.LoraConfig(**{**CONFIG, "r": 3}))
    assert all(module.training for module in failing.modules())


def test_what_was_set_apart_by_hand_stays_so(folder):
    """PEFT puts every module of the model in eval mode; Inlay passes by other adapters at layers that are in it."""
    peft = pytest.importorskip("peft")
    modes = []
    for library in (peft, inlay):
        config = library.LoraConfig(**CONFIG, lora_dropout=0.5)
        wrapper = library.get_peft_model(model(), config).eval()
        apart = [module for module in wrapper.modules() if isinstance(module, nn.Dropout)]
        for module in apart:
            module.train()  # Monte Carlo dropout
        wrapper.load_adapter(folder, "second")
        modes.append({module.training for module in apart})
    assert modes == [{False}, {True}]


def test_collections_are_held_back_and_come_back():
    import gc

    @uncollected
    def nested(depth):
        assert not gc.isenabled()
        return depth and nested(depth - 1)

    assert gc.isenabled()
    nested(2)
    assert gc.isenabled()
    gc.disable()
    try:
        nested(1)
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        uncollected(lambda: 1 / 0)()
    assert gc.isenabled()
