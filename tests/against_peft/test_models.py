"""The model level beside PEFT: the same model wrapped by both, with the same weights."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import peft
import peft.functional
import pytest
import tiny_models
import torch

import inlay
import inlay.compat  # PEFT's classes of ``base_model``, with their prefixes, come with its names
import inlay.functional
from inlay.models.tuner import AdapterModel

pytestmark = pytest.mark.filterwarnings("ignore")

X = tiny_models.tokens()
GPT2 = {"target_modules": ["c_attn", "c_proj"], "r": 4, "lora_alpha": 16}
ADAPTERS = {
    "lora": ("LoraConfig", GPT2),
    "lora with full copies": ("LoraConfig", {**GPT2, "modules_to_save": ["ln_f"]}),
    "lora with biases": ("LoraConfig", {**GPT2, "bias": "lora_only"}),
    "lora on embeddings": ("LoraConfig", {"target_modules": ["wte", "c_attn"], "r": 2}),
    "dora": ("LoraConfig", {**GPT2, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["ln_1", "ln_f"]}),
    "fourierft": ("FourierFTConfig", {"target_modules": ["c_attn"], "n_frequency": 20}),
}


def both(config: str, fields: dict, task: str | None = "CAUSAL_LM", build=tiny_models.gpt2):
    """The same model wrapped by PEFT and by Inlay, with PEFT's adapter values made random and copied."""
    theirs = peft.get_peft_model(build(), getattr(peft, config)(task_type=task, **fields))
    ours = inlay.get_peft_model(build(), getattr(inlay, config)(task_type=task, **fields))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        named = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(named[name])
    return theirs, ours


@pytest.fixture(params=ADAPTERS)
def pair(request):
    return both(*ADAPTERS[request.param])


def test_parameters_have_the_same_names_shapes_and_flags(pair):
    def described(model):
        return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert described(pair[1]) == described(pair[0])


def test_state_dicts_have_the_same_keys(pair):
    theirs, ours = pair
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_logits_loss_and_gradients_are_equal(pair):
    theirs, ours = (model(input_ids=X, labels=X) for model in pair)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    theirs.loss.backward()
    ours.loss.backward()
    expected = {name: p.grad for name, p in pair[0].named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in pair[1].named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_printed_line_is_the_same(pair, capsys):
    lines = []
    for model in pair:
        model.print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[1] == lines[0]
    assert pair[1].get_nb_trainable_parameters() == pair[0].get_nb_trainable_parameters()


def test_shared_tensors_have_the_same_names():
    """PEFT lists them under every layer as well; the copy at the root is the one that checkpoints name."""
    theirs, ours = both("VeraConfig", {"target_modules": ["c_attn", "c_fc"], "r": 4})
    root = {name for name in theirs.state_dict() if name.startswith("base_model.vera_")}
    assert root == {name for name, _ in ours.named_buffers() if "vera_" in name} != set()
    for name in root:
        ours.get_buffer(name).copy_(theirs.get_buffer(name))
    torch.testing.assert_close(ours(X).logits, theirs(X).logits, rtol=1e-5, atol=2e-6)
    moved = ours.to(torch.float64)
    assert all(buffer.dtype == torch.float64 for name, buffer in moved.named_buffers() if "vera_" in name)
    assert torch.isfinite(moved(X).logits).all()


# -- status -----------------------------------------------------------------------------------------------------------


def equal_status(theirs, ours):
    for ask in ("get_layer_status", "get_model_status"):
        expected, found = getattr(theirs, ask)(), getattr(ours, ask)()
        if ask == "get_layer_status":
            assert [dataclasses.asdict(layer) for layer in found] == [dataclasses.asdict(layer) for layer in expected]
        else:
            assert dataclasses.asdict(found) == dataclasses.asdict(expected)


@pytest.mark.parametrize("copies", [None, ["ln_f"]])
def test_status_is_the_same(copies):
    theirs, ours = both("LoraConfig", {**GPT2, "modules_to_save": copies})
    equal_status(theirs, ours)
    for model, package in ((theirs, peft), (ours, inlay)):
        model.add_adapter("b", package.LoraConfig(target_modules=["c_attn"], r=2, modules_to_save=copies))
    equal_status(theirs, ours)
    for model in (theirs, ours):
        model.set_adapter("b")
    equal_status(theirs, ours)
    if copies is None:  # PEFT refuses two active copies of one module
        for model in (theirs, ours):
            model.base_model.set_adapter(["default", "b"])
        equal_status(theirs, ours)
    for model in (theirs, ours):
        model.set_requires_grad("b", False)
    equal_status(theirs, ours)


def test_status_while_disabled_is_the_same_but_for_gradients():
    """PEFT switches gradients off as well, and so forgets what was frozen by hand; Inlay changes nothing."""
    theirs, ours = both("LoraConfig", GPT2)
    trainable = ours.get_nb_trainable_parameters()[0]
    with theirs.disable_adapter(), ours.disable_adapter():
        for expected, found in zip(theirs.get_layer_status(), ours.get_layer_status(), strict=True):
            assert found.requires_grad == {"default": True}
            found.requires_grad = expected.requires_grad
            assert dataclasses.asdict(found) == dataclasses.asdict(expected)
        assert ours.get_model_status().enabled is theirs.get_model_status().enabled is False
        assert ours.get_model_status().trainable_params == trainable


def test_status_while_merged_is_the_same():
    theirs, ours = both("LoraConfig", GPT2)
    for model in (theirs, ours):
        model.merge_adapter()
    equal_status(theirs, ours)


def test_status_of_bare_models():
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**GPT2), tiny_models.gpt2())
    ours = inlay.inject_adapter_in_model(inlay.LoraConfig(**GPT2), tiny_models.gpt2())
    assert [dataclasses.asdict(s) for s in inlay.get_layer_status(ours)] == [
        dataclasses.asdict(s) for s in peft.get_layer_status(theirs)
    ]
    expected = dataclasses.asdict(peft.get_model_status(theirs))
    found = dataclasses.asdict(inlay.get_model_status(ours))
    assert found.pop("peft_types") == {"default": "LORA"}  # PEFT does not look, and says {}
    expected.pop("peft_types")
    assert found == expected


