"""``peft.helpers`` beside the real one."""

from __future__ import annotations

import copy
import inspect
import pickle

import peft
import peft.helpers as theirs
import pytest
import torch
from hotswap_models import Written, base, close, ids, injected, loaded, pefts
from torch import nn

import inlay
import inlay.compat.peft as own
import inlay.compat.peft.helpers as ours
from inlay.core.policy import PEFT

NAMES = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
    "DoraCaching",
]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    mine, real = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in real.values()]


# -- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("multiplier", [0, 0.5, 2, -1.0, True])
def test_rescaling(tmp_path, bare, multiplier):
    written = Written(tmp_path, lora_alpha=6)
    model, real = (injected if bare else loaded)(written), pefts(written)
    with ours.rescale_adapter_scale(model, multiplier), theirs.rescale_adapter_scale(real, multiplier):
        close(model(ids()), real(ids()))
    close(model(ids()), written.output)


def test_rescaling_is_undone_after_an_exception_and_nests(tmp_path):
    model = loaded(Written(tmp_path))
    layer = model.base_model.model.lin
    with ours.rescale_adapter_scale(model, 3.0):
        with pytest.raises(ZeroDivisionError), ours.rescale_adapter_scale(model, 2.0):
            _ = layer.scaling["default"] / (layer.scaling["default"] - 6.0)
        assert layer.scaling["default"] == 3.0
    assert layer.scaling["default"] == 1.0


def test_rescaling_covers_every_adapter(tmp_path):
    """PEFT looks at LoRA alone; a model that stands in for its does so too."""
    model = loaded(Written(tmp_path))
    model.add_adapter("second", inlay.LoraConfig(r=2, lora_alpha=6, target_modules=["lin"]))
    model.add_adapter("third", inlay.LoHaConfig(r=2, alpha=6, target_modules=["lin"]))
    layer = model.base_model.model.lin
    with ours.rescale_adapter_scale(model, 2.0):
        assert dict(layer.scaling) == {"default": 2.0, "second": 6.0, "third": 6.0}
    assert dict(layer.scaling) == {"default": 1.0, "second": 3.0, "third": 3.0}
    layer.state.policy = PEFT
    with ours.rescale_adapter_scale(model, 2.0):
        assert dict(layer.scaling) == {"default": 2.0, "second": 6.0, "third": 3.0}


def test_rescaling_a_prepared_model(tmp_path):
    """Scales that are tensors stay tensors, so compiled code goes on."""
    from inlay.compat.peft.utils.hotswap import prepare_model_for_compiled_hotswap

    written = Written(tmp_path, lora_alpha=6)
    model, real = loaded(written), pefts(written)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(fast(ids()), written.output)
        with torch.compiler.set_stance("fail_on_recompile"):
            with ours.rescale_adapter_scale(model, 0.5), theirs.rescale_adapter_scale(real, 0.5):
                close(fast(ids()), real(ids()))
            close(fast(ids()), written.output)


@pytest.mark.parametrize("multiplier", ["2", None, torch.tensor(2.0), [1.0]], ids=str)
def test_rescaling_by_something_else(tmp_path, multiplier):
    written = Written(tmp_path)
    for module, model in ((ours, loaded(written)), (theirs, pefts(written))):
        with pytest.raises(TypeError), module.rescale_adapter_scale(model, multiplier):
            pass


