"""The rules of servers: each with an adapter that keeps it and one that breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from serving_adapters import BROKEN, edit, llama, rewrite, save
from serving_oracle import deltas, loaded
from serving_readers import READERS, Refused

from inlay.checkpoint.serving import FINE, REFUSED, SERVERS, check, problems
from inlay.checkpoint.serving_rules import RULES
from inlay.errors import CheckpointMissingError, ConfigError

RULE_NAMES = sorted({rule.name for rules in RULES.values() for rule in rules})


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    llama().save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("server", SERVERS)
def test_a_plain_adapter_keeps_every_rule(server, tmp_path, base_folder):
    findings = check(save(tmp_path / "plain"), server, base=base_folder)
    assert [finding.rule for finding in findings] == [rule.name for rule in RULES[server]]
    assert {finding.severity for finding in findings} == {FINE}


def test_every_rule_has_an_adapter_that_breaks_it():
    assert sorted(BROKEN) == RULE_NAMES


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_broken_rule_is_found(name, tmp_path):
    folder, options = BROKEN[name](tmp_path / "broken")
    for server, rules in RULES.items():
        for rule in rules:
            if rule.name != name:
                continue
            (finding,) = [found for found in check(folder, server, **options) if found.rule == name]
            assert finding.severity == rule.severity, server
            assert finding.found
            assert finding.says
            assert finding.mend


@pytest.mark.parametrize("name", ["rslora", "patterns", "ranks", "alpha", "names", "partners", "changed by hand"])
def test_servers_do_what_the_rules_say(name, tmp_path):
    """Where a rule on scales and names speaks of a wrong result, the server's own formula differs from PEFT's."""
    folder, _ = BROKEN[name](tmp_path / "broken")
    for server, rules in RULES.items():
        for rule in rules:
            if rule.name != name:
                continue
            if rule.severity == REFUSED:
                with pytest.raises(Refused):
                    READERS[server](folder)
                continue
            if name == "changed by hand":
                import inlay

                ours = inlay.PeftModel.from_pretrained(llama(), str(folder), adapters="all").base_model.model
                path = "model.layers.1.self_attn.q_proj"
                right = {path: ours.get_submodule(path).get_delta_weight("default").double()}
            else:
                right = deltas(loaded(folder))
            theirs = READERS[server](folder)
            assert any(not torch.allclose(theirs[module], right[module], rtol=1e-5) for module in right), server


def test_fine_for_one_server_and_not_for_another(tmp_path):
    ranks = save(tmp_path / "ranks", rank_pattern={"v_proj": 2})
    assert not problems(check(ranks, "llama.cpp"))  # it reads ranks off the tensors
    assert {finding.rule for finding in problems(check(ranks, "sglang"))} == {"ranks", "patterns"}
    stable = save(tmp_path / "stable", use_rslora=True)
    assert not problems(check(stable, "vllm"))
    head = save(tmp_path / "head")
    edit(head, modules_to_save=["score"])
    rewrite(head, lambda tensors: {**tensors, "base_model.model.score.weight": torch.ones(2, 32)})
    assert not problems(check(head, "vllm"))
    assert {finding.rule for finding in problems(check(head, "llama.cpp"))} == {"names"}
    assert {finding.rule for finding in problems(check(head, "sglang"))} == {"left out"}


def test_release_and_rank_that_the_server_has(tmp_path):
    folder = save(tmp_path / "patterns", alpha_pattern={"v_proj": 3}, r=20)

    def rules(**options: Any) -> set[str]:
        return {finding.rule for finding in problems(check(folder, "vllm", **options))}

    assert rules() == {"rank", "patterns"}
    assert rules(max_lora_rank=32) == {"patterns"}
    assert rules(max_lora_rank=32, version="0.31.1") == {"patterns"}
    assert rules(max_lora_rank=32, version="v0.33.0") == set()
    with pytest.raises(ConfigError, match=r"0\.32\.0"):
        check(folder, "vllm", version="latest")


def test_rules_that_need_the_base_say_when_it_is_missing(tmp_path, base_folder):
    folder = save(tmp_path / "plain")
    (unseen,) = [finding for finding in check(folder, "vllm") if finding.rule == "base"]
    assert unseen.severity == FINE
    assert "not looked at" in unseen.says
    edit(folder, base_model_name_or_path=str(base_folder))  # a folder that is here is read by itself
    (seen,) = [finding for finding in check(folder, "vllm") if finding.rule == "base"]
    assert seen.says == ""


def test_what_cannot_be_checked(tmp_path):
    folder = save(tmp_path / "plain")
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        check(folder, "vLM")
    with pytest.raises(CheckpointMissingError, match="nowhere"):
        check(tmp_path / "nowhere", "vllm")
    with pytest.raises(CheckpointMissingError, match="no base here"):
        check(folder, "vllm", base=tmp_path / "no base here")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointMissingError):
        check(folder, "vllm")
