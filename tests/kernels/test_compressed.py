"""Updates that train from compressed inputs: gradients by definition, bytes kept for backward, geometry of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from inlay.config.variants import VeloraConfig
from inlay.core.affine import LowRank, Site
from inlay.core.compressed import Compressed
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.kernels.table import FAST
from inlay.methods.lora import LoraConfig

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 5, 12), -1),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (3, 6, 9), 1),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, padding_mode="reflect"), (3, 6, 5, 4), 1),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), (2, 6, 7, 7), 1),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (2, 6, 3, 3, 3), 1),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 4, 3), 1),
}


def rebuilt(x: torch.Tensor, direction: torch.Tensor, pieces: int, channel: int) -> torch.Tensor:
    """Return ``v v^T x`` by sub-token."""
    x = x.movedim(channel, -1)
    size = direction.numel()
    whole = torch.nn.functional.pad(x, (0, size * pieces - x.shape[-1])).unflatten(-1, (pieces, size))
    return ((whole @ direction).unsqueeze(-1) * direction).flatten(-2)[..., : x.shape[-1]].movedim(-1, channel)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("pieces", [2, 4, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_the_first_factor_is_that_for_rebuilt_inputs(name, pieces, dora):
    if dora and name == "conv2d_grouped":
        pytest.skip("DoRA's norm does not fit a grouped convolution")
    build, shape, channel = LAYERS[name]
    torch.manual_seed(3)
    base = nn.Sequential(build()).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False, "use_dora": dora}
    plain, compressed = copy.deepcopy(base), copy.deepcopy(base)
    inject(plan(plain, LoraConfig(**options)))
    inject(plan(compressed, LoraConfig(velora_config=VeloraConfig(pieces, 0.5, "random"), **options)))
    plain.load_state_dict({k: v for k, v in compressed.state_dict().items() if "velora" not in k})
    direction = compressed[0].lora_velora_embed["default"]
    weights = torch.randn_like(plain(x))

    def gradients(model, x):
        model.train()
        output = model(x)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return output, torch.autograd.grad((output * weights).sum(), [x, *wanted])

    found, (dx, dA, *others) = gradients(compressed, x)
    expected, (dx_plain, _, *others_plain) = gradients(plain, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([dx, *others], [dx_plain, *others_plain])
    lossy = rebuilt(x.detach(), direction, pieces, channel).requires_grad_()
    _, (_, wanted, *_) = gradients(plain, lossy)  # linear in the input, with DoRA too
    torch.testing.assert_close(dA, 0.5 * wanted)
    assert torch.allclose(lossy, x) == (direction.numel() == 1)


def test_backward_keeps_a_few_numbers_of_each_token():
    torch.manual_seed(0)
    rank, tokens, width, pieces = 2, 50, 64, 4
    A, B = torch.randn(rank, width, requires_grad=True), torch.randn(16, rank, requires_grad=True)
    x = torch.randn(tokens, width, requires_grad=True)
    kept: list[int] = []

    def pack(tensor):
        if tensor.numel() and tensor.shape[0] == tokens:
            kept.append(tensor[0].numel())
        return tensor

    site = Site("layer", "linear", 16, width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        delta = Compressed(LowRank(B, A), pieces, 1.0, None)
        FAST["linear", Compressed](nn.Linear(1, 1), site, x, delta)
    assert sorted(kept) == [rank, pieces]  # for B, and for A


def test_the_direction_of_the_first_input_stays():
    base = nn.Sequential(nn.Linear(12, 8))
    config = LoraConfig(r=2, target_modules=["0"], velora_config=VeloraConfig(4, init_type="batch_average_once"))
    inject(plan(base, config))
    base.eval()(torch.randn(3, 12))
    held = base[0].lora_velora_embed["default"]
    assert not held.any()  # nothing is learnt where nothing trains
    x = torch.randn(3, 12)
    base.train()(x)
    mean = x.view(-1, 3).mean(0)
    torch.testing.assert_close(held, mean / mean.norm())
    first = held.clone()
    base(x + 2)
    assert torch.equal(held, first)
