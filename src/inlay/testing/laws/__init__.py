"""The laws: what holds for every method on every layer. Each is a function of a trial and raises ``LawError``."""

from __future__ import annotations

from collections.abc import Callable

from inlay.testing.laws import contexts, forward, keeping
from inlay.testing.subject import Trial

__all__ = ["LAWS"]

LAWS: dict[str, Callable[[Trial], None]] = {
    law.__name__: law
    for law in (
        forward.forward_is_the_layer_with_rewritten_weights,
        forward.two_methods_on_one_layer,
        forward.fresh_adapter_changes_nothing,
        forward.same_seed_gives_the_same_adapter,
        forward.switched_off_it_is_the_base,
        keeping.merge_then_unmerge_is_the_original,
        keeping.merged_and_switched_off_is_the_base,
        keeping.state_dict_into_an_adapter_of_another_name,
        keeping.saved_is_all_that_trains,
        keeping.copy_is_equal_and_independent,
        keeping.pickled_is_equal_and_independent,
        contexts.compiled_equals_eager,
        forward.gradients_are_those_through_the_rewritten_weight,
        forward.numeric_gradient,
        keeping.eject_gives_back_the_model,
        contexts.each_sample_as_if_alone,
        contexts.checkpointed_equals_plain,
    )
}
"""Every law by name."""
