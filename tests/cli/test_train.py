"""``inlay train`` as a process: what it leaves, that its figures are true, and that a killed run ends the same."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import yaml
from cli_process import command, environment

STEPS = 120
SETTINGS = {
    "task": "causal-lm",
    "target": ["q_proj", "v_proj"],
    "rank": 4,
    "alpha": 8,
    "dropout": 0.2,
    "max_length": 32,
    "max_steps": STEPS,
    "batch_size": 4,
    "accumulate": 2,
    "lr": "1e-2",  # YAML 1.1 reads 1e-2 without quotes as this string, too
    "log_steps": 7,
    "save_steps": 10,
}


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def config_file(shelf):
    held = shelf / "held.txt"
    text = (shelf / "text.txt").read_text(encoding="utf-8").splitlines()
    held.write_text("\n".join(text[:30]), encoding="utf-8")
    (shelf / "learn.txt").write_text("\n".join(text[30:]), encoding="utf-8")
    path = shelf / "run.yaml"
    values = {**SETTINGS, "model": str(shelf / "gpt"), "data": [str(shelf / "learn.txt")], "eval_data": [str(held)]}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole_run(shelf, config_file):
    """An uninterrupted run; the flag --rank wins over the file."""
    folder = shelf / "whole"
    words = command("train", "--config", config_file, "--output", folder, "--rank", 2, "--quiet")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # --quiet
    return folder


def test_leaves_adapter_metrics_plot_card_and_checkpoints(whole_run):
    config = json.loads((whole_run / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 2, 8)
    assert all(tensor.shape[0 if "lora_A" in name else 1] == 2 for name, tensor in tensors(whole_run).items())
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["checkpoint-110", "checkpoint-120"]
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    front = (whole_run / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert yaml.safe_load(front)["base_model"] == "gpt"
    training = [entry for entry in entries(whole_run) if "loss" in entry]
    assert {*range(7, STEPS + 1, 7), *range(10, STEPS + 1, 10)} == {entry["step"] for entry in training}
    assert all({"step", "loss", "lr", "tokens", "tokens_per_second"} <= entry.keys() for entry in training)
    evaluations = [entry["step"] for entry in entries(whole_run) if "eval_loss" in entry]
    assert evaluations[0] == 0
    assert evaluations[-1] == STEPS


def test_reported_loss_is_the_loss_of_the_saved_adapter(whole_run, shelf):
    """Recomputed from the files: token by token in double precision, with the packing of the documentation."""
    import torch
    import transformers

    from inlay import PeftModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(shelf / "gpt")
    base = transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt")
    model = PeftModel.from_pretrained(base, str(whole_run)).eval().double()
    ids = [*tokenizer((shelf / "held.txt").read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    total, count = 0.0, 0
    for start in range(0, len(ids), 32):
        block = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            chances = model(input_ids=block).logits[0].log_softmax(-1)
        total -= float(chances[:-1].gather(1, block[0, 1:, None]).sum())
        count += block.shape[1] - 1
    reported = [entry for entry in entries(whole_run) if "eval_loss" in entry]
    assert reported[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert reported[-1]["eval_loss"] < reported[0]["eval_loss"] - 0.02


@pytest.mark.parametrize("at", [30, 70])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(at, whole_run, shelf, config_file, inlay):
    import torch

    folder = shelf / f"killed-{at}"
    words = command("train", "--config", config_file, "--output", folder, "--rank", 2, "--quiet")
    process = subprocess.Popen(words, env=environment())
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / f"checkpoint-{at}").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    assert not (folder / "adapter_model.safetensors").exists()
    assert max(entry["step"] for entry in entries(folder)) < STEPS

    resumed = inlay("train", "--resume", "--output", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    expected, found = tensors(whole_run), tensors(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    timings = ("tokens_per_second", "seconds")
    strip = [[{k: v for k, v in e.items() if k not in timings} for e in entries(f)] for f in (whole_run, folder)]
    assert strip[0] == strip[1]


def test_passes_visit_everything_once_and_follow_from_the_seed_alone():
    from inlay.training.order import Passes

    examples = [{"input_ids": [number]} for number in range(10)]
    seen = [Passes(examples, 25, seed=3)[index]["input_ids"][0] for index in range(25)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert len({tuple(seen[:10]), tuple(seen[10:20]), tuple(range(10))}) == 3
    late = Passes(examples, 25, seed=3)
    assert [late[index]["input_ids"][0] for index in range(13, 25)] == seen[13:]
    assert [Passes(examples, 25, seed=4)[index]["input_ids"][0] for index in range(10)] != seen[:10]


def test_resume_refuses_another_run(whole_run, shelf, capsys):
    from inlay.cli import main

    assert main(["train", "--resume", "--output", str(whole_run), "--lr", "0.5"]) == 2
    assert "lr was 0.01 and is now 0.5" in capsys.readouterr().err
    (shelf / "learn.txt").write_text((shelf / "learn.txt").read_text() + " salt", encoding="utf-8")
    assert main(["train", "--resume", "--output", str(whole_run)]) == 2
    assert "has changed since the run began" in capsys.readouterr().err


def test_classify_and_predict(shelf, sentences, inlay, tmp_path, capsys):
    """The accuracy that training reports is the share that ``inlay predict`` gets right, and beats the majority."""
    lines = (shelf / "rows.jsonl").read_text().splitlines()
    (tmp_path / "learn.jsonl").write_text("\n".join(lines[60:]))
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:60]))
    done = inlay(
        "train", "--model", shelf / "bert", "--data", "learn.jsonl", "--eval-data", "held.jsonl", "--task", "classify",
        "--output", "topics", "--target", "query", "value", "--lr", "1e-2", "--epochs", 4, "--set", "use_rslora=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # no terminal: plain lines
    assert "step 10/" in done.stdout
    folder = tmp_path / "topics"
    assert json.loads((folder / "labels.json").read_text()) == {"labels": ["sea", "sky", "town"]}
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is True
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= tensors(folder).keys()
    last = entries(folder)[-1]
    said = inlay("predict", "--adapter", "topics", "--data", "held.jsonl")
    assert said.returncode == 0, said.stderr
    answers = [json.loads(line) for line in said.stdout.splitlines()]
    assert [answer["truth"] for answer in answers] == [topic for _, topic in sentences[:60]]
    right = sum(answer["label"] == answer["truth"] for answer in answers) / 60
    assert last["eval_accuracy"] == pytest.approx(right)
    assert last["eval_accuracy"] > last["eval_majority"] + 0.2

    from inlay.cli import main

    (folder / "labels.json").unlink()  # as an adapter trained elsewhere: the head's rows still give the number
    assert main(["predict", "--adapter", str(folder), "--text", answers[0]["text"]]) == 0
    anonymous = json.loads(capsys.readouterr().out)
    assert ["sea", "sky", "town"][int(anonymous["label"])] == answers[0]["label"]
    assert anonymous["probability"] == pytest.approx(answers[0]["probability"], abs=1e-3)


def test_two_processes_train_one_adapter(shelf, tmp_path):
    """Under torchrun: one set of files, one line per logging step."""
    import sys

    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inlay",
        "train", "--model", shelf / "gpt", "--data", shelf / "text.txt", "--task", "causal-lm", "--output", "two",
        "--target", "q_proj", "--max-length", 32, "--max-steps", 6, "--log-steps", 2, "--save-steps", 3, "--cpu",
        "--eval-fraction", "0.2", "--eval-steps", 3,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, words)), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved two") == 1
    assert [entry["step"] for entry in entries(tmp_path / "two") if "loss" in entry] == [2, 3, 4, 6]
    assert [entry["step"] for entry in entries(tmp_path / "two") if "eval_loss" in entry] == [0, 3, 6]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(tmp_path / "two").values())


def test_loss_of_nan_stops_the_run(shelf, tmp_path, monkeypatch, capsys):
    from inlay.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", str(shelf / "gpt"), "--data", str(shelf / "text.txt"), "--task", "causal-lm",
             "--output", "out", "--target", "q_proj", "--max-length", "32", "--lr", "1e30", "--max-grad-norm", "0",
             "--log-steps", "1", "--max-steps", "20", "--quiet"]  # fmt: skip
    assert main(words) == 2
    assert "loss became nan by step" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
