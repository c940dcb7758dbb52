"""What forward must compute and what the parameters must count, at full size."""

from __future__ import annotations

import contextlib
import io

import full_size
import pytest
import tiny_models
import torch

import inlay
from inlay import LoraConfig, get_peft_model

BOTH = ["c_attn", "c_proj"]
GPT2 = 124_439_808


def test_the_formula():
    """Claim 8: y = base(x) + B(A(dropout(x))) * alpha / r; BA is never formed; several active adapters add up."""
    model = get_peft_model(tiny_models.gpt2().double(), LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn"]))
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn"]))
    for name in ("default", "b"):
        tiny_models.perturb(model, name)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(5, 7, 32, dtype=torch.float64)

    def update(name):
        return layer.lora_B[name](layer.lora_A[name](x)) * layer.lora_alpha[name] / layer.r[name]

    base = layer.base_layer(x)
    torch.testing.assert_close(layer(x), base + update("default"), rtol=1e-6, atol=1e-7)
    model.active_adapters = ["default", "b"]
    torch.testing.assert_close(layer(x), base + update("default") + update("b"), rtol=1e-6, atol=1e-7)
    model.set_adapter("b")
    torch.testing.assert_close(layer(x), base + update("b"), rtol=1e-6, atol=1e-7)


def test_the_product_of_both_matrices_is_never_formed():
    """Claim 8: no tensor of a forward has the shape of the weight but the weight itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                self.made.add((tuple(out.shape), out.data_ptr()))
            return out

    model = get_peft_model(tiny_models.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.5))
    layer = model.transformer.h[0].attn.c_attn
    own = layer.weight.data_ptr()
    for train in (True, False):
        layer.train(train)
        with Shapes() as seen:
            layer(torch.randn(2, 7, 32)).sum().backward()
        big = {shape for shape, pointer in seen.made if set(shape) == {32, 96} and pointer != own}
        assert not big


def test_dropout_acts_on_the_adapters_input_in_training_only():
    """Claim 8."""
    model = get_peft_model(tiny_models.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.5))
    tiny_models.perturb(model, "default")
    layer = model.transformer.h[0].attn.c_attn
    x = torch.ones(64, 32)
    layer.eval()
    exact = layer(x)
    assert torch.equal(layer(x), exact)
    layer.train()
    noisy = torch.stack([layer(x) for _ in range(40)])
    assert noisy.std(0).min() > 0
    torch.testing.assert_close(noisy.mean((0, 1)), exact[0], rtol=0.2, atol=0.2)


def test_active_adapters_can_be_read_and_assigned():
    """Claim 8."""
    model = get_peft_model(full_size.gpt2(), LoraConfig(target_modules=["c_attn"]), adapter_name="mine")
    assert model.active_adapter == "mine"
    model.add_adapter("other", LoraConfig(target_modules=["c_attn"]))
    model.active_adapters = ["other", "mine"]
    assert model.active_adapters == ["other", "mine"]


def test_a_fresh_adapter_changes_nothing():
    """Claim 9: A Kaiming-uniform, B zero; the output is bitwise the base model's."""
    base = full_size.bert(meta=False)
    tokens = torch.randint(0, 30522, (2, 16))
    with torch.no_grad():
        before = base(tokens).last_hidden_state
        model = get_peft_model(base, LoraConfig(r=16, target_modules=["query", "value"]))
        assert torch.equal(model(tokens).last_hidden_state, before)
    A = model.encoder.layer[0].attention.self.query.lora_A["default"].weight
    B = model.encoder.layer[0].attention.self.query.lora_B["default"].weight
    bound = 1 / 768**0.5  # of kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) fan_in))
    assert not B.any()
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_only_adapter_parameters_train():
    """Claim 10."""
    model = get_peft_model(tiny_models.gpt2(), LoraConfig(r=4, target_modules=BOTH))
    model(tiny_models.tokens(), labels=tiny_models.tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad is ("lora_" in name)


def printed(model):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        model.print_trainable_parameters()
    return out.getvalue().strip()


def test_trainable_parameters_are_printed_and_diagnosed():
    """Claim 10."""
    model = get_peft_model(full_size.gpt2(), LoraConfig(r=8, target_modules=BOTH))
    assert printed(model) == "trainable params: 811,008 || all params: 125,250,816 || trainable%: 0.6475"
    model.requires_grad_(True)
    with pytest.warns(inlay.InlayWarning, match="all parameters are trainable"):
        printed(model)
    with pytest.raises(inlay.InlayError, match="matches nothing"):
        get_peft_model(full_size.gpt2(), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(inlay.InlayWarning, match="memory is not reduced"):
        printed(get_peft_model(full_size.gpt2(), LoraConfig(r=4096, target_modules=BOTH)))


def test_single_layers():
    """Claim 11."""
    layer = full_size.gpt2().transformer.h[0].attn.c_attn
    assert type(layer).__name__ == "Conv1D"
    assert tuple(layer.weight.shape) == (768, 2304)
    assert tuple(layer.bias.shape) == (2304,)
    assert full_size.numel(layer) == 1_771_776
    model = get_peft_model(full_size.gpt2(), LoraConfig(r=8, target_modules=["c_attn"]))
    adapted = model.transformer.h[0].attn.c_attn
    assert full_size.numel(adapted.lora_A) == 6_144
    assert full_size.numel(adapted.lora_B) == 18_432
    assert round(100 * 24_576 / 1_771_776, 2) == 1.39
    query = full_size.bert().encoder.layer[0].attention.self.query
    assert full_size.numel(query) == 590_592
    model = get_peft_model(full_size.bert(), LoraConfig(r=16, target_modules=["query"]))
    assert model.get_nb_trainable_parameters()[0] == 12 * 24_576
    assert round(100 * 24_576 / 590_592, 2) == 4.16
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False))
    assert inlay.plan(net, LoraConfig(r=16, target_modules=["0"])).trainable == 131_072
    assert full_size.numel(net) == 16_777_216
    assert round(100 * 131_072 / 16_777_216, 2) == 0.78


@pytest.mark.parametrize(
    ("targets", "r", "count", "inverse", "percent"),
    [
        (["c_attn"], 8, 294_912, None, None),
        (BOTH, 8, 811_008, 153, 0.648),
        (BOTH, 4, 405_504, 307, None),
        (BOTH, 64, 6_488_064, 19, 4.96),
    ],
    ids=str,
)
def test_the_whole_of_gpt2(targets, r, count, inverse, percent):
    """Claim 12: parameters, and the adapter's share of the 124 M model."""
    base = full_size.gpt2()
    assert full_size.numel(base) == GPT2
    plan = inlay.plan(base, LoraConfig(r=r, target_modules=targets))
    model = get_peft_model(base, LoraConfig(r=r, target_modules=targets))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == plan.trainable == model.num_parameters(only_trainable=True) == count
    assert total == GPT2 + count
    if inverse is not None:
        assert round(GPT2 / count) == inverse
    if percent is not None:
        assert 100 * count / total == pytest.approx(percent, abs=0.0065)


def test_layers_hold_dicts_by_adapter_name():
    """Claim 13: two adapters of different rank live on one layer."""
    model = get_peft_model(
        full_size.gpt2(), LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], lora_dropout=0.1)
    )
    model.add_adapter("b", LoraConfig(r=16, lora_alpha=8, target_modules=["c_attn"]))
    layer = model.transformer.h[0].attn.c_attn
    for held in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        assert isinstance(held, torch.nn.ModuleDict)
        assert list(held) == ["default", "b"]
    assert dict(layer.r) == {"default": 8, "b": 16}
    assert dict(layer.lora_alpha) == {"default": 16, "b": 8}
    assert dict(layer.scaling) == {"default": 2.0, "b": 0.5}
    assert tuple(layer.lora_A["b"].weight.shape) == (16, 768)
    assert tuple(layer.lora_B["b"].weight.shape) == (2304, 16)
    assert layer.lora_dropout["default"].p == 0.1


