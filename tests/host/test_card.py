"""Everything on a pretend card: the same pictures as on the CPU, without waits or extra launches.

Each way in which a model can lie on a card has to give what the CPU gives; what moves, waits or
is launched at each step is counted against the host's own SD3 model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sd35_core.network.layers import grid_positions
from sd35_core.sampling.step_cache import PACES
from sd35_core.sampling.tiles import tiling

from ..unit.models import TINY, random_inputs, random_model, random_weights
from .cases import (
    KINDS,
    PLANS,
    SMALL,
    Conds,
    adaln_lora,
    area,
    difference,
    hooked,
    masked,
    skipping,
    stock_skipping,
)

try:
    from ..card import device as cards
    from ..card.host import MODES, put
except ImportError as error:
    pytest.skip(f"this torch lets no device be pretended: {error}", allow_module_level=True)

EXACT, NEAR = 2e-5, 2e-3
"""Largest differences to the CPU, of the card that computes on it and of a real one, at fp32."""


class Studio:
    """Draws on the device that the host has at the moment; the latents come back to the CPU."""

    def __init__(self, comfy: SimpleNamespace, small: Path, packed: Any, ksampler: Any, conds: Any):
        self.comfy, self.small, self.packed = comfy, small, packed
        self.ksampler, self.conds = ksampler, conds
        self.attach: Any = None

    def model(self, cache: str = "auto", packed: str = "", dtype: str = "default") -> Any:
        path = self.packed[packed] if packed else self.small
        return self.comfy.loading.load_model(str(path), dtype, cache)

    def stock(self) -> Any:
        return self.comfy.sd.load_diffusion_model(str(self.small))

    def with_lora(self, model: Any) -> Any:
        return self.comfy.sd.load_lora_for_models(model, None, adaln_lora(), 1.0, 0)[0]

    def controlled(self, name: str, **settings: Any) -> dict[str, Any]:
        return self.attach(name, **settings)

    def draw(self, model: Any, **settings: Any) -> Tensor:
        settings = {
            "positive": self.conds.positive,
            "negative": self.conds.negative,
            "latent": {"samples": torch.zeros(1, 16, 16, 16)},
            "steps": 3,
            **settings,
        }
        return self.ksampler(model, **self.moved(settings)).cpu()

    def moved(self, given: Any) -> Any:
        """Where the host keeps what goes between nodes: on the card with --gpu-only."""
        from comfy.model_management import intermediate_device

        if isinstance(given, dict):
            return {key: self.moved(value) for key, value in given.items()}
        if isinstance(given, (list, tuple)):
            return [self.moved(value) for value in given]
        return given.to(intermediate_device()) if isinstance(given, Tensor) else given


def own_sampler(s: Studio, model: Any = None, shift: float = 3.0) -> Tensor:
    latent = s.moved({"samples": torch.zeros(1, 16, 16, 16)})
    pair = s.moved(s.conds.positive), s.moved(s.conds.negative)
    settings = (latent, 5, 3, 4.0, shift, "dpmpp_2m", "beta", 1.0)
    out = s.comfy.sampler.SD35Sampler.execute(model or s.model(), *pair, *settings)
    return out[0]["samples"].cpu()


def step_cache(s: Studio) -> Tensor:
    from sd35_pack.nodes.host.step_cache import with_step_cache

    model = skipping(s.comfy, s.model())
    return s.draw(with_step_cache(model, "fast", PACES["fast"], (0.0, 1.0), None), steps=8)


def bypassed(s: Studio) -> Tensor:
    model = s.comfy.sd.load_bypass_lora_for_models(s.model(), None, adaln_lora(), 1.0, 0)[0]
    return s.draw(model)


def tiled(s: Studio, whole_table: bool = False, **settings: Any) -> Tensor:
    """What SD3.5 Upscale samples with."""
    tiles = tiling((16, 16), 10, 4)
    at_once = s.comfy.tiles.AtOnce(len(tiles))
    return s.draw(s.comfy.tiles.with_tiles(s.model("on"), tiles, at_once, whole_table), **settings)


def delegate(s: Studio, packed: str) -> Tensor:
    """What a node draws with that asks for a model without dynamic weights, as for compiling."""
    model = s.with_lora(s.model(packed=packed))
    if model.is_dynamic():
        model = model.get_non_dynamic_delegate()
    return s.draw(model)


SCENES: dict[str, Callable[[Studio], Tensor]] = {
    "plain": lambda s: s.draw(s.model()),
    "cache": lambda s: s.draw(s.model("on")),
    "no cache": lambda s: s.draw(s.model("off")),
    "batch": lambda s: s.draw(s.model(), latent={"samples": torch.zeros(3, 16, 16, 12)}),
    "skipped layers": lambda s: s.draw(skipping(s.comfy, s.model())),
    "skipped layers, cache": lambda s: s.draw(skipping(s.comfy, s.model("on"))),
    "unequal prompts, cache": lambda s: s.draw(s.model("on"), positive=s.conds.longer),
    "lora": lambda s: s.draw(s.with_lora(s.model())),
    "lora, cache": lambda s: s.draw(s.with_lora(s.model("on"))),
    "lora beside the weights": bypassed,
    "lora of one prompt": lambda s: s.draw(s.model(), positive=hooked(s.comfy, s.conds)),
    "step cache": step_cache,
    "own sampler": own_sampler,
    "tiles": tiled,
    "tiles with their places": lambda s: tiled(s, whole_table=True),
    "tiles, prompts with a place": lambda s: tiled(
        s, positive=area(s.conds.positive, 0.0) + masked(s.conds.longer)
    ),
    "tiles, controlnet": lambda s: tiled(s, whole_table=True, **s.controlled("blur 8b")),
    "fp8 widget": lambda s: s.draw(s.model(dtype="fp8_e4m3fn")),
    "fp8 fast widget": lambda s: s.draw(s.model(dtype="fp8_e4m3fn_fast")),
    "controlnet as ComfyUI": lambda s: s.draw(
        s.model(), **s.controlled("canny 8b", reference="ComfyUI")
    ),
    "controlnet, skipped layers, cache": lambda s: s.draw(
        skipping(s.comfy, s.model("on")), **s.controlled("canny 2b")
    ),
    **{
        f"controlnet {name}": lambda s, name=name: s.draw(s.model(), **s.controlled(name))
        for name in KINDS
    },
    **{
        f"{name}{how}": draw
        for name in PLANS
        for how, draw in {
            "": lambda s, name=name: s.draw(s.model(packed=name)),
            ", lora": lambda s, name=name: s.draw(s.with_lora(s.model(packed=name))),
            ", lora, delegate": lambda s, name=name: delegate(s, name),
            ", lora of one prompt": lambda s, name=name: s.draw(
                s.model(packed=name), positive=hooked(s.comfy, s.conds)
            ),
        }.items()
    },
}


@pytest.fixture
def studio(
    comfy: SimpleNamespace,
    small: Path,
    quantized: Any,  # noqa: F811
    ksampler: Any,
    conds: Conds,
    controlled: Any,  # noqa: F811
) -> Studio:
    made = Studio(comfy, small, quantized, ksampler, conds)
    made.attach = controlled
    return made


@pytest.fixture(scope="session")
def true_positions(base: Path) -> Path:
    """The small model with a true table of positions, as the published ones have."""
    tensors = random_weights(SMALL)
    side = torch.arange(SMALL.pos_embed_max_size, dtype=torch.float32)
    tensors["pos_embed"] = grid_positions(side, side, SMALL.hidden)
    path = base / "models" / "diffusion_models" / "true positions.safetensors"
    save_file({f"model.diffusion_model.{k}": t for k, t in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What the CPU draws, of the scenes that were drawn so far."""
    return {}


