"""Adapters of earlier model code: new names, and experts that were layers of their own, stacked as they are now.

The update of an expert's fused matrix ``[W1; W3]`` is block-diagonal in B: with ``A = [A1; A3]`` and
``B = diag(B1, B3)``, ``B @ A`` stacks ``B1 @ A1`` on ``B3 @ A3``. Ranks add up, scales stay.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from inlay.checkpoint.target import KeyIndex
from inlay.checkpoint.tree import MODEL_PREFIX, Tree
from inlay.core.banks import Bank, Layout, layout_of, stem
from inlay.core.parameter import ParameterLayer, parameter_layers
from inlay.errors import CheckpointError

__all__ = ["banks_in", "block_diagonal", "migrated", "nested", "packed", "renamed", "stacked"]


def migrated(tree: Tree, index: KeyIndex, tensors: Mapping[str, Tensor], adapter: str) -> Mapping[str, Tensor]:
    """Return an adapter's tensors as the present code of the model has them; those that fit already stay.

    Args:
        tree, index: the model with the adapter in it.
        tensors: what a file holds; not changed.
        adapter: its name in the model.

    Raises:
        CheckpointError: the factors of an expert do not fit together.
    """
    if tensors.keys() <= index.targets.keys():
        return tensors
    known = {index.rendered(key) for key in index.targets} | index.targets.keys()
    known.update(alias for target in index.targets.values() for alias in target.aliases)
    if tensors.keys() <= known:
        return tensors
    layout = layout_of(tree.bare)
    adapted: dict[str, list[str]] = {}
    for node in tree.nodes:
        if isinstance(node.module, ParameterLayer) and node.original not in adapted:  # the outermost of a nest
            adapted[node.original] = [
                layer.parameter_name for layer in parameter_layers(node.module) if adapter in layer.entries
            ][::-1]

    def place(bank: Bank) -> str | None:
        names = adapted.get(bank.owner, [])
        return nested(bank, names) if bank.parameter in names else None

    return renamed(layout, stacked(layout, tensors, place), known)


def renamed(layout: Layout, tensors: Mapping[str, Tensor], known: Container[str]) -> dict[str, Tensor]:
    """Return tensors under the names that present code has for them, where those are known and theirs are not."""
    result = {key: value for key, value in tensors.items() if key in known}
    for key, value in tensors.items():
        if key in known:
            continue
        bare = key.removeprefix(MODEL_PREFIX)
        new = layout.present(bare)
        candidates = (f"{MODEL_PREFIX}{new}", new)
        fitting = next((name for name in candidates if new != bare and name in known and name not in result), key)
        result[fitting] = value
    return result


def nested(bank: Bank, adapted: list[str]) -> str:
    """Return the path that a checkpoint has for a parameter's tensors.

    Args:
        bank: the parameter.
        adapted: the adapted parameters of its module, in the module's order; the last is outermost.
    """
    depth = len(adapted) - 1 - adapted.index(bank.parameter)
    return bank.owner + ".base_layer" * depth


def banks_in(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[Bank, dict[str, dict[tuple[int, int], str]]]:
    """Return the keys of former layers by bank, role (``lora_A.weight``), expert and part."""
    where = {path: (bank, e, p) for bank in layout.banks if bank.experts for e, p, path in bank.layers()}
    found: dict[Bank, dict[str, dict[tuple[int, int], str]]] = {}
    for key in tensors if where else ():
        path, role = stem(key)
        if not role:
            continue
        place = where.get(path) or where.get(stem(layout.present(f"{path}.{role}"))[0])
        if place is not None:
            bank, expert, part = place
            found.setdefault(bank, {}).setdefault(_plain(role), {})[expert, part] = key
    return found


def _plain(role: str) -> str:
    """Return a role without the adapter's name, which very old files have inside."""
    first, *_, last = role.split(".") if "." in role else (role, role)
    return role if first == last else f"{first}.{last}" if last in ("weight", "bias") else first


