"""The network: rows with skipped layers, residuals, sizes, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd35_core.errors import SettingError
from sd35_core.network.layers import JointBlock
from sd35_core.network.mmditx import MMDiTX, Twin

from .models import TINY, random_inputs, random_model


def close(seen: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((seen - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("layers", [{0}, {2}, {1, 2}, {3}, {0, 3}, {0, 1, 2, 3}])
def test_a_twin_equals_its_source_run_alone_with_the_layers_skipped(layers: set[int]) -> None:
    model, inputs = random_model(), random_inputs(batch=2)
    skipped = frozenset(layers)
    tripled = [torch.cat([t, t[1:]]) for t in inputs]
    out = model(*tripled, twins=[Twin(2, skipped, source=1)])
    alone = model(*(t[1:] for t in inputs), twins=[Twin(0, skipped)])
    assert close(out[:2], model(*inputs))
    assert close(out[2:], alone)


def test_twins_with_different_layers_share_one_batch() -> None:
    model, inputs = random_model(), random_inputs(batch=1)
    doubled = [t.repeat(3, *[1] * (t.ndim - 1)) for t in inputs]
    first, second = frozenset({1}), frozenset({2, 3})
    out = model(*doubled, twins=[Twin(0, first, source=1), Twin(2, second, source=1)])
    for row, layers in ((0, first), (2, second)):
        assert close(out[row : row + 1], model(*inputs, twins=[Twin(0, layers)]))


def test_a_twin_joins_at_its_first_skipped_layer() -> None:
    model = random_model()
    inputs = [t.repeat(3, *[1] * (t.ndim - 1)) for t in random_inputs(batch=1)]
    passes: list[int] = []

    def count(index: int, block: JointBlock, context, x, *rest):  # noqa: ANN001, ANN002, ANN202
        passes.append(len(x))
        return block(context, x, *rest)

    model(*inputs, run_block=count, twins=[Twin(2, frozenset({2}), source=1)])
    assert passes == [2, 2, 2, 3]


def test_a_row_takes_no_residual_at_a_layer_it_skips() -> None:
    model, inputs = random_model(), random_inputs(batch=2)
    residual = torch.randn(2, 24, TINY.hidden, generator=torch.Generator().manual_seed(0))
    residuals = [None, residual]
    skipped = Twin(1, frozenset({1}))
    out = model(*inputs, residuals=residuals, twins=[skipped])
    assert close(out[:1], model(*(t[:1] for t in inputs), residuals=[None, residual[:1]]))
    assert close(out[1:], model(*(t[1:] for t in inputs), twins=[Twin(0, frozenset({1}))]))


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_rows_are_chosen_without_an_index_that_a_card_would_wait_for() -> None:
    model, inputs = random_model(), random_inputs(batch=3)
    residuals = [torch.ones(3, 24, TINY.hidden)] * TINY.depth
    twins = [Twin(0, frozenset({1, 3}), source=2), Twin(1, frozenset({2}))]
    with Seen() as seen:
        model(*inputs, residuals=residuals, twins=twins)
    assert "aten.cat.default" in seen.names
    waiting = {"aten.index.Tensor", "aten.index_copy.default", "aten.lift_fresh.default",
               "aten._local_scalar_dense.default", "aten.index_select.default"}  # fmt: skip
    assert not seen.names & waiting


def test_residuals_of_another_precision_leave_the_networks_as_it_is() -> None:
    model = random_model().to(torch.bfloat16)
    inputs = [t.to(torch.bfloat16) for t in random_inputs(batch=1)]
    types: list[torch.dtype] = []

    def record(index: int, block: JointBlock, context, x, *rest):  # noqa: ANN001, ANN002, ANN202
        types.append(x.dtype)
        return block(context, x, *rest)

    residuals = [torch.ones(1, 24, TINY.hidden, dtype=torch.float32)] * TINY.depth
    model(*inputs, residuals=residuals, run_block=record)
    assert set(types) == {torch.bfloat16}


def test_an_odd_latent_is_padded_and_cut() -> None:
    assert random_model()(*random_inputs(size=(7, 9))).shape == (2, 16, 7, 9)


def test_a_latent_beyond_the_position_table_is_refused_with_both_sizes() -> None:
    with pytest.raises(SettingError, match="544x128 pixels.*256x256"):
        random_model()(*random_inputs(size=(16, 68)))


def test_positions_are_the_centre_of_the_table() -> None:
    model = random_model()
    table = model.pos_embed.reshape(16, 16, -1)
    assert torch.equal(model.positions(4, 6)[0], table[6:10, 5:11].reshape(24, -1))


def test_layers_come_from_the_given_operations() -> None:
    class Counted(nn.Linear):
        made = 0

        def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
            super().__init__(*args, **kwargs)
            Counted.made += 1

    class Operations:
        Linear, Conv2d, LayerNorm, RMSNorm = Counted, nn.Conv2d, nn.LayerNorm, nn.RMSNorm

    model = MMDiTX(TINY, Operations)
    assert Counted.made == sum(isinstance(m, nn.Linear) for m in model.modules())
    assert {k.rsplit(".", 1)[1] for k, _ in model.named_parameters()} == {"weight", "bias"}
