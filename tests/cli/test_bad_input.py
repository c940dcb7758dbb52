"""Wrong input: exit code 2, a message that names the thing, and not one file written."""

from __future__ import annotations

import sys

import pytest

from inlay.cli import main


@pytest.fixture
def words(shelf, tmp_path, monkeypatch):
    """A command that would train, run from ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return {
        "--model": str(shelf / "gpt"),
        "--data": str(shelf / "text.txt"),
        "--task": "causal-lm",
        "--output": "out",
        "--target": "q_proj",
        "--max-steps": "2",
    }


def refused(tmp_path, capsys, words, *more: str) -> str:
    before = sorted(path.name for path in tmp_path.iterdir())
    line = [part for flag, value in words.items() if value for part in (flag, value)]
    assert main(["train", *line, *more]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        ({"--data": "text.tx"}, (), ["data", "'text.tx'", "Did you mean 'text.txt'"]),
        ({"--data": "table.csv"}, (), ["'table.csv' has no known format", ".jsonl"]),
        ({"--data": "empty.jsonl"}, (), ["data: no rows", "empty.jsonl"]),
        ({"--data": "broken.jsonl"}, (), ["broken.jsonl:3", "broken JSON"]),
        ({"--data": "list.jsonl"}, (), ["list.jsonl:1", "a JSON list"]),
        ({"--data": "fields.jsonl"}, (), ["fields.jsonl:1", "no text in field 'text'", "body"]),
        ({"--data": "latin.txt"}, (), ["latin.txt is not UTF-8"]),
        ({}, ("--method", "lorra"), ["method 'lorra'", "Did you mean 'lora'"]),
        ({}, ("--method", "ia3", "--rank", "4"), ["method 'ia3' has no rank", "IA3Config"]),
        ({}, ("--set", "use_rslor=true"), ["LoraConfig has no field 'use_rslor'", "'use_rslora'"]),
        ({}, ("--set", "use_rslora=7.5"), ["use_rslora", "bool"]),
        ({}, ("--set", "r"), ["--set 'r'", "field=value"]),
        ({"--task": "clasify"}, (), ["task 'clasify'", "Did you mean 'classify'"]),
        ({"--task": "classify", "--data": "one.jsonl"}, (), ["every text has the label 'a'"]),
        ({"--target": "q_prj"}, (), ["q_prj", "q_proj"]),
        ({"--model": "no-such-model"}, (), ["model 'no-such-model' cannot be loaded"]),
        ({}, ("--batch-size", "0"), ["batch_size is 0", ">= 1"]),
        ({}, ("--precision", "bf61"), ["precision is 'bf61'", "Did you mean 'bf16'"]),
        ({}, ("--max-length", "4096"), ["max_length is 4096", "at most 64"]),
        ({}, ("--eval-fraction", "0.1", "--eval-data", "text.txt"), ["eval_data and eval_fraction exclude"]),
        ({"--output": ""}, (), ["--output missing"]),
        ({"--output": "full"}, (), ["'full' is not empty"]),
        ({}, ("--resume",), ["'out' holds no run"]),
        ({"--model": ""}, ("--config", "unknown.yaml"), ["no setting 'modle'", "Did you mean 'model'"]),
        ({}, ("--config", "type.yaml"), ["epochs is 'many'", "float"]),
        ({}, ("--config", "twice.yaml"), ["twice.yaml", "'lr' is given twice"]),
        ({}, ("--config", "no.yaml"), ["there is no file 'no.yaml'"]),
        ({}, ("--modle", "x"), ["No such option", "--model"]),
    ],
)  # fmt: skip
def test_refused(changes, more, expected, words, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("salt wave", encoding="utf-8")
    (tmp_path / "table.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"text": "salt"}\n\n{"text": "wa\n', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text('["salt"]\n', encoding="utf-8")
    (tmp_path / "fields.jsonl").write_text('{"body": "salt"}\n', encoding="utf-8")
    (tmp_path / "one.jsonl").write_text('{"text": "salt", "label": "a"}\n' * 3, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("öl".encode("latin-1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep me", encoding="utf-8")
    (tmp_path / "unknown.yaml").write_text("modle: x\n", encoding="utf-8")
    (tmp_path / "type.yaml").write_text("epochs: many\n", encoding="utf-8")
    (tmp_path / "twice.yaml").write_text("lr: 1.0\nlr: 2.0\n", encoding="utf-8")
    message = refused(tmp_path, capsys, {**words, **changes}, *more)
    for part in expected:
        assert part in message
    assert (tmp_path / "full" / "mine").read_text(encoding="utf-8") == "keep me"


def test_exit_code_and_message_of_the_process(inlay, tmp_path):
    done = inlay("train", "--model", "m", "--data", "nowhere.txt", "--task", "causal-lm", "--output", "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data: there is no file 'nowhere.txt'")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(words):
    from inlay.errors import CheckpointMissingError

    with pytest.raises(CheckpointMissingError, match="nowhere"):
        main(["train", "--debug", *[part for pair in {**words, "--data": "nowhere.txt"}.items() for part in pair]])


@pytest.mark.parametrize("name", ["typer", "msgspec"])
def test_missing_extra_is_named(name, monkeypatch, capsys):
    for module in [m for m in sys.modules if m.startswith(("inlay.cli.", "inlay.training."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "--help"]) == 2
    assert f"{name} is not installed: pip install 'inlay[train]'" in capsys.readouterr().err


def test_errors_need_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config: there is no file 'nowhere.yaml'\n"


def test_several_values_after_one_option():
    from inlay.cli.application import spread

    assert spread(["train", "--data", "a", "b", "--lr", "1", "x"], ("--data",)) == [
        "train", "--data", "a", "--data", "b", "--lr", "1", "x",
    ]  # fmt: skip
