"""SD35Upscale: tiles that are drawn together, through the real host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd35_core.sampling.tiles import tiling

from .cases import Conds, area, cases, count_calls, difference, lora, skipping

SETTINGS = {
    "seed": 3, "factor": 2.0, "tile": 128, "overlap": 32, "denoise": 0.5, "steps": 4, "cfg": 4.0,
    "shift": 3.0, "sampler": "dpmpp_2m", "schedule": "normal", "strength": 0.8, "end": 0.8,
    "blur": 8.0, "positions": "own",
}  # fmt: skip
PLAIN = {name: case for name, case in cases(Conds()).items() if name != "areas"}
"""Without areas: in tiles they are masks, so that each prompt sees the whole tile."""
PETABYTE = 10**15


@pytest.fixture
def told(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node says."""
    said: list[str] = []
    monkeypatch.setattr(comfy.upscale, "told", lambda text, node_id: said.append(text) or {})
    return said


@pytest.fixture
def upscaled(
    comfy: SimpleNamespace,
    ours: Any,
    vae: Any,
    conds: Conds,
    picture: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """(model, image, **widgets) -> the larger picture."""
    outside_a_prompt = SimpleNamespace(unique_id=None)
    monkeypatch.setattr(comfy.upscale.SD35Upscale, "hidden", outside_a_prompt)

    def run(model: Any = ours, image: Tensor = picture, **changes: Any) -> Tensor:
        inputs = {"positive": conds.positive, "negative": conds.negative, **SETTINGS, **changes}
        return comfy.upscale.SD35Upscale.execute(model, vae=vae, image=image, **inputs).result[0]

    return run


@pytest.fixture
def in_tiles(comfy: SimpleNamespace) -> Any:
    """(model, tiling, whole_table) -> the model that draws tile by tile."""

    def make(model: Any, tiles: Any, whole_table: bool = False) -> Any:
        return comfy.tiles.with_tiles(model, tiles, comfy.tiles.AtOnce(len(tiles)), whole_table)

    return make


@pytest.fixture
def blur(comfy: SimpleNamespace, files: dict[str, Path]) -> Any:
    """The blur ControlNet of the random model."""
    options = comfy.host_controlnet.Options()
    return comfy.host_controlnet.controlnet_from(comfy.loading.read(files["blur 8b"]), options)


def two_prompts(conds: Conds) -> list[Any]:
    return area(conds.positive, 0.0) + area(conds.longer, 0.5)


def test_one_tile_is_a_plain_image_to_image_run(
    comfy: SimpleNamespace, ours: Any, vae: Any, conds: Conds, picture: Tensor, upscaled: Any
) -> None:
    latent = {"samples": vae.encode(picture)}
    settings = (3, 4, 4.0, 3.0, "dpmpp_2m", "normal", 0.5)
    out = comfy.sampler.SD35Sampler.execute(ours, conds.positive, conds.negative, latent, *settings)
    plain = vae.decode(out.result[0]["samples"])
    assert torch.equal(upscaled(factor=1.0), plain)


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("cache", ["on", "off"])
def test_one_tile_through_the_blending_is_any_plain_run_bit_for_bit(
    comfy: SimpleNamespace, small: Path, ksampler: Any, in_tiles: Any, case: str, cache: str
) -> None:
    model = skipping(comfy, comfy.loading.load_model(str(small), "default", cache))
    latent = PLAIN[case].get("latent", {"samples": torch.zeros(1, 16, 16, 16)})["samples"]
    tiles = tiling((latent.shape[2], latent.shape[3]), 64, 8)
    tiled = in_tiles(model, tiles, whole_table=True)
    assert torch.equal(ksampler(tiled, **PLAIN[case]), ksampler(model, **PLAIN[case]))


def test_a_controlnet_on_one_tile_is_the_plain_run_bit_for_bit(
    ksampler: Any, ours: Any, controlled: Any, in_tiles: Any
) -> None:
    steered = controlled("blur 8b")
    tiled = in_tiles(ours, tiling((16, 16), 16, 8), whole_table=True)
    assert torch.equal(ksampler(tiled, **steered), ksampler(ours, **steered))


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("with_control", [False, True], ids=["plain", "controlnet"])
def test_tiles_at_once_and_one_by_one_are_the_same(
    comfy: SimpleNamespace,
    small: Path,
    blur: Any,
    upscaled: Any,
    picture: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    with_control: bool,
) -> None:
    model = skipping(comfy, comfy.loading.load_model(str(small), "default", cache))
    two = torch.cat([picture, picture.flip(1)])
    control_net = blur if with_control else None
    together = upscaled(model, two, steps=2, control_net=control_net)
    monkeypatch.setattr(comfy.tiles.AtOnce, "tiles", lambda *_: 1)
    apart = upscaled(model, two, steps=2, control_net=control_net)
    assert difference(apart, together) < 1e-4
    if with_control:
        assert difference(upscaled(model, two, steps=2), together) > 1e-3


def test_tiles_of_one_content_are_drawn_alike_where_they_overlap_too(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, in_tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = tiling((16, 40), 16, 4)
    assert tiles.columns == (0, 12, 24)
    period = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(1))
    repeated = period.repeat(1, 1, 1, 4)[..., :40]
    monkeypatch.setattr("comfy.sample.prepare_noise", lambda *_: repeated)
    latent = {"samples": torch.zeros(1, 16, 16, 40)}
    drawn = ksampler(in_tiles(ours, tiles), latent=latent, steps=1)
    inner = slice(4, 12)  # of a tile, where no other one reaches
    one, two, three = (drawn[..., start : start + 16][..., inner] for start in tiles.columns)
    assert difference(two, one) < 1e-5 and difference(three, one) < 1e-5
    assert difference(drawn[..., 24:28], drawn[..., 12:16]) < 1e-5


@pytest.mark.parametrize("size", [(128, 128), (75, 99), (1, 64), (40, 40)])
def test_every_size_comes_out_times_the_factor(
    upscaled: Any, picture: Tensor, size: tuple[int, int]
) -> None:
    found = upscaled(image=picture[:, : size[0], : size[1]], steps=1)
    assert found.shape == (1, 2 * size[0], 2 * size[1], 3)
    assert found.isfinite().all()


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_are_enlarged(
    upscaled: Any, picture: Tensor, channels: int
) -> None:
    image = picture[..., :1].repeat(1, 1, 1, channels)
    found = upscaled(image=image, steps=1)
    assert found.shape == (1, 256, 256, 3) and found.isfinite().all()


def test_longest_side_counts_in_place_of_the_factor(upscaled: Any, picture: Tensor) -> None:
    found = upscaled(image=picture[:, :96], steps=1, longest_side=200)
    assert found.shape[1:3] == (150, 200)


def test_what_is_black_in_the_mask_is_enlarged_and_no_more(
    comfy: SimpleNamespace, upscaled: Any, picture: Tensor
) -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, 40:100, 40:100] = 1
    found = upscaled(mask=mask, denoise=1.0)
    plain = comfy.tiles.enlarged(picture, 256, 256)
    inside = comfy.upscale.enlarged_mask(mask, 256, 256) > 0
    assert torch.equal(found[~inside], plain[~inside])
    assert difference(found[inside], plain[inside]) > 0.1


