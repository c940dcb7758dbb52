"""Saving and loading adapters: keys, state dicts, files, folders of several adapters."""

from inlay.checkpoint.card import model_card
from inlay.checkpoint.files import load_adapter_files, load_peft_weights
from inlay.checkpoint.keys import adapter_slots
from inlay.checkpoint.load import load_all
from inlay.checkpoint.manifest import Manifest, read_manifest
from inlay.checkpoint.merged import adapter_tensors, iter_merged
from inlay.checkpoint.save import save_adapters
from inlay.checkpoint.state_dict import get_peft_model_state_dict, load_tensors, set_peft_model_state_dict

__all__ = [
    "Manifest",
    "adapter_slots",
    "adapter_tensors",
    "get_peft_model_state_dict",
    "iter_merged",
    "load_adapter_files",
    "load_all",
    "load_peft_weights",
    "load_tensors",
    "model_card",
    "read_manifest",
    "save_adapters",
    "set_peft_model_state_dict",
]