@pytest.fixture
def card(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """put(mode): the host is on the card from here to the test's end."""
    from comfy import model_management as management

    def empty() -> None:
        gc.collect()
        management.unload_all_models()
        management.current_loaded_models.clear()

    active = cards.Card()

    def place(mode: str, resident: int | None = None) -> Any:
        empty()
        chosen = MODES[mode] if resident is None else MODES[mode]._replace(dynamic=resident)
        put(monkeypatch.setattr, chosen)
        if not chosen.real:
            active.__enter__()
        cards.counts.clear()
        return cards.counts

    yield place
    empty()
    if active in _get_current_dispatch_mode_stack():
        active.__exit__(None, None, None)
    monkeypatch.undo()


@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("mode", list(MODES))
def test_a_card_draws_what_the_cpu_draws(
    mode: str, scene: str, studio: Studio, card: Any, expected: dict[str, Tensor]
) -> None:
    if MODES[mode].real and not torch.cuda.is_available():
        pytest.skip("there is no card with CUDA here")
    if scene.endswith("delegate") and MODES[mode].dynamic is None:
        pytest.skip("without dynamic VRAM nothing makes a copy without it")
    if scene not in expected:
        expected[scene] = SCENES[scene](studio)
    counts = card(mode)
    most = NEAR if MODES[mode].real else EXACT
    assert difference(SCENES[scene](studio), expected[scene]) < most
    assert MODES[mode].real or counts.launches, "nothing was computed on the card"


def per_step(studio: Studio, model: Any, counts: Any, **settings: Any) -> SimpleNamespace:
    """What one more step of a run costs: launches, waits and bytes carried to the card."""
    studio.draw(model, steps=2, **settings)
    seen = []
    for steps in (6, 10):
        counts.clear()
        studio.draw(model, steps=steps, scheduler="simple", sampler_name="euler", **settings)
        seen.append((counts.launches.total(), counts.waits.total(), counts.uploaded))
    launches, waits, uploaded = ((more - less) / 4 for less, more in zip(*seen))
    return SimpleNamespace(launches=launches, waits=waits, uploaded=uploaded)


def budgets(
    studio: Studio, counts: Any, plain_alone: bool = False
) -> dict[str, tuple[float, float]]:
    """(seen, allowed) of what a step may cost beside the host's own model in the same set-up."""
    s = studio

    def cost(model: Any, **settings: Any) -> SimpleNamespace:
        return per_step(s, model, counts, **settings)

    host, plain = cost(s.stock()), cost(s.model("off"))
    found = {
        "plain: launches": (plain.launches, host.launches),
        "plain: waits": (plain.waits, host.waits),
    }
    if plain_alone:
        return found
    cache = cost(s.model("on"))
    host_slg = cost(stock_skipping(s.stock(), end=1.0))
    slg = cost(skipping(s.comfy, s.model("off"), start=0.0, end=1.0))
    slg_cache = cost(skipping(s.comfy, s.model("on"), start=0.0, end=1.0))
    packed = cost(s.with_lora(s.model("off", packed="int8")))
    hook = cost(s.model("off", packed="int8"), positive=hooked(s.comfy, s.conds))
    control = cost(s.model("off"), **s.controlled("canny 2b"))
    return found | {
        "cache: launches": (cache.launches, plain.launches),
        "cache: waits": (cache.waits, host.waits + 2),
        "cache: bytes": (cache.uploaded, host.uploaded + 1000),
        "skipped layers: launches": (slg.launches, 0.75 * host_slg.launches),
        "skipped layers: waits": (slg.waits, host_slg.waits),
        "skipped layers, cache: waits": (slg_cache.waits, host_slg.waits + 2),
        "packed, lora: waits": (packed.waits, plain.waits),
        "packed, lora: bytes": (packed.uploaded, plain.uploaded),
        "packed, lora of one prompt: bytes": (hook.uploaded, plain.uploaded),
        "controlnet: waits": (control.waits, plain.waits + 2),
    }


def over(seen: dict[str, tuple[float, float]]) -> list[str]:
    return [name for name, (cost, allowed) in seen.items() if cost > allowed]


def test_a_step_waits_launches_and_carries_no_more_than_it_must(
    studio: Studio, card: Any, true_positions: Path
) -> None:
    studio.small = true_positions
    assert not over(budgets(studio, card("whole")))


@pytest.mark.parametrize(("kind", "most"), [("plain", 44), ("dual", 52)])
def test_a_block_launches_no_more_kernels_than_it_did(kind: str, most: int) -> None:
    one_more = {
        "plain": replace(TINY, depth=5),
        "dual": replace(TINY, depth=5, dual_blocks=(0, 1, 2)),
    }
    launched = []
    for config in (TINY, one_more[kind]):
        network, inputs = random_model(config), random_inputs(config)
        with cards.Card():
            network.to(cards.CARD)
            moved = [tensor.to(cards.CARD) for tensor in inputs]
            cards.counts.clear()
            network(*moved)
            assert not cards.counts.waits
            launched.append(cards.counts.launches.total())
    assert launched[1] - launched[0] <= most


def test_dynamic_weights_that_are_used_once_are_the_last_to_stay(studio: Studio, card: Any) -> None:
    """With 70 % of a model on the card the cache spares what is carried there at each step."""
    counts = card("dynamic", resident=32_500_000)
    carried = {
        mode: per_step(studio, studio.model(mode), counts).uploaded for mode in ("off", "on")
    }
    assert carried["on"] < 0.6 * carried["off"]


def test_dynamic_weights_keep_no_shift_of_the_sampler(studio: Studio, card: Any) -> None:
    card("dynamic")
    model = studio.model("off")

    def levels() -> list[float]:
        sampling = model.get_model_object("model_sampling")
        return studio.comfy.samplers.calculate_sigmas(sampling, "simple", 5).tolist()

    before = levels()
    for _ in range(2):
        own_sampler(studio, model, shift=1.0)
        studio.draw(model, steps=2)
        assert levels() == before


LEFT_ON_THE_CPU = {
    "positions": lambda core, _: (
        core.MMDiTX,
        "positions",
        lambda self, rows, columns, like=None: torch.zeros(1, rows * columns, self.config.hidden),
    ),
    "an index": lambda core, _: (
        core,
        "chosen",
        lambda tensor, rows: tensor.index_select(0, torch.tensor(rows)),
    ),
    "the modulation of a step": lambda _, layers: (
        layers,
        "sinusoid",
        lambda timestep, width=256: torch.zeros(len(timestep), width),
    ),
}
"""What a careless change would leave there: it works on a CPU."""
WAITS = {
    "reading a number": lambda x: x if float(x[0, 0, 0]) < 1e9 else x * 0,
    "a mask as an index": lambda x: x[torch.ones(len(x), dtype=torch.bool, device=x.device)],
    "a constant from the CPU": lambda x: (x, torch.zeros(2).to(x.device))[0],
}
"""What a careless change would put into the model; the numbers stay."""


@pytest.mark.parametrize("fault", list(LEFT_ON_THE_CPU))
def test_the_card_finds_what_the_cpu_does_not(
    fault: str, studio: Studio, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd35_pack.sd35_core.network import layers, mmditx

    owner, name, careless = LEFT_ON_THE_CPU[fault](mmditx, layers)
    monkeypatch.setattr(owner, name, careless)
    if owner is layers:
        monkeypatch.setattr(mmditx, name, careless)
    model = studio.model("off")
    studio.draw(skipping(studio.comfy, model), steps=3)
    card("whole")
    with pytest.raises(RuntimeError, match="two devices"):
        studio.draw(skipping(studio.comfy, studio.model("off")), steps=3)


@pytest.mark.parametrize("fault", list(WAITS))
def test_a_wait_that_was_put_in_is_over_the_budget(
    fault: str, studio: Studio, card: Any, monkeypatch: pytest.MonkeyPatch, true_positions: Path
) -> None:
    from sd35_pack.sd35_core.network import layers

    finish = layers.Stream.finish
    monkeypatch.setattr(
        layers.Stream, "finish", lambda self, x, *rest: finish(self, WAITS[fault](x), *rest)
    )
    studio.small = true_positions
    assert "plain: waits" in over(budgets(studio, card("whole"), plain_alone=True))
