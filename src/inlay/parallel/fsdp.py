"""What must be known of FSDP2 (``fully_shard``): which modules it manages, and whether their weights are gathered."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from inlay.errors import StateError, UnsupportedError

__all__ = ["refuse_managed", "refuse_shell", "settle"]


def _managers() -> Iterator[Any]:
    """Every module of the process that ``fully_shard`` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    registry = sys.modules.get("torch.distributed._composable_state")
    if fsdp is None or registry is None:
        return
    for module in list(registry._module_state_mapping):
        if isinstance(module, fsdp.FSDPModule):
            yield module


def settle() -> None:
    """Give up gathered weights, so that what a module holds is its shard.

    FSDP2 leaves the root's weights gathered after a forward; what is written there would be lost.
    """
    for module in _managers():
        module.reshard()


def refuse_managed(places: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules whose weights ``fully_shard`` manages already.

    New parameters would belong to no group of FSDP2, so they would be neither gathered nor have their gradients
    reduced.

    Raises:
        UnsupportedError: names the first such module.
    """
    managed = {id(module): manager for manager in _managers() for module in manager.modules()}
    if not managed:
        return
    for path, module in places:
        if id(module) in managed:
            raise UnsupportedError(
                f"{path!r} is inside a module that fully_shard was applied to, and FSDP2 takes no new parameters; "
                "inject every adapter first and apply fully_shard afterwards"
            )


def refuse_shell(path: str, module: nn.Module) -> None:
    """Refuse to take out an adapted layer that is itself a unit of FSDP2: its base would stay sharded for good.

    Raises:
        StateError: it is one.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        raise StateError(
            f"fully_shard was applied to the adapted layer {path!r} itself, which gathers its base weight; it cannot "
            "be taken out. Apply fully_shard to the block around it"
        )