# -- attributes and signatures ----------------------------------------------------------------------------------------


def test_attributes_are_the_same(pair):
    theirs, ours = pair
    for name in (
        "active_adapter",
        "active_adapters",
        "base_model_torch_dtype",
        "device",
        "dtype",
        "has_active_enabled_adapter",
        "modules_to_save",
        "prefix",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.peft_type.value == theirs.peft_type.value
    assert ours.base_model.prefix == theirs.base_model.prefix
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__
    assert type(ours).__name__ == type(theirs).__name__


@pytest.mark.parametrize("task", [*(task.value for task in peft.TaskType), None])
def test_each_task_has_the_same_wrapper(task):
    builds = {
        "SEQ_CLS": lambda: tiny_models.bert("BertForSequenceClassification"),
        "TOKEN_CLS": lambda: tiny_models.bert("BertForTokenClassification"),
        "QUESTION_ANS": lambda: tiny_models.bert("BertForQuestionAnswering"),
        "SEQ_2_SEQ_LM": tiny_models.t5,
        "CAUSAL_LM": tiny_models.gpt2,
    }
    theirs, ours = both("LoraConfig", {}, task, builds.get(task, tiny_models.bert))
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.modules_to_save == theirs.modules_to_save
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


FUNCTIONS = """
get_peft_model inject_adapter_in_model get_peft_config prepare_model_for_kbit_training get_layer_status get_model_status
cast_mixed_precision_params get_base_model_state_dict set_base_model_state_dict shift_tokens_right
get_peft_model_state_dict set_peft_model_state_dict load_peft_weights
""".split()  # noqa: SIM905
CLASSES = {
    "PeftModel": """__init__ save_pretrained from_pretrained get_nb_trainable_parameters print_trainable_parameters
        forward generate disable_adapter get_base_model add_adapter delete_adapter get_layer_status get_model_status
        load_adapter set_adapter set_requires_grad create_or_update_model_card supports_lora_conversion
        prepare_model_for_gradient_checkpointing""",
    "PeftModelForCausalLM": "forward prepare_inputs_for_generation",
    "PeftModelForSeq2SeqLM": "forward prepare_inputs_for_generation",
    "PeftModelForSequenceClassification": "forward",
    "PeftModelForTokenClassification": "forward",
    "PeftModelForQuestionAnswering": "forward",
    "PeftModelForFeatureExtraction": "forward",
    "PeftMixedModel": "__init__ add_adapter set_adapter delete_adapter disable_adapter",
    "AutoPeftModel": "from_pretrained",
}
METHODS = [(cls, name) for cls, names in CLASSES.items() for name in names.split()]
# What Inlay's say more than PEFT's.
MORE = {"adapters", "token_type_ids", "position_ids", "only_if_on"}


def assert_callable_alike(theirs, ours):
    """Whatever arguments PEFT takes are taken, by position and by name, with the same defaults."""
    expected = dict(inspect.signature(theirs).parameters)
    found = dict(inspect.signature(ours).parameters)
    extra = [name for name in found if name not in expected]
    assert set(extra) <= MORE
    rest = [(p.name, p.kind, p.default) for p in found.values() if p.name not in extra]
    assert rest == [(p.name, p.kind, p.default) for p in expected.values()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_signature(name):
    assert_callable_alike(getattr(peft, name), getattr(inlay, name))


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_methods_have_the_same_signature(cls, name):
    assert_callable_alike(getattr(getattr(peft, cls), name), getattr(getattr(inlay, cls), name))


@pytest.mark.parametrize("name", ["merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "set_adapter"])
def test_tuner_methods_have_the_same_signature(name):
    assert_callable_alike(getattr(peft.LoraModel, name), getattr(AdapterModel, name))


@pytest.mark.parametrize("name", ["set_adapter", "set_requires_grad", "cast_adapter_dtype"])
def test_functional_has_the_same_parameters(name):
    theirs = list(inspect.signature(getattr(peft.functional, name)).parameters)
    assert list(inspect.signature(getattr(inlay.functional, name)).parameters) == theirs
    assert set(peft.functional.__all__) == set(inlay.functional.__all__)


def test_registries_hold_the_same_names():
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"):
        ours, theirs = getattr(inlay, name), getattr(peft, name)
        assert ours
        expected = {str(getattr(key, "value", key)): value.__name__ for key, value in theirs.items()}
        for key, value in ours.items():
            assert value.__name__ == expected[str(getattr(key, "value", key))]
        if name.startswith("MODEL"):
            assert len(ours) == len(theirs)


# -- misuse -----------------------------------------------------------------------------------------------------------


def wrapped(package):
    return package.get_peft_model(tiny_models.gpt2(), package.LoraConfig(**GPT2)).eval()


MISUSE = {
    "targets that are not there": lambda p: p.get_peft_model(
        tiny_models.gpt2(), p.LoraConfig(target_modules=["nowhere"])
    ),
    "a layer that has no weight": lambda p: p.get_peft_model(
        tiny_models.gpt2(), p.LoraConfig(target_modules=["attn_dropout"])
    ),
    "no rank": lambda p: p.get_peft_model(tiny_models.gpt2(), p.LoraConfig(target_modules=["c_attn"], r=0)),
    "no default targets": lambda p: p.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), p.LoraConfig()),
    "unknown field": lambda p: p.LoraConfig(rank=3),
    "unknown task": lambda p: p.LoraConfig(task_type="SINGING"),
    "unknown adapter activated": lambda p: wrapped(p).set_adapter("nobody"),
    "unknown adapter deleted": lambda p: wrapped(p).delete_adapter("nobody"),
    "a name taken": lambda p: wrapped(p).add_adapter("default", p.LoraConfig(**GPT2)),
    "an adapter from nowhere": lambda p: wrapped(p).load_adapter("/no/such/folder", "b"),
    "a model from nowhere": lambda p: p.PeftModel.from_pretrained(tiny_models.gpt2(), "/no/such/folder"),
    "an unknown sample": lambda p: wrapped(p)(X, adapter_names=["default", "nobody", "default"]),
    "too few names": lambda p: wrapped(p)(X, adapter_names=["default"]),
    "a string to merge": lambda p: wrapped(p).merge_adapter("default"),
    "deleting what is merged": lambda p: (m := wrapped(p), m.merge_adapter(), m.delete_adapter("default")),
    "saving what is not there": lambda p: wrapped(p).save_pretrained("/tmp/never", selected_adapters=["nobody"]),
    "an attribute that is not there": lambda p: wrapped(p).nonsense,
    "status of a bare model": lambda p: p.get_model_status(tiny_models.gpt2()),
    "layer status of a bare model": lambda p: p.get_layer_status(tiny_models.gpt2()),
    "an unknown method": lambda p: p.get_peft_config({"peft_type": "NONSENSE"}),
    "auto without from_pretrained": lambda p: p.AutoPeftModel(),
    "a config without a method": lambda p: p.get_peft_config({"r": 8}),
    "no padding token": lambda p: p.shift_tokens_right(X, None, 0),
    "all excluded": lambda p: p.get_peft_model(
        tiny_models.gpt2(), p.LoraConfig(target_modules=["c_attn"], exclude_modules=["c_attn"])
    ),
    "a second bias": lambda p: p.get_peft_model(tiny_models.gpt2(), p.LoraConfig(**GPT2, bias="all")).add_adapter(
        "b", p.LoraConfig(**GPT2, bias="all")
    ),
}


@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_what_code_written_against_peft_catches(misuse):
    with pytest.raises(Exception) as theirs:
        misuse(peft)
    with pytest.raises(Exception) as ours:
        misuse(inlay)
    builtin = next(cls for cls in type(theirs.value).__mro__ if cls.__module__ == "builtins")
    assert isinstance(ours.value, builtin), f"{theirs.value!r} against {ours.value!r}"


# -- preparing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "gptq", "bitsandbytes"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_preparing_for_quantised_training_is_the_same(method, checkpointing, reentrant):
    def prepared(package):
        model = tiny_models.gpt2().to(torch.bfloat16)
        if method is not None:
            model.quantization_method = method
            model.is_loaded_in_4bit = method == "bitsandbytes"
        arguments = None if reentrant is None else {"use_reentrant": reentrant}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package.prepare_model_for_kbit_training(model, checkpointing, arguments)
        flags = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        hooks = len(model.get_input_embeddings()._forward_hooks)
        return flags, model.is_gradient_checkpointing, hooks

    assert prepared(inlay) == prepared(peft)


def test_casting_for_mixed_precision_is_the_same():
    theirs, ours = both("LoraConfig", GPT2)
    for model, package in ((theirs, peft), (ours, inlay)):
        package.cast_mixed_precision_params(model, torch.bfloat16)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


def test_shifting_labels_is_the_same():
    labels = X.clone()
    labels[:, -2:] = -100
    assert torch.equal(inlay.shift_tokens_right(labels, 0, 1), peft.shift_tokens_right(labels, 0, 1))


def test_base_weights_are_the_same():
    theirs, ours = both("LoraConfig", {**GPT2, "modules_to_save": ["ln_f"]})
    expected, found = peft.get_base_model_state_dict(theirs), inlay.get_base_model_state_dict(ours)
    assert found.keys() == expected.keys() == tiny_models.gpt2().state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    other = tiny_models.gpt2(seed=3).state_dict()
    inlay.set_base_model_state_dict(ours, other)
    peft.set_base_model_state_dict(theirs, other)
    torch.testing.assert_close(ours(X).logits, theirs(X).logits, rtol=1e-5, atol=2e-6)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_loading_leaves_the_same_flags(tmp_path, trainable):
    theirs, ours = both("LoraConfig", {**GPT2, "modules_to_save": ["ln_f"]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")

    def loaded(package, folder):
        model = package.PeftModel.from_pretrained(tiny_models.gpt2().train(), folder, is_trainable=trainable)
        model.load_adapter(folder, "second", is_trainable=not trainable)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        with torch.no_grad():
            return flags, model.training, model.active_adapters, model.eval()(X).logits

    expected = loaded(peft, tmp_path / "ours")
    for found in (loaded(inlay, tmp_path / "theirs"), loaded(inlay, tmp_path / "ours")):
        assert found[:3] == expected[:3]
        torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=2e-6)


def test_the_flow_of_a_mixed_batch_is_the_same():
    theirs, ours = both("LoraConfig", GPT2)
    for model, package in ((theirs, peft), (ours, inlay)):
        model.add_adapter("b", package.LoraConfig(target_modules=["c_attn"], r=2, init_lora_weights=False))
    with torch.no_grad():
        named = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(named[name])
        names = ["b", "__base__", "default"]
        expected = theirs.eval()(X, adapter_names=names).logits
        torch.testing.assert_close(ours.eval()(X, adapter_names=names).logits, expected, rtol=1e-5, atol=2e-6)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "adapter_names": names}
    assert torch.equal(ours.generate(X, **options), theirs.generate(X, **options))