def stacked(layout: Layout, tensors: Mapping[str, Tensor], place: Callable[[Bank], str | None]) -> dict[str, Tensor]:
    """Return an adapter's tensors with those of former layers stacked as the layers are now.

    Args:
        layout: what changed in the model's code.
        tensors: by key, with or without ``base_model.model.``; not changed.
        place: the path for a bank's tensors in a checkpoint, or None to leave its layers' tensors alone.

    Raises:
        CheckpointError: an expert's factors do not fit together, or one of two is missing.
    """
    found = banks_in(layout, tensors)
    places = {bank: path for bank in found if (path := place(bank)) is not None}
    if not places:
        return dict(tensors)
    prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in tensors) else ""
    gone = {key for bank in places for keys in found[bank].values() for key in keys.values()}
    result = {key: value for key, value in tensors.items() if key not in gone}
    for bank, path in places.items():
        roles = {role: {place: tensors[key] for place, key in keys.items()} for role, keys in found[bank].items()}
        for role, tensor in _bank_tensors(bank, roles).items():
            result[f"{prefix}{path}.{role}"] = tensor
    return result


def _bank_tensors(bank: Bank, roles: dict[str, dict[tuple[int, int], Tensor]]) -> dict[str, Tensor]:
    A, B = roles.pop("lora_A.weight", {}), roles.pop("lora_B.weight", {})
    result = {}
    if A or B:
        if A.keys() != B.keys():
            expert, part = min(A.keys() ^ B.keys())
            raise CheckpointError(
                f"expert {expert} of {bank.path!r} has only one of the two factors of {bank.parts[part]!r}"
            )
        for place in A:
            if A[place].shape[0] != B[place].shape[1]:
                raise CheckpointError(
                    f"expert {place[0]} of {bank.path!r}: factors of {bank.parts[place[1]]!r} have ranks "
                    f"{A[place].shape[0]} and {B[place].shape[1]}"
                )
        down, up = _factors(bank, A, B)
        result = {"lora_A.weight": down.flatten(0, 1), "lora_B.weight": packed(up)}
    for role, parts in roles.items():  # one value for each row of a matrix (DoRA's magnitude)
        lacking = [(e, p) for e in range(bank.experts) for p in range(len(bank.parts)) if (e, p) not in parts]
        if lacking or any(tensor.dim() != 1 for tensor in parts.values()):
            raise CheckpointError(f"{role!r} of the layers that {bank.path!r} was cannot be stacked")
        result[role] = torch.stack(
            [torch.cat([parts[expert, part] for part in range(len(bank.parts))]) for expert in range(bank.experts)]
        )
    return result


def packed(B: Tensor) -> Tensor:
    """Return factors (experts, out, r) as a checkpoint has them: (out, r * experts), the expert running fastest."""
    return B.permute(1, 2, 0).flatten(1)


def block_diagonal(tensors: Sequence[Tensor]) -> Tensor:
    """Return banks (experts, out, r) as one (experts, sum of out, sum of r) with each in a block of its own.

    Raises:
        CheckpointError: they have different numbers of experts.
    """
    if len({tensor.shape[0] for tensor in tensors}) != 1:
        raise CheckpointError(f"banks of {[tensor.shape[0] for tensor in tensors]} experts cannot be joined")
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*tensors, strict=True)])


def _factors(bank: Bank, A: dict[tuple[int, int], Tensor], B: dict[tuple[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Return A as (experts, r, in) and B as (experts, out, r), block-diagonal; absent layers are zeros."""
    first = next(iter(A.values()))
    outs = {part: b.shape[0] for (_, part), b in reversed(B.items())}
    down, up = [], []
    for part in range(len(bank.parts)):
        rank = max((a.shape[0] for (_, p), a in A.items() if p == part), default=0)
        out = outs.get(part, max(outs.values()))
        down.append(first.new_zeros(bank.experts, rank, first.shape[1]))
        up.append(first.new_zeros(bank.experts, out, rank))
        for (expert, p), a in A.items():
            b = B[expert, p]
            if p != part:
                continue
            if a.shape[1] != first.shape[1] or b.shape[0] != out:
                raise CheckpointError(f"expert {expert} of {bank.path!r}: {bank.parts[part]!r} has another size")
            down[part][expert, : a.shape[0]] = a
            up[part][expert, :, : a.shape[0]] = b
    return torch.cat(down, 1), block_diagonal(up)
