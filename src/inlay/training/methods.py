"""The methods that ``--method`` names, and how the short flags map onto each method's own fields."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import yaml

import inlay
from inlay.config.settings import Settings
from inlay.errors import ConfigError, ConfigTypeError, UnknownFieldError, did_you_mean


@dataclass(frozen=True)
class MethodChoice:
    """One value of ``--method``: a config class, and the fields behind the common flags."""

    config: str  # name of the class in `inlay`
    rank: str | None = None
    alpha: str | None = None
    dropout: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options of a field are filled in by --set


_LORA = MethodChoice("LoraConfig", rank="r", alpha="lora_alpha", dropout="lora_dropout")

METHODS: dict[str, MethodChoice] = {
    "lora": _LORA,
    "dora": dataclasses.replace(_LORA, fixed={"use_dora": True}),
    "rslora": dataclasses.replace(_LORA, fixed={"use_rslora": True}),
    "qalora": dataclasses.replace(_LORA, fixed={"use_qalora": True}),
    "bdlora": dataclasses.replace(_LORA, fixed={"use_bdlora": {}}),
    "kasa": dataclasses.replace(_LORA, fixed={"kasa_config": {}}),
    "velora": dataclasses.replace(_LORA, fixed={"velora_config": {}}),
    "monteclora": dataclasses.replace(_LORA, fixed={"monteclora_config": {}}),
    "adalora": MethodChoice("AdaLoraConfig", rank="init_r", alpha="lora_alpha", dropout="lora_dropout"),
    "adamss": MethodChoice("AdamssConfig", rank="r"),
    "frod": MethodChoice("FrodConfig", dropout="frod_dropout"),
    "ia3": MethodChoice("IA3Config"),
    "lily": MethodChoice("LilyConfig", rank="r"),
    "osf": MethodChoice("OSFConfig"),
    "poly": MethodChoice("PolyConfig", rank="r"),
    "supertuning": MethodChoice("SupertuningConfig", rank="r", alpha="lora_alpha", dropout="lora_dropout"),
    "loha": MethodChoice("LoHaConfig", rank="r", alpha="alpha", dropout="rank_dropout"),
    "lokr": MethodChoice("LoKrConfig", rank="r", alpha="alpha", dropout="rank_dropout"),
    "c3a": MethodChoice("C3AConfig"),
    "gralora": MethodChoice("GraloraConfig", rank="r", alpha="alpha", dropout="gralora_dropout"),
    "miss": MethodChoice("MissConfig", rank="r", dropout="miss_dropout"),
    "shira": MethodChoice("ShiraConfig", rank="r"),
    "waveft": MethodChoice("WaveFTConfig", alpha="scaling"),
    "delora": MethodChoice("DeloraConfig", rank="r", dropout="module_dropout"),
    "oft": MethodChoice("OFTConfig", dropout="module_dropout"),
    "boft": MethodChoice("BOFTConfig", dropout="boft_dropout"),
    "hra": MethodChoice("HRAConfig", rank="r"),
    "road": MethodChoice("RoadConfig"),
    "hira": MethodChoice("HiraConfig", rank="r", dropout="hira_dropout"),
    "deft": MethodChoice("DeftConfig", rank="r", alpha="alpha", dropout="deft_dropout"),
    "glora": MethodChoice("GloraConfig", rank="r"),
    "psoft": MethodChoice("PsoftConfig", rank="r", alpha="psoft_alpha", dropout="psoft_dropout"),
    "beft": MethodChoice("BeftConfig"),
    "peanut": MethodChoice("PeanutConfig", rank="r", alpha="scaling"),
    "pvera": MethodChoice("PveraConfig", rank="r", dropout="pvera_dropout"),
    "randlora": MethodChoice("RandLoraConfig", rank="r", alpha="randlora_alpha", dropout="randlora_dropout"),
    "vblora": MethodChoice("VBLoRAConfig", rank="r", dropout="vblora_dropout"),
    "unilora": MethodChoice("UniLoraConfig", rank="r", dropout="unilora_dropout"),
    "tinylora": MethodChoice("TinyLoraConfig", rank="r", dropout="tinylora_dropout"),
    "vera": MethodChoice("VeraConfig", rank="r", dropout="vera_dropout"),
    "fourierft": MethodChoice("FourierFTConfig"),
    "ln_tuning": MethodChoice("LNTuningConfig"),
    "trainable_tokens": MethodChoice("TrainableTokensConfig"),
}
# how a config calls the way its weights start, which --init sets
INIT_FIELDS = ("init_lora_weights", "init_weights")
# a way to start -> the field of its options, which have their defaults unless --set gives them
INIT_OPTIONS = {"loftq": "loftq_config", "eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}


def method_choice(name: str) -> MethodChoice:
    """Return the table's entry.

    Raises:
        ConfigError: no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is none of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def build_config(
    method: str,
    *,
    task_type: str | None,
    target: list[str] | str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    init: str | bool | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """Return the adapter config for ``--method`` and its flags.

    ``extra`` (``--set``) names fields of the config class, and options of a field with a dot: ``kasa_config.beta``.

    Raises:
        ConfigError: unknown method, a flag the method has no field for, or a value the config refuses.
        UnknownFieldError: ``extra`` names a field or an option that there is not.
    """
    choice = method_choice(method)
    values: dict[str, Any] = {}
    for flag, wanted in (("rank", rank), ("alpha", alpha), ("dropout", dropout)):
        if wanted is None:
            continue
        name = getattr(choice, flag)
        if name is None:
            raise ConfigError(
                f"method {method!r} has no {flag}; fields of {choice.config} are set with --set field=value"
            )
        # the scale fields are integers in most configs, and 16 reads better than 16.0 in a saved file
        values[name] = int(wanted) if flag == "alpha" and float(wanted).is_integer() else wanted
    if target is not None:
        values["target_modules"] = _patterns(target)
    config_class = getattr(inlay, choice.config)
    known = [entry.name for entry in dataclasses.fields(config_class) if entry.init]
    types = _field_types(config_class)
    if init is not None:
        name = next((name for name in INIT_FIELDS if name in known), None)
        if name is None:
            raise ConfigError(f"method {method!r} has no init: its weights start in one way")
        # YAML, as --set reads it: "false" is no name
        values[name] = _typed(name, yaml.safe_load(init) if isinstance(init, str) else init, types.get(name, Any))
    given = dict(choice.fixed)
    for name, value in _grouped(extra or {}).items():
        if name not in known:
            raise UnknownFieldError(f"--set: {choice.config} has no field {name!r}.{did_you_mean(name, known)}")
        if name in values or not isinstance(given.get(name, {}), dict):
            raise ConfigError(f"--set {name}: already given by --method {method} or a flag of its own")
        given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) else value
    options = INIT_OPTIONS.get(str(given.get(INIT_FIELDS[0], values.get(INIT_FIELDS[0]))))
    if options in known:
        given.setdefault(options, {})
    values |= {name: _typed(name, value, types.get(name, Any)) for name, value in given.items()}
    return config_class(task_type=task_type, **values)


