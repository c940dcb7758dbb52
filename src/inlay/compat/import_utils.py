"""Which optional packages are installed, asked by PEFT's names; none of them is imported."""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec

import torch

__all__ = [
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_inc_available",
    "is_optimum_available",
    "is_te_available",
    "is_te_pytorch_available",
    "is_torch_tpu_available",
    "is_torchao_available",
    "is_torchao_ge_v0_18_0",
    "is_transformers_dtensor_tp",
    "is_transformers_ge_v5",
    "is_transformers_ge_v5_1_0",
    "is_transformers_ge_v5_4_0",
    "is_transformers_ge_v5_6_0",
    "is_transformers_ge_v5_13_0",
    "is_transformers_ge_v5_17_0",
    "is_transformers_le_4_53",
    "is_xpu_available",
]


@lru_cache
def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package is missing, or is a stub without a spec
        return False


@lru_cache
def _version(name: str) -> tuple[int, ...]:
    """Return the numbers of a distribution's version, empty where it is not installed."""
    try:
        parts = metadata.version(name).split("+")[0].split(".")
    except metadata.PackageNotFoundError:
        return ()
    numbers = []
    for part in parts:
        digits = "".join(char for char in part if char.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _found("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed; every version that runs with today's torch has 4-bit layers."""
    return is_bnb_available()


def is_gptqmodel_available() -> bool:
    """Whether GPTQModel is installed."""
    return _found("gptqmodel")


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _found("optimum")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed, and with ``check_device`` also answers with a device."""
    if not _found("torch_xla"):
        return False
    if check_device:
        try:
            from torch_xla.core.xla_model import xla_device

            xla_device()
        except (ImportError, RuntimeError):
            return False
    return True


def is_aqlm_available() -> bool:
    """Whether AQLM is installed."""
    return _found("aqlm")


def is_eetq_available() -> bool:
    """Whether EETQ is installed."""
    return _found("eetq")


def is_hqq_available() -> bool:
    """Whether HQQ is installed."""
    return _found("hqq")


def is_inc_available() -> bool:
    """Whether Intel Neural Compressor is installed."""
    return _found("neural_compressor")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _found("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed, 0.18 or newer."""
    return _version("torchao") >= (0, 18)


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether an Intel GPU answers."""
    return bool(torch.xpu.is_available())


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _found("diffusers")


def is_te_available() -> bool:
    """Whether Transformer Engine is installed."""
    return _found("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine's layers for torch are installed."""
    return is_te_available() and _found("transformer_engine.pytorch")


_transformers = _version("transformers")
is_transformers_ge_v5 = _transformers >= (5,)
is_transformers_ge_v5_1_0 = _transformers >= (5, 1)
is_transformers_ge_v5_4_0 = _transformers >= (5, 4)
is_transformers_ge_v5_6_0 = _transformers >= (5, 6)
is_transformers_ge_v5_13_0 = _transformers >= (5, 13)
is_transformers_ge_v5_17_0 = _transformers >= (5, 17)
is_transformers_le_4_53 = bool(_transformers) and _transformers < (4, 54)
is_transformers_dtensor_tp = is_transformers_ge_v5_17_0