def test_a_prompt_of_an_area_acts_on_its_tiles_alone(
    ours: Any, ksampler: Any, in_tiles: Any, conds: Conds, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(1, 16, 16, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(
        "comfy.sample.prepare_noise", lambda latent, *_: noise[..., : latent.shape[3]]
    )
    wide, narrow = ({"samples": torch.zeros(1, 16, 16, side)} for side in (32, 16))
    tiled = in_tiles(ours, tiling((16, 32), 16, 0))
    both = ksampler(tiled, latent=wide, positive=two_prompts(conds))
    alone = ksampler(ours, latent=narrow)
    assert difference(both[..., :16], alone) < 1e-5
    noise = noise.roll(16, dims=3)
    alone = ksampler(ours, latent=narrow, positive=conds.longer)
    assert difference(both[..., 16:], alone) < 1e-5


def test_a_lora_and_a_foreign_sampler_and_schedule_act(
    comfy: SimpleNamespace, ours: Any, upscaled: Any
) -> None:
    plain = upscaled(sampler="euler")
    changed = comfy.sd.load_lora_for_models(ours, None, lora("kohya"), 1.0, 0)[0]
    assert difference(upscaled(changed, sampler="euler"), plain) > 1e-3
    foreign = {
        "custom_sampler": comfy.samplers.sampler_object("euler"),
        "sigmas": comfy.sampler.SD35Sigmas.execute(4, 3.0, "normal", 0.5).result[0],
    }
    widgets = {"steps": 9, "schedule": "beta", "denoise": 1.0}
    assert torch.equal(upscaled(**foreign, **widgets), plain)


def test_positions_of_the_whole_end_with_the_table(upscaled: Any) -> None:
    own = upscaled(steps=1)
    assert difference(upscaled(steps=1, positions="of the whole"), own) > 1e-3
    with pytest.raises(Exception, match="512"):
        upscaled(steps=1, factor=5.0, positions="of the whole")


def at_call(model: Any, number: int, do: Callable[[], Any]) -> None:
    """Do something at one of the network's own calls."""
    calls = count_calls(model)

    def act(*_: Any) -> None:
        if len(calls) == number:
            do()

    model.model.diffusion_model.x_embedder.register_forward_hook(act)


def test_cancelling_ends_at_the_next_tile(
    comfy: SimpleNamespace, ours: Any, upscaled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(comfy.tiles.AtOnce, "tiles", lambda *_: 1)
    calls = count_calls(ours)
    at_call(ours, 3, management.interrupt_current_processing)
    with pytest.raises(management.InterruptProcessingException):
        upscaled(cfg=1.0)
    assert len(calls) == 3
    assert upscaled(cfg=1.0).isfinite().all()


def test_without_memory_for_all_tiles_fewer_are_drawn_at_once(
    ours: Any, upscaled: Any, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = upscaled(cfg=1.0)
    assert "9 tiles of 128x128" in told[-1] and "memory" not in told[-1]
    calls = count_calls(ours)

    def greedy(module: Any, inputs: Any, output: Tensor) -> None:
        if len(output) > 2:
            torch.empty(PETABYTE)

    hook = ours.model.diffusion_model.x_embedder.register_forward_hook(greedy)
    found = upscaled(cfg=1.0)
    hook.remove()
    assert difference(found, expected) < 1e-4
    assert calls[:3] == [9, 4, 2]
    assert told[-1].endswith("Out of memory with 4 tiles at once; went on with 2.")


def test_one_tile_without_memory_is_an_error_in_words(ours: Any, upscaled: Any) -> None:
    at_call(ours, 1, lambda: torch.empty(PETABYTE))
    with pytest.raises((RuntimeError, MemoryError), match="Out of memory while sampling"):
        upscaled(factor=1.0, cfg=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"longest_side": 64}, "64, and the picture is 128x128"),
        ({"longest_side": 20000}, "16384 pixels a side"),
        ({"overlap": 126}, "overlap is 15 cells of a tile of 16"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    upscaled: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        upscaled(**changes)


def test_a_controlnet_of_another_loader_on_a_prompt_is_refused(upscaled: Any, conds: Conds) -> None:
    import comfy.controlnet

    foreign = comfy.controlnet.ControlBase()
    prompt = [[text, {**extra, "control": foreign}] for text, extra in conds.positive]
    with pytest.raises(Exception, match="would steer every tile by the whole picture"):
        upscaled(positive=prompt)


def test_positions_of_the_whole_need_our_model(upscaled: Any, stock: Any) -> None:
    with pytest.raises(Exception, match="need a model from SD3.5 Loader"):
        upscaled(stock, positions="of the whole")


def test_a_depth_map_on_the_prompts_is_cut_for_the_tiles(upscaled: Any, controlled: Any) -> None:
    steered = controlled("depth 2b")
    assert difference(upscaled(steps=1, **steered), upscaled(steps=1)) > 1e-3


def test_a_depth_controlnet_is_refused(
    comfy: SimpleNamespace, files: dict[str, Path], upscaled: Any
) -> None:
    options = comfy.host_controlnet.Options()
    depth = comfy.host_controlnet.controlnet_from(comfy.loading.read(files["depth 2b"]), options)
    with pytest.raises(Exception, match="for depth, which can't be made of a picture"):
        upscaled(control_net=depth)
