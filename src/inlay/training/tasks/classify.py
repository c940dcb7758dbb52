"""One label for each text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from inlay.errors import ConfigError, did_you_mean
from inlay.training.tasks import Encoded, Example, Task

if TYPE_CHECKING:
    import numpy
    import torch

    from inlay.training.formats import Row
    from inlay.training.settings import RunConfig


class Classify(Task):
    name = "classify"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    unit = "line"
    pipeline_tag = "text-classification"
    default_length = 256
    main_metric = "accuracy"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._names: list[str] = []
        self._majority = ""

    def check(self, rows: Sequence[Row], setting: str) -> None:
        text, label = self.config.text_field, self.config.label_field
        for row in rows:
            if not isinstance(row.values.get(text), str) or not row.values[text].strip():
                raise ConfigError(
                    f"{setting}: {row.where} has no text in field {text!r} (fields: {sorted(row.values)})"
                )
            if not isinstance(row.values.get(label), (str, int)) or row.values[label] == "":
                raise ConfigError(
                    f"{setting}: {row.where} has no label in field {label!r}; a label is a string or an integer "
                    f"(fields: {sorted(row.values)})"
                )

    def fit(self, train: Sequence[Row], evaluation: Sequence[Row]) -> None:
        counts = Counter(self._label(row) for row in train)
        if len(counts) < 2:
            raise ConfigError(f"data: every text has the label {next(iter(counts))!r}; classify needs two or more")
        # numbers in their order, names by the alphabet
        self._names = sorted(counts, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
        self._majority = counts.most_common(1)[0][0]
        for row in evaluation:
            name = self._label(row)
            if name not in counts:
                raise ConfigError(f"{row.where}: label {name!r} is in no training text.{did_you_mean(name, counts)}")

    def _label(self, row: Row) -> str:
        return str(row.values[self.config.label_field])

    def model_options(self) -> dict[str, Any]:
        return head_options(self._names)

    def encode(self, rows: Sequence[Row], tokenizer: Any, length: int) -> Encoded:
        number = {name: index for index, name in enumerate(self._names)}
        texts = [row.values[self.config.text_field] for row in rows]
        whole = tokenizer(texts, verbose=False)["input_ids"]
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        examples = [{"input_ids": i, "label": [number[self._label(row)]]} for i, row in zip(ids, rows, strict=True)]
        return Encoded(examples, cut=sum(len(tokens) > length for tokens in whole))

    def collator(self, tokenizer: Any) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
        return partial(_collate, tokenizer)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, count: Any = None) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        if count is None:
            return cross_entropy(logits.float(), labels)
        return cross_entropy(logits.float(), labels, reduction="sum") / count

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the predicted class of each example, ``(batch,)``."""
        return logits.argmax(dim=-1)

    def metrics(self, reduced: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
        scores = []
        for index in range(len(self._names)):
            said, true = reduced == index, labels == index
            if said.any() or true.any():
                scores.append(2.0 * float((said & true).sum()) / float(said.sum() + true.sum()))
        majority = self._names.index(self._majority)
        return {
            "accuracy": float((reduced == labels).mean()),
            "macro_f1": sum(scores) / len(scores),
            "majority": float((labels == majority).mean()),
        }

    def facts(self) -> dict[str, Any]:
        return {"labels": self._names, "most_frequent_label": self._majority}

    def labels(self) -> list[str] | None:
        return self._names


def head_options(names: Sequence[str]) -> dict[str, Any]:
    """Return the ``from_pretrained`` keywords for a head with these outputs."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _collate(tokenizer: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    import torch

    padded = tokenizer.pad({"input_ids": [example["input_ids"] for example in examples]}, return_tensors="pt")
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "labels": torch.tensor([example["label"][0] for example in examples]),
    }
