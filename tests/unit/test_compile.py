"""torch.compile takes the whole network as one graph, once for all steps; training its blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.checkpoint.tensor_file import read_file
from sd35_core.network.mmditx import Twin
from sd35_core.network.modulation_cache import ModulationCache
from sd35_core.training.config import TrainingConfig
from sd35_core.training.run import Run

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


def test_training_compiles_blocks_which_take_pictures_of_every_size(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled as a whole, torch's own kernels for pictures of four sizes took one for another.
    Those take minutes to make, so here is counted what they would be made of."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    (examples,) = config.examples
    known, _ = read_file(Path(examples))
    files = []
    for size in ((16, 16), (16, 12), (12, 16), (20, 12)):
        latents = torch.randn(8, 16, *size, generator=torch.Generator().manual_seed(0)).half()
        files.append(tmp_path / f"{size[0]}x{size[1]}.safetensors")
        save_file({**known, "latents": latents}, files[-1])
    config = replace(
        config, examples=tuple(map(str, files)), pos_embed_max_size=12, random_crops=0.5,
        output=str(tmp_path / "run"),
    )  # fmt: skip
    plain, compiled = Run(config), Run(replace(config, compile=True))
    for _ in range(8):
        assert compiled.advance() == pytest.approx(plain.advance(), rel=1e-4)
    kinds_of_blocks, lengths = 2, 2  # the last one; first as it comes, then any
    assert len(graphs) == kinds_of_blocks * lengths
