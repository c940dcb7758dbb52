"""``inlay predict``: try a classification adapter, on texts or on a file with known labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.errors import ConfigError

LISTS = ("--text", "--data")


def command(
    adapter: Annotated[Path, typer.Option(help="Adapter folder")],
    text: Annotated[list[str] | None, typer.Option(help="Text to classify; may be given more than once")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Files to classify: .jsonl, or .txt with one text per line")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names")] = None,
    text_field: Annotated[str, typer.Option(help="JSONL field that holds the text")] = "text",
    label_field: Annotated[str, typer.Option(help="JSONL field that holds the true label, if known")] = "label",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens read of each text")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass")] = 32,
) -> None:
    """Print one JSON line per text: label, probability, text, and the true label where the data has one.

    The share of right answers goes to stderr when true labels are known.
    """
    from inlay.training.pretrained import accelerator_device, load_adapted
    from inlay.training.tasks.classify import Classify

    if bool(text) == bool(data):
        raise ConfigError("give either --text or --data")
    examples = [(entry, None) for entry in text] if text else _read(data or [], text_field, label_field)
    adapted, tokenizer, labels = load_adapted(adapter, model, wanted=Classify)
    adapted.to(accelerator_device())
    names = labels or [str(index) for index in range(adapted.config.num_labels)]
    length = min(max_length, tokenizer.model_max_length)
    right = known = 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        scores = class_scores(adapted, tokenizer, [entry for entry, _ in part], length).softmax(dim=-1)
        for (entry, truth), row in zip(part, scores, strict=True):
            best = int(row.argmax())
            line: dict[str, Any] = {"label": names[best], "probability": round(float(row[best]), 4), "text": entry}
            if truth is not None:
                line["truth"] = truth
                known += 1
                right += truth == names[best]
            print(json.dumps(line, ensure_ascii=False))
    if known:
        typer.echo(f"{right} of {known} right ({right / known:.1%})", err=True)


def class_scores(model: Any, tokenizer: Any, texts: list[str], length: int) -> Any:
    """Return the logits of ``texts``, ``(len(texts), labels)``, in one forward pass."""
    import torch

    batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits.float().cpu()


def _read(paths: list[str], text_field: str, label_field: str) -> list[tuple[str, str | None]]:
    from inlay.training.formats import Layout, read_rows

    examples = []
    for row in read_rows(paths, "--data", Layout("line", text_field, label_field)):
        entry, truth = row.values.get(text_field), row.values.get(label_field)
        if not isinstance(entry, str):
            raise ConfigError(f"--data: {row.where} has no text in field {text_field!r} (fields: {sorted(row.values)})")
        examples.append((entry, None if truth is None else str(truth)))
    if not examples:
        raise ConfigError(f"--data: no rows in {', '.join(paths)}")
    return examples
