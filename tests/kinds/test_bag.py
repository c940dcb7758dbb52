"""Embedding bags in every form of call, beside torch's own bag with the table written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.core.call import opened
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import BASE
from inlay.methods.c3a import C3AConfig
from inlay.methods.ia3 import IA3Config
from inlay.methods.lora import LoraConfig
from inlay.methods.poly import PolyConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig

X = torch.tensor([5, 1, 0, 7, 7, 2, 1, 3, 6])
OFFSETS = torch.tensor([0, 2, 2, 6])  # the second bag is empty
SIZES = [2, 0, 4, 3]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules=["bag"]),
    "ia3": IA3Config(target_modules=["bag"], feedforward_modules=["bag"]),
    "c3a": C3AConfig(block_size=4, target_modules=["bag"]),
    "trainable_tokens": TrainableTokensConfig(token_indices=[7, 1, 2], target_modules=["bag"]),
    "poly": PolyConfig(r=2, n_splits=1, target_modules=["bag"]),
}


def _model(config: Any, names: tuple[str, ...] = ("one",), **options: Any) -> tuple[nn.ModuleDict, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(8, 8, **options)}).double()
    for name in names:
        state = inject(plan(model, config, name), seed=1)
    for name, parameter in model.named_parameters():
        if any(f".{one}" in name for one in names):
            nn.init.normal_(parameter, std=0.5)
    return model.eval(), state


@pytest.mark.parametrize("method", ["lora", "ia3", "c3a", "trainable_tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sum", "padding_idx": 1},
        {"mode": "mean", "padding_idx": 1, "include_last_offset": True},
        {"mode": "mean"},
        {"mode": "max", "padding_idx": 1},
        {"mode": "sum", "max_norm": 1.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_form_of_call(method: str, options: dict[str, Any]) -> None:
    model, _ = _model(CONFIGS[method], **options)
    layer = model["bag"]
    offsets = torch.cat([OFFSETS, torch.tensor([len(X)])]) if "include_last_offset" in options else OFFSETS
    written = layer.fold(layer.chain()).weight.mT.detach()
    rest = {name: value for name, value in options.items() if name != "max_norm"}
    plain = nn.EmbeddingBag(8, 8, _weight=written, **rest)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X, offsets), {}),
        ((X,), {"offsets": offsets}),
        ((), {"input": X, "offsets": offsets}),
        ((X[:8].view(2, 4),), {}),
    ]
    if options["mode"] == "sum":
        weights = torch.linspace(-1, 2, len(X), dtype=torch.float64)
        calls += [((X, offsets, weights), {}), ((X[:8].view(2, 4), None, weights[:8].view(2, 4)), {})]
    for args, kwargs in calls:
        torch.testing.assert_close(layer(*args, **kwargs), plain(*args, **kwargs))


@pytest.mark.parametrize("method", ["lora", "poly"])
@pytest.mark.parametrize("last", [False, True])
def test_a_mixed_batch_is_split_by_bags(method: str, last: bool) -> None:
    model, state = _model(CONFIGS[method], ("one", "two"), mode="sum", include_last_offset=last)
    offsets = torch.cat([OFFSETS, torch.tensor([len(X)])]) if last else OFFSETS
    weights = torch.linspace(-1, 2, len(X), dtype=torch.float64)
    names = ("two", "one", BASE, "one")
    with opened(state, names=names):
        found = model["bag"](X, offsets, weights)
    alone = []
    for name, bag, own in zip(names, X.split(SIZES), weights.split(SIZES), strict=True):
        with opened(state, names=(name,)):
            alone.append(model["bag"](bag, torch.tensor([0, len(bag)] if last else [0]), own))
    torch.testing.assert_close(found, torch.cat(alone))


def test_each_bag_has_a_task() -> None:
    config = PolyConfig(r=2, n_splits=1, n_tasks=3, target_modules=["bag"])
    model, state = _model(config, mode="mean", padding_idx=1)
    nn.init.normal_(next(p for n, p in model.named_parameters() if "logits" in n), std=3.0)
    tasks = torch.tensor([2, 0, 1, 2])
    with opened(state, tasks=tasks):
        found = model["bag"](X, OFFSETS)
    alone = []
    for task, bag in zip(tasks, X.split(SIZES), strict=True):
        with opened(state, tasks=task.view(1)):
            alone.append(model["bag"](bag, torch.tensor([0])))
    torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("method", ["lora", "c3a"])
def test_the_table_is_never_made(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _model(CONFIGS[method], mode="mean")
    made = []
    bag = nn.functional.embedding_bag

    def watched(x: Tensor, table: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(table.shape)
        return bag(x, table, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "embedding_bag", watched)
    model["bag"](X[:4].view(2, 2))
    assert made == [(8, 8), (8, 2) if method == "lora" else (4, 8)]