def test_rescaling_without_lora():
    for module in (ours, theirs):
        with pytest.raises(ValueError, match=r"[Ll]o[Rr][Aa]"), module.rescale_adapter_scale(base(), 2.0):
            pass
    ia3 = inlay.get_peft_model(base(), inlay.IA3Config(target_modules=["lin"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="LoRA"), ours.rescale_adapter_scale(ia3, 2.0):
        pass
    real = peft.get_peft_model(base(), peft.LoHaConfig(target_modules=["lin"]))
    with pytest.raises(ValueError, match="Lora"), theirs.rescale_adapter_scale(real, 2.0):
        pass


# -- dtypes of inputs -------------------------------------------------------------------------------------------------


def _half_model(namespace, **kwargs):
    """A half-precision layer whose adapter is in float32, with values that differ in the two."""
    torch.manual_seed(0)
    config = namespace.LoraConfig(r=4, lora_alpha=64, target_modules=["0"], init_lora_weights=False)
    return namespace.get_peft_model(nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16), config, **kwargs)


def assert_rounded_no_worse(found, base, x, A, B):
    """As near to float64 as half-precision products that are rounded one by one; float32 ones would be much nearer."""
    linear = torch.nn.functional.linear
    exact = linear(x.double(), base.weight.double(), None if base.bias is None else base.bias.double())
    exact = exact + linear(linear(x.double(), A.double()), B.double()) * 16.0
    one_by_one = base(x) + linear(linear(x, A), B) * 16.0
    worst = (one_by_one - exact).abs().max()
    assert 0.1 * worst < (found - exact).abs().max() <= 1.05 * worst


def test_inputs_are_not_cast(tmp_path):
    """peft hands the input on as it is, which fails unless hooks made the dtypes equal; here products follow it."""
    model, real = _half_model(own), _half_model(peft)
    own.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(real))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    cast = model(x)
    torch.testing.assert_close(cast, real(x))
    with ours.disable_input_dtype_casting(model):
        kept = model(x)
    assert kept.dtype == torch.bfloat16
    assert not torch.equal(kept, cast)
    layer = model.base_model.model[0]
    A, B = (getattr(layer, name)["default"].weight.to(torch.bfloat16) for name in ("lora_A", "lora_B"))
    assert_rounded_no_worse(kept, layer.base_layer, x, A, B)
    assert torch.equal(model(x), cast)
    with ours.disable_input_dtype_casting(model, active=False):
        assert torch.equal(model(x), cast)
    with theirs.disable_input_dtype_casting(real), pytest.raises(RuntimeError):
        real(x)


def test_the_switch_of_one_layer_is_put_back():
    for module, model in ((ours, _half_model(own)), (theirs, _half_model(peft))):
        layer = model.base_model.model[0]
        assert layer.cast_input_dtype_enabled is True
        with module.disable_input_dtype_casting(layer):
            assert layer.cast_input_dtype_enabled is False
        assert layer.cast_input_dtype_enabled is True
        layer.cast_input_dtype_enabled = False
        with pytest.raises(ZeroDivisionError), module.disable_input_dtype_casting(model):
            raise ZeroDivisionError
        assert layer.cast_input_dtype_enabled is False


def test_narrow_storage_between_forwards():
    """Weights held in float8, as diffusers' layerwise casting leaves those of adapters."""
    model = _half_model(own)
    layer = model.base_model.model[0]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).to(torch.float8_e4m3fn)
    with ours.disable_input_dtype_casting(model):
        found = model(x)
    wide = [getattr(layer, name)["default"].weight.to(torch.bfloat16) for name in ("lora_A", "lora_B")]
    assert_rounded_no_worse(found, layer.base_layer, x, *wide)


# -- signatures -------------------------------------------------------------------------------------------------------


def _wrapped(namespace, model, task=None):
    return namespace.get_peft_model(model, namespace.LoraConfig(task_type=task, target_modules=["c_attn"]))


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_signatures_are_taken_over(tiny_gpt2, method, task):
    tiny_gpt2.eval()
    mine, real = _wrapped(own, copy.deepcopy(tiny_gpt2), task), _wrapped(peft, tiny_gpt2, task)
    ours.update_signature(mine, method)
    theirs.update_signature(real, method)
    for name in ("forward", "generate"):
        found, expected = getattr(mine, name), getattr(real, name)
        if method in (name, "all") and not (name == "forward" and task):
            assert inspect.signature(found) == inspect.signature(expected)
            assert found.__doc__ == expected.__doc__
    x = torch.randint(3, 30, (2, 4))
    torch.testing.assert_close(mine(input_ids=x).logits, real(input_ids=x).logits)
    assert mine.generate(input_ids=x, max_new_tokens=2, do_sample=False).shape == (2, 6)
    torch.testing.assert_close(copy.deepcopy(mine)(input_ids=x).logits, mine(input_ids=x).logits)
    torch.testing.assert_close(pickle.loads(pickle.dumps(mine))(input_ids=x).logits, mine(input_ids=x).logits)


