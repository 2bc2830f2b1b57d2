"""torch.compile takes the whole network as one graph, once for all steps."""

from __future__ import annotations

import pytest
import torch

from sd35_core.network.mmditx import Twin
from sd35_core.network.modulation_cache import ModulationCache

from .models import random_inputs, random_model

TIMES = (1000.0, 640.0, 222.0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("twins", [[], [Twin(1, frozenset({1, 2}), source=0)]])
def test_one_graph_serves_every_step(cached: bool, twins: list[Twin]) -> None:
    torch._dynamo.reset()
    network, cache = random_model(), ModulationCache()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=keep, fullgraph=True)
    x, timestep, context, y = random_inputs(batch=2)
    ahead = torch.tensor(TIMES)
    for time in TIMES:
        call = x * time, torch.full_like(timestep, time), context, y
        known = cache.look_up(network, call[1], y, ahead) if cached else None
        seen = compiled(*call, twins=twins, modulations=known)
        assert torch.allclose(seen, network(*call, twins=twins), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