def test_ia3_rescales_activations():
    """Claim 14, as far as it is in this release: IA3."""
    base = tiny_models.gpt2()
    layer = base.transformer.h[0].attn.c_attn
    model = get_peft_model(base, inlay.IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    tiny_models.perturb(model, "default")
    adapted = base.transformer.h[0].attn.c_attn
    x = torch.randn(3, 32)
    torch.testing.assert_close(adapted(x), layer(x) * adapted.ia3_l["default"].flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", list(inlay.TaskType))
def test_tasks_are_routed_to_their_wrappers(task):
    """Claim 15: six task types; any other model gets the plain wrapper."""
    names = {
        "CAUSAL_LM": ("PeftModelForCausalLM", full_size.gpt2()),
        "SEQ_2_SEQ_LM": ("PeftModelForSeq2SeqLM", tiny_models.t5()),
        "SEQ_CLS": ("PeftModelForSequenceClassification", full_size.bert("BertForSequenceClassification")),
        "TOKEN_CLS": ("PeftModelForTokenClassification", full_size.bert("BertForTokenClassification")),
        "QUESTION_ANS": ("PeftModelForQuestionAnswering", full_size.bert("BertForQuestionAnswering")),
        "FEATURE_EXTRACTION": ("PeftModelForFeatureExtraction", full_size.bert()),
    }
    name, base = names[task.value]
    assert type(get_peft_model(base, LoraConfig(task_type=task))).__name__ == name
    plain = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert type(plain) is inlay.PeftModel


def test_ways_to_inject():
    """Claim 16: mixed methods, creation on the meta device, adapter dtype, replicated layers."""
    model = get_peft_model(tiny_models.gpt2(), LoraConfig(target_modules=["c_attn"]), mixed=True)
    model.add_adapter("ia3", inlay.IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    model.set_adapter(["default", "ia3"])
    assert isinstance(model, inlay.PeftMixedModel)
    model(tiny_models.tokens())
    model = get_peft_model(tiny_models.gpt2(), LoraConfig(target_modules=["c_attn"]), low_cpu_mem_usage=True)
    assert {p.is_meta for n, p in model.named_parameters() if "lora_" in n} == {True}
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        half = tiny_models.gpt2().to(torch.bfloat16)
        model = get_peft_model(half, LoraConfig(target_modules=["c_attn"]), autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
        assert model(tiny_models.tokens()).logits.dtype == torch.bfloat16