def test_what_names_its_arguments_is_left_alone(tiny_gpt2):
    model = _wrapped(own, tiny_gpt2, "CAUSAL_LM")
    before = model.forward
    ours.update_forward_signature(model)
    assert model.forward == before
    assert "forward" not in vars(model)


def test_a_model_that_cannot_generate():
    model = own.get_peft_model(nn.Sequential(nn.Linear(2, 2)), own.LoraConfig(target_modules=["0"]))
    ours.update_signature(model)
    assert model(torch.ones(1, 2)).shape == (1, 2)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="backward"):
            module.update_signature(model, "backward")


TASKS = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "FeatureExtraction"]


@pytest.mark.parametrize("task", [*TASKS, "Seq2SeqLM"])
def test_trainers_find_the_same_arguments(task):
    """A trainer drops the columns that the signature of ``forward`` does not name."""
    mine, real = (inspect.signature(getattr(space, f"PeftModelFor{task}").forward).parameters for space in (own, peft))
    assert set(real) <= set(mine)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_whether_something_is_an_adapter(tmp_path):
    written = Written(tmp_path / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    for path in (written.folder, tmp_path / "broken", tmp_path / "nothing", tmp_path):
        assert ours.check_if_peft_model(str(path)) is theirs.check_if_peft_model(str(path))
    assert ours.check_if_peft_model(written.folder)


class _Trainer:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = torch.tensor(float(sum(kwargs.values())))
        return (loss, inputs) if return_outputs else loss


@pytest.mark.parametrize("return_outputs", [False, True])
def test_the_mixin_of_monteclora_adds_nothing_without_it(tmp_path, return_outputs):
    written = Written(tmp_path)
    results = []
    for module, model in ((ours, loaded(written)), (theirs, pefts(written))):
        trainer = type("T", (module.MontecloraTrainerMixin, _Trainer), {})()
        results.append(trainer.compute_loss(model, {"x": 1}, return_outputs, num_items_in_batch=3))
    assert results[0] == results[1] == ((torch.tensor(3.0), {"x": 1}) if return_outputs else torch.tensor(3.0))


def test_monteclora_counts_once_in_a_trainers_loss(monkeypatch):
    """Under PEFT's policy by the mixin, as in PEFT; else a wrapped model adds it to the loss that it returns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from inlay.methods.monteclora import MonteCLoRA

    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False):
            return model(**inputs).loss

    def noise(self, like):
        return torch.ones_like(like)

    monkeypatch.setattr(MonteCLoRA, "noise", noise)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    tokens = torch.arange(6).view(1, 6)
    inputs = {"input_ids": tokens, "labels": tokens}
    fields = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    options = {"num_samples": 2, "kl_loss_weight": 3.0}
    plain = inlay.get_peft_model(copy.deepcopy(base), inlay.LoraConfig(**fields)).train()
    for made in (inlay.get_peft_model, own.get_peft_model):
        model = made(copy.deepcopy(base), inlay.LoraConfig(monteclora_config=options, **fields)).train()
        term = model._get_monteclora_loss()
        assert float(term) > 1
        assert float(term) == pytest.approx(float(inlay.penalty(model)))
        trainer = type("T", (ours.MontecloraTrainerMixin, Trainer), {})()
        loss = trainer.compute_loss(model, inputs)
        assert float(loss) == pytest.approx(float(plain(**inputs).loss) + float(term), rel=1e-4)
        returned = float(model(**inputs).loss)
        adds = made is inlay.get_peft_model
        assert returned == pytest.approx(float(loss) if adds else float(loss - term), rel=1e-4)
