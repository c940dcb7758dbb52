"""What PEFT's users and integrations call on one layer; all of it writes through to state and entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.core.follow import Follower
from inlay.errors import MergeError, UnsupportedError

if TYPE_CHECKING:
    from inlay.core.entry import Entry

__all__ = ["LayerSurface"]


class LayerSurface(Follower):
    """Mixed into the adapted layer, which has ``entries``."""

    if TYPE_CHECKING:
        entries: dict[str, tuple[Entry, ...]]
        base_layer: nn.Module
        _merged: tuple[str, ...]

        def restore(self) -> None: ...

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters merged into the base layer, in the order of merging."""
        return list(self._merged)

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def disable_adapters(self) -> bool:
        return not self.enabled

    def get_base_layer(self) -> nn.Module:
        """Return the untouched layer."""
        base = self.base_layer
        while isinstance(base, LayerSurface):
            base = base.base_layer
        return base

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate adapters on this layer only, in this order; it no longer follows the model.

        Args:
            adapter_names: name or names.
            inference_mode: leave gradients alone. Otherwise the activated ones train here and the others do not.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.override(active=names)
        if not inference_mode:
            self._train_only(names)

    def _train_only(self, names: tuple[str, ...]) -> None:
        for name, entries in self.entries.items():
            for entry in entries:
                for tensor, trainable in entry.parameters(self):
                    tensor.requires_grad_(trainable and name in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch every adapter of this layer on or off; it no longer follows the model's switch."""
        self.override(enabled=enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop what an adapter has on this layer; elsewhere it stays.

        Raises:
            MergeError: it is merged here.
        """
        from inlay.core.hanging import dismount

        if adapter_name in self._merged:
            raise MergeError(f"adapter {adapter_name!r} is merged into this layer; unmerge it before deleting it")
        dismount(self, adapter_name)
        self.state.touch()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into this layer only, by default the active ones; always checked for finiteness."""
        from inlay.core.merge import merge_layers

        merge_layers([self], list(self.active) if adapter_names is None else adapter_names)  # type: ignore[list-item]

    def unmerge(self) -> None:
        """Put this layer's original weight back, bitwise."""
        self.restore()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling here to ``scale`` times what its config says."""
        for entry in self.entries.get(adapter, ()):
            self._scale(entry, float(entry.method.options(entry.site).get("scaling", 1.0)) * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters here."""
        for name in self.active:
            for entry in self.entries.get(name, ()):
                self._scale(entry, entry.options.get("scaling", 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters here, or without ``scale`` put back what their configs say."""
        for name in self.active:
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                for entry in self.entries.get(name, ()):
                    self._scale(entry, entry.options.get("scaling", 1.0) / scale)

    def _scale(self, entry: Entry, scaling: Any) -> None:
        if "scaling" not in entry.options:
            raise UnsupportedError(f"adapter {entry.name!r} ({type(entry.method).__name__}) has no scaling to change")
        entry.options["scaling"] = scaling
        self.state.touch()
