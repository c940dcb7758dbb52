"""A mixed batch in compiled code: one operator a layer, whatever the order of its adapters."""

from __future__ import annotations

from typing import Any

import torch
from mixed_batches import MIXED, TOLERANCE, assert_equal, batch, run, subject
from torch import Tensor, nn

from inlay.core.policy import PEFT
from inlay.core.state import BASE
from inlay.kernels.routed_op import add_routed


def compiled(model: nn.Module) -> tuple[Any, list[Any]]:
    """The model compiled whole, and the graphs made for it."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def make(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=make, dynamic=False), graphs


def test_compiled_one_graph_serves_any_order_of_a_set_of_adapters() -> None:
    model, state = subject()
    traced, graphs = compiled(model)
    x = batch(torch.float64, 3)
    arrangements = [MIXED, MIXED[::-1], ("b", "b", "b", BASE, "a", "c", "elsewhere", "c")]
    for names in arrangements:
        assert_equal(run(model, state, x, names, forward=traced), run(model, state, x, names), 1e-12)
    assert len(graphs) == 1
    names = ("a", "b") * 4
    found = run(model, state, x, names, forward=traced)
    assert_equal(found, run(model, state, x, names), 1e-12)
    assert found["first.lora_A.c.weight"] is None  # who has no sample gets no gradient, rather than one of zeros
    assert len(graphs) == 2
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("add_routed" in target for target in called) == 2


def test_compiled_with_products_in_the_dtype_of_the_adapter() -> None:
    model, state = subject(torch.bfloat16, PEFT)
    traced, _ = compiled(model)
    x = batch(torch.bfloat16, 3)
    assert_equal(run(model, state, x, forward=traced), run(model, state, x), TOLERANCE[torch.bfloat16])


def test_the_operator_is_a_good_citizen() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    A, B = [random(2, 5), random(3, 5)], [random(4, 2), random(4, 3)]
    rows = torch.tensor([2, 0, 1, 2])
    torch.library.opcheck(add_routed, (random(4, 3, 4), random(4, 3, 5), A, B, [0.5, 2.0], rows, [0, 2]))
    torch.library.opcheck(add_routed, (random(4, 4), random(4, 5).detach(), A, B, [0.5, 2.0], rows, [0, 2]))