def _grouped(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``{"a.b": 1, "a.c": 2}`` together as ``{"a": {"b": 1, "c": 2}}``.

    Raises:
        ConfigError: a field is given both whole and by options, and the whole is no mapping.
    """
    grouped: dict[str, Any] = {}
    for name, value in extra.items():
        outer, dot, option = name.partition(".")
        if dot:
            value = {option: value}
        before = grouped.get(outer)
        if outer in grouped and not (isinstance(before, dict) and isinstance(value, dict)):
            raise ConfigError(f"--set {outer}: given as {before!r} and as {value!r}; options need a mapping")
        grouped[outer] = {**before, **value} if isinstance(before, dict) else value
    return grouped


def _patterns(target: list[str] | str) -> list[str] | str:
    """``all-linear`` alone is the keyword; any other single string is one module name."""
    names = [target] if isinstance(target, str) else list(target)
    return "all-linear" if names == ["all-linear"] else names


def _field_types(config_class: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config_class)
    except NameError:  # an annotation that only type checkers can resolve: the config checks its values itself
        return {}


def _typed(name: str, value: Any, annotation: Any) -> Any:
    settings = _settings_class(annotation)
    if settings is not None and isinstance(value, dict):
        return _settings(name, value, settings)
    try:
        return msgspec.convert(value, annotation, strict=False)
    except msgspec.ValidationError as error:
        expected = f"{str(error)[:1].lower()}{str(error)[1:]}"
        if settings is not None:
            expected = f"expected options of {settings.__name__}, such as --set {name}.{_names(settings)[0]}=..."
        raise ConfigTypeError(f"--set {name}={value!r}: {expected}") from None
    except TypeError:  # an annotation msgspec cannot express: the config class judges the value
        return value


def _settings_class(annotation: Any) -> type[Any] | None:
    """Return the class of options that an annotation allows, or None."""
    arms = (annotation, *typing.get_args(annotation))
    return next((arm for arm in arms if isinstance(arm, type) and issubclass(arm, Settings)), None)


def _names(settings: type[Any]) -> list[str]:
    return [entry.name for entry in dataclasses.fields(settings) if entry.init]


def _settings(name: str, options: Mapping[str, Any], settings: type[Any]) -> Any:
    known, types = _names(settings), _field_types(settings)
    for option in options:
        if option not in known:
            raise UnknownFieldError(
                f"--set {name}: {settings.__name__} has no option {option!r}.{did_you_mean(str(option), known)}"
            )
    return settings(**{o: _typed(f"{name}.{o}", value, types.get(o, Any)) for o, value in options.items()})
