"""``inlay train`` with LoRA's variants and ways to start: what it reports is what the saved adapter gives."""

from __future__ import annotations

import json

import pytest

from inlay.cli import main
from inlay.errors import ConfigError, ConfigTypeError, UnknownFieldError, UnsupportedError
from inlay.training.calibration import measured_start
from inlay.training.methods import METHODS, build_config
from inlay.training.settings import parse_assignments

BLOCKS = ["--set", "use_bdlora.target_modules_bd_a=[o_proj]", "use_bdlora.target_modules_bd_b=[q_proj]"]
RUNS = {
    "bdlora": ["--method", "bdlora", *BLOCKS, "use_bdlora.nblocks=2"],
    "qalora with others": ["--method", "qalora", "--set", "qalora_group_size=4", "velora_config.num_groups=16",
                           "monteclora_config.kl_loss_weight=0.01"],
    "kasa": ["--method", "kasa", "--set", "kasa_config={beta: 0.1}", "kasa_config.gamma=0.5"],
    "pissa with dora": ["--method", "dora", "--init", "pissa"],
    "loftq": ["--init", "loftq"],
    "eva": ["--init", "eva", "--set", "eva_config.rho=1.5"],
    "corda": ["--init", "corda", "--init-examples", "12"],
    "lora_ga": ["--init", "lora_ga", "--set", "lora_ga_config.direction=ArBr", "lora_ga_config.scale=gd_scale"],
}  # fmt: skip


def configured(*words: str, method: str = "lora", init=None):
    return build_config(method, task_type="CAUSAL_LM", init=init, extra=parse_assignments(list(words), "--set"))


def trained(shelf, folder, words):
    given = [
        "train", "--model", shelf / "gpt", "--data", shelf / "text.txt", "--task", "causal-lm", "--output", folder,
        "--rank", 2, "--alpha", 4, "--max-length", 32, "--max-steps", 4, "--lr", "2e-2", "--eval-fraction", "0.2",
        "--cpu", "--quiet", "--target", "q_proj", "o_proj", *words,
    ]  # fmt: skip
    assert main(list(map(str, given))) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_of(model, shelf):
    """The loss on the held-out tail of the text, as ``--eval-fraction 0.2`` cuts it."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shelf / "gpt")
    text = (shelf / "text.txt").read_text(encoding="utf-8")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = [block for start in range(0, len(ids), 32) if len(block := ids[start : start + 32]) > 1]
    total, count = 0.0, 0
    for block in blocks[-max(1, round(0.2 * len(blocks))) :]:
        with torch.no_grad():
            chances = model.eval()(input_ids=torch.tensor([block])).logits[0].log_softmax(-1)
        total -= float(chances[:-1].gather(1, torch.tensor(block)[1:, None]).sum())
        count += len(block) - 1
    return total / count


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_what_is_reported_is_what_the_saved_adapter_gives(words, shelf, tmp_path):
    """Over the base model as it is on disk, whatever the start did to it in training."""
    import transformers

    from inlay import PeftModel

    evaluations = [line["eval_loss"] for line in trained(shelf, tmp_path / "out", words) if "eval_loss" in line]
    base = transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt")
    bare = loss_of(base, shelf)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert evaluations[-1] == pytest.approx(loss_of(model, shelf), rel=1e-5)
    assert abs(evaluations[-1] - bare) > 1e-4
    if "lora_ga" in words:  # saved as an ordinary LoRA, which PEFT reads as well
        import peft

        real = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(shelf / "gpt"), str(tmp_path / "out")
        )
        assert evaluations[-1] == pytest.approx(loss_of(real, shelf), rel=1e-5)


def test_what_a_method_adds_to_the_loss_is_trained_on(shelf, tmp_path):
    """AdaLoRA pulls its bases towards orthogonal ones; without a weight it does not."""
    import torch
    from safetensors.torch import load_file

    far = []
    for weight in (1e-9, 5.0):
        words = ["--method", "adalora", "--set", "target_r=2", "total_step=4", f"orth_reg_weight={weight}"]
        trained(shelf, tmp_path / str(weight), words)
        tensors = load_file(tmp_path / str(weight) / "adapter_model.safetensors")
        factors = [tensor for name, tensor in sorted(tensors.items()) if "lora_A" in name]
        far.append(sum(float((A @ A.T - torch.eye(len(A))).norm()) for A in factors))
    assert far[1] < 0.9 * far[0]


def test_options_of_a_field():
    config = configured("kasa_config.beta=0.5", "init_lora_weights=olora", method="kasa")
    assert (config.kasa_config.beta, config.kasa_config.gamma, config.init_lora_weights) == (0.5, 1e-3, "olora")
    assert configured("kasa_config={beta: 2}", "kasa_config.gamma=3").kasa_config.gamma == 3.0
    assert configured(init="false").init_lora_weights is False
    assert configured(init="mini", method="miss").init_weights == "mini"
    assert configured(init="eva").eva_config.rho == 2.0
    assert configured(init="loftq").loftq_config == {"loftq_bits": 4, "loftq_iter": 1}


@pytest.mark.parametrize("variant", ["use_dora", "use_qalora", "use_bdlora", "kasa_config", "velora_config"])
def test_every_variant_has_a_method_of_its_own(variant):
    assert sum(variant in choice.fixed for choice in METHODS.values()) == 1


@pytest.mark.parametrize(
    ("words", "more", "error", "expected"),
    [
        (["kasa_config.bta=1"], {}, UnknownFieldError, "no option 'bta'.*'beta'"),
        (["kasa_config={bta: 1}"], {}, UnknownFieldError, "no option 'bta'.*'beta'"),
        (["kasa_confg.beta=1"], {}, UnknownFieldError, "no field 'kasa_confg'.*'kasa_config'"),
        (["kasa_config=true"], {}, ConfigTypeError, "expected options of KasaConfig.*kasa_config.beta"),
        (["kasa_config=true", "kasa_config.beta=1"], {}, ConfigError, "options need a mapping"),
        (["velora_config.num_groups=many"], {"method": "velora"}, ConfigTypeError, "velora_config.num_groups='many'"),
        (["r.x=1"], {}, ConfigTypeError, "r="),
        (["use_qalora=false"], {"method": "qalora"}, ConfigError, "already given by --method qalora"),
        ([], {"init": "pisa"}, ConfigError, "Did you mean 'pissa'"),
        ([], {"init": "pissa", "method": "loha"}, ConfigTypeError, "init_weights='pissa'"),
        ([], {"init": "pissa", "method": "ia3"}, ConfigError, "'ia3' has no init"),
    ],
)  # fmt: skip
def test_refused_options(words, more, error, expected):
    with pytest.raises(error, match=expected):
        configured(*words, **more)


def test_two_changes_of_the_base_of_which_one_is_measured():
    with pytest.raises(UnsupportedError, match="'corda' with kasa_config"):
        measured_start(configured(method="kasa", init="corda"))
