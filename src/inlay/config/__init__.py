"""Configurations: base classes, shared fields, files, default targets."""

from inlay.config.base import COMPATIBLE_PEFT_VERSION, PeftConfig
from inlay.config.checking import check_field, field_hints
from inlay.config.defaults import default_feedforward, default_targets, families
from inlay.config.fields import (
    ALL_LINEAR,
    BlockTargetField,
    BlockTargetFields,
    ExcludeField,
    FanInFanOutField,
    LayerFields,
    PatternFields,
    RankPatternField,
    SavedModulesField,
    TargetField,
    TargetFields,
    bias_setting,
    check_pattern,
    check_pattern_keys,
    dropout_setting,
)
from inlay.config.files import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    read_json_object,
    resolve_file,
    write_atomically,
)
from inlay.config.method_fields import (
    CayleyFields,
    FrequencyFields,
    LycorisFields,
    MatrixTargetField,
    MatrixTargetFields,
    ProjectionFields,
    SavedProjectionFields,
    check_one_given,
)
from inlay.config.prompt import PromptLearningConfig
from inlay.config.settings import Settings, setting, settings
from inlay.config.types import PeftType, TaskType

__all__ = [
    "ALL_LINEAR",
    "COMPATIBLE_PEFT_VERSION",
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "BlockTargetField",
    "BlockTargetFields",
    "CayleyFields",
    "ExcludeField",
    "FanInFanOutField",
    "FrequencyFields",
    "LayerFields",
    "LycorisFields",
    "MatrixTargetField",
    "MatrixTargetFields",
    "PatternFields",
    "PeftConfig",
    "PeftType",
    "ProjectionFields",
    "PromptLearningConfig",
    "RankPatternField",
    "SavedModulesField",
    "SavedProjectionFields",
    "Settings",
    "TargetField",
    "TargetFields",
    "TaskType",
    "bias_setting",
    "check_field",
    "check_one_given",
    "check_pattern",
    "check_pattern_keys",
    "default_feedforward",
    "default_targets",
    "dropout_setting",
    "families",
    "field_hints",
    "read_json_object",
    "resolve_file",
    "setting",
    "settings",
    "write_atomically",
]
