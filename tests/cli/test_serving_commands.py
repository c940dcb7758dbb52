"""``inlay inspect --for`` and ``inlay export --serving`` as processes: verdicts, exit codes, files."""

from __future__ import annotations

import json

import pytest
import torch

BROKEN, BAD_INPUT = 1, 2


@pytest.fixture(scope="module")
def adapter(shelf, tmp_path_factory):
    """An adapter with rsLoRA and both patterns, for the tiny Llama on the shelf, saved by Inlay."""
    import transformers

    import inlay

    base = transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt")
    config = inlay.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=True,
        rank_pattern={"v_proj": 6}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3},
    )  # fmt: skip
    model = inlay.get_peft_model(base, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("serving") / "adapter"
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("server", "rules"),
    [
        ("vllm", {"patterns": "wrong result"}),
        ("sglang", {"rslora": "wrong result", "patterns": "wrong result", "ranks": "refused"}),
        ("llama.cpp", {"rslora": "wrong result", "patterns": "wrong result"}),
    ],
)
def test_verdict_before_and_after_export(server, rules, adapter, inlay):
    """The folder that was wrong for a server is right for it once exported; PEFT computes the same from both."""
    before = inlay("inspect", adapter, "--for", server, "--json")
    assert before.returncode == BROKEN, before.stderr
    report = json.loads(before.stdout)
    assert (report["for"], report["served"]) == (server, False)
    found = {finding["rule"]: finding["severity"] for finding in report["findings"]}
    assert {rule: severity for rule, severity in found.items() if severity != "fine"} == rules

    made = inlay("export", adapter, "--serving", "--for", server, "--out", "served")
    assert made.returncode == 0, made.stderr
    after = inlay("inspect", "served", "--for", server, "--json")
    assert after.returncode == 0, after.stdout
    assert json.loads(after.stdout)["served"]


def test_exported_adapter_computes_the_same_in_peft(adapter, shelf, inlay, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    made = inlay("export", adapter, "--serving", "--out", tmp_path / "served", "--base-name", "someone/base")
    assert made.returncode == 0, made.stderr
    assert "lora_B scaled in" in made.stdout
    assert "padded to rank 6 in 2 of 4 modules" in made.stdout
    assert "--max-lora-rank 6" in made.stdout
    logits = []
    for folder in (adapter, tmp_path / "served"):
        base = transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt").eval()
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(12).view(2, 6)).logits)
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-6 * float(logits[0].abs().max())
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"


def test_plain_text_has_a_line_for_each_rule(adapter, inlay):
    shown = inlay("inspect", adapter, "--for", "sglang")
    assert shown.returncode == BROKEN
    first, *lines = shown.stdout.splitlines()
    assert first.endswith("for sglang: 3 in the way")
    (line,) = [line for line in lines if line.startswith("wrong result: rslora")]
    assert "use_rslora is true; SGLang scales by alpha / r" in line
    assert "inlay export --serving" in line
    assert all(line.startswith(("fine: ", "refused: ", "wrong result: ")) for line in lines)


def test_table_on_a_terminal(adapter, capsys, monkeypatch):
    """With colours there is a table; no text of the adapter is taken for markup."""
    from inlay.cli import main

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(adapter), "--for", "vllm"]) == BROKEN
    shown = capsys.readouterr().out
    assert "what the server does" in shown
    assert "\x1b[" in shown


def test_options_of_the_server(adapter, inlay, shelf):
    release = inlay("inspect", adapter, "--for", "vllm", "--server-version", "0.33.0", "--json")
    assert release.returncode == 0, release.stdout
    small = inlay("inspect", adapter, "--for", "sglang", "--max-lora-rank", 4, "--json")
    assert "rank" in {f["rule"] for f in json.loads(small.stdout)["findings"] if f["severity"] == "refused"}
    other = inlay("inspect", adapter, "--for", "vllm", "--base", shelf / "bert", "--json")
    assert "base" in {f["rule"] for f in json.loads(other.stdout)["findings"] if f["severity"] == "refused"}


def test_every_reason_at_once_and_nothing_written(adapter, inlay, tmp_path):
    """What stands in the way is listed whole; the folder asked for is not made."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(use_dora=True, modules_to_save=["lm_head"], base_model_name_or_path=None)
    path.write_text(json.dumps(config))
    stopped = inlay("export", copy, "--serving", "--out", "served", "--max-lora-rank", 4)
    assert stopped.returncode == BAD_INPUT
    for reason in ("use_dora is true", "'lm_head'", "rank 6, the server takes 4", "--base-name NAME", "inlay merge"):
        assert reason in stopped.stderr
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "{adapter}", "--for", "vlm"], "Did you mean 'vllm'?"),
        (["inspect", "{adapter}", "--for", "vllm", "--server-version", "new"], "such as 0.32.0"),
        (["inspect", "{adapter}", "--max-lora-rank", "8"], "expected with --for"),
        (["inspect", "nowhere", "--for", "vllm"], "there is no adapter folder"),
        (["export", "{adapter}", "--out", "served"], "expected --serving"),
        (["export", "{adapter}", "--serving", "--out", "{adapter}"], "not empty"),
        (["export", "{adapter}", "--serving", "--out", "served", "--for", "tgi"], "expected one of vllm, sglang"),
        (["export", "{adapter}", "--serving", "--out", "served", "--dtype", "bfloat"], "Did you mean 'bfloat16'"),
    ],
)
def test_bad_input(words, message, adapter, inlay, tmp_path):
    done = inlay(*(str(adapter) if word == "{adapter}" else word for word in words))
    assert done.returncode == BAD_INPUT
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "served").exists()
