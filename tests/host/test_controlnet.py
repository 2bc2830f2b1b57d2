"""ControlNets in the host's sampling: exact, at any place in the host, and refused where wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_core.checkpoint.controlnet import load_controlnet
from sd35_core.checkpoint.loading import load
from sd35_core.encoders.hints import vae_input
from sd35_core.network.controlnet import ControlNetConfig, ControlNetEmbedder
from sd35_core.network.latent import to_model
from sd35_core.pipeline import load_vae
from sd35_core.sampling.guidance import guided
from sd35_core.sampling.samplers import dpmpp_2m
from sd35_core.sampling.schedules import make_sigmas
from tools.parity import weight

from ..conftest import NANO
from .cases import (
    KINDS,
    SMALL,
    Conds,
    area,
    difference,
    hooked,
    masked,
    partially_loaded,
    skipping,
    small_layers,
)

EXACT = 2e-5


@pytest.fixture
def stock_controlled(
    comfy: SimpleNamespace, files: dict[str, Path], vae: Any, picture: Tensor, conds: Conds
) -> Any:
    """The same by the host's own loader and node."""

    def attach(name: str, **settings: Any) -> dict[str, Any]:
        from comfy.controlnet import load_controlnet as load_stock

        loaded = load_stock(str(files[name]))
        values = {
            "positive": conds.positive, "negative": conds.negative, "image": picture,
            "strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "vae": vae, **settings,
        }  # fmt: skip
        out = comfy.stock.ControlNetApplyAdvanced().apply_controlnet(control_net=loaded, **values)
        return {"positive": out[0], "negative": out[1]}

    return attach


@pytest.mark.parametrize("name", list(KINDS))
def test_the_hosts_sampling_gives_what_the_core_gives(
    name: str, small: Path, files: dict[str, Path], ours: Any, ksampler: Any, controlled: Any,
    picture: Tensor, conds: Conds,
) -> None:  # fmt: skip
    base, control, vae = load(small), load_controlnet(files[name]), load_vae(NANO)
    seen = vae_input(picture, control.config.kind, control.config.control_type)
    hint = to_model(vae.encode(((seen + 1) / 2).movedim(-1, 1)))
    context = torch.cat([conds.negative[0][0], conds.positive[0][0]])
    y = torch.cat([c[0][1]["pooled_output"] for c in (conds.negative, conds.positive)])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        both, levels = x.repeat(2, 1, 1, 1), sigma.repeat(2)
        residuals = control(base, both, 1000 * levels, y, hint)
        spread = [0.8 * residuals[i] for i in control.config.spread(base.config.depth)]
        velocity = base(both, 1000 * levels, context, y, residuals=spread)
        uncond, cond = (both - levels[:, None, None, None] * velocity).chunk(2)
        return guided(uncond, cond, 4.0)

    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    latent = dpmpp_2m(denoise, noise, make_sigmas(8, 3.0), {})
    expected = latent / 1.5305 + 0.0609
    found = ksampler(ours, **controlled(name))
    assert difference(found, expected) < EXACT
    assert difference(found, ksampler(ours)) > 1e-2


@pytest.mark.parametrize("name", ["canny 2b", "depth 2b"])
def test_2b_equals_the_hosts_own(
    name: str, ours: Any, stock: Any, ksampler: Any, controlled: Any, stock_controlled: Any
) -> None:
    """On the CPU in fp32 only the hint of canny differs: the host scales it for Large alone."""
    found = ksampler(ours, **controlled(name))
    if name == "depth 2b":
        assert difference(found, ksampler(stock, **stock_controlled(name))) < EXACT
    else:
        assert difference(found, ksampler(stock, **stock_controlled(name))) > 1e-3


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("case", ["square", "wide", "odd", "window", "bf16"])
def test_the_hosts_arithmetic_can_be_chosen(
    name: str, case: str, ours: Any, stock: Any, ksampler: Any, controlled: Any,
    stock_controlled: Any, picture: Tensor, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Then every kind gives what the host's own loader gives on the host's own model."""
    if case == "bf16":  # as on a GPU; the models, loaded before, stay fp32
        import comfy.model_management as management

        monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.bfloat16)
        monkeypatch.setattr(management, "unet_manual_cast", lambda *_: None)
    shapes = {"wide": (12, 20), "odd": (15, 17)}
    height, width = shapes.get(case, (16, 16))
    image = picture.repeat(1, 2, 2, 1)[:, : 8 * height, : 8 * width]
    latent = {"samples": torch.zeros(1, 16, height, width)}
    # half of the way lies on a step of "simple", the border that the two see apart
    sampling = {"latent": latent, "scheduler": "simple"}
    mine = controlled(name, image=image, end=0.5 if case == "window" else 1.0, reference="ComfyUI")
    theirs = stock_controlled(name, image=image, end_percent=0.5 if case == "window" else 1.0)
    expected = ksampler(stock, **sampling, **theirs)
    found = ksampler(ours, **sampling, **mine)
    assert difference(found, expected) < (3e-2 if case == "bf16" else EXACT)
    if case != "bf16":
        own = controlled(name, image=image, end=0.5 if case == "window" else 1.0)
        same = name == "depth 2b" and case != "window"
        assert (difference(ksampler(ours, **sampling, **own), expected) < EXACT) == same


@pytest.mark.parametrize("which", ["ours", "stock"])
def test_it_works_on_either_model_through_either_node(
    which: str, request: pytest.FixtureRequest, comfy: SimpleNamespace, ours: Any, ksampler: Any,
    controlled: Any, files: dict[str, Path], vae: Any, picture: Tensor, conds: Conds,
) -> None:  # fmt: skip
    expected = ksampler(ours, **controlled("blur 8b"))
    model = request.getfixturevalue(which)
    assert difference(ksampler(model, **controlled("blur 8b")), expected) < EXACT
    host = comfy.host_controlnet
    loaded = host.controlnet_from(comfy.loading.read(files["blur 8b"]), host.Options())
    positive, negative = comfy.stock.ControlNetApplyAdvanced().apply_controlnet(
        conds.positive, conds.negative, loaded, picture, 0.8, 0.0, 1.0, vae=vae
    )
    seen = ksampler(model, positive=positive, negative=negative)
    assert difference(seen, expected) < EXACT


def test_strength_zero_an_empty_window_and_a_zero_mask_change_nothing(
    ours: Any, ksampler: Any, controlled: Any, comfy: SimpleNamespace, conds: Conds
) -> None:
    plain = ksampler(ours)
    assert torch.equal(ksampler(ours, **controlled("canny 8b", strength=0.0)), plain)
    assert torch.equal(ksampler(ours, **controlled("canny 8b", start=0.4, end=0.4)), plain)
    both = controlled("canny 8b")
    for conditioning in both.values():
        conditioning[0][1]["control"].strength = 0.0
    assert torch.equal(ksampler(ours, **both), plain)


def test_two_halves_of_a_window_are_the_whole(ours: Any, ksampler: Any, controlled: Any) -> None:
    for middle in (0.25, 0.5, 0.6):
        first = controlled("depth 2b", end=middle)
        both = controlled("depth 2b", start=middle, **first)
        assert torch.equal(ksampler(ours, **both), ksampler(ours, **controlled("depth 2b")))


def test_two_of_them_add_up(ours: Any, ksampler: Any, controlled: Any) -> None:
    half = controlled("blur 8b", strength=0.4)
    twice = controlled("blur 8b", strength=0.4, **half)
    once = ksampler(ours, **controlled("blur 8b"))
    assert difference(ksampler(ours, **twice), once) < EXACT
    mixed = controlled("depth 2b", **controlled("blur 8b"))
    assert difference(ksampler(ours, **mixed), once) > 1e-2


@pytest.mark.parametrize("change", ["lora", "partial", "fp8"])
def test_a_changed_base_is_read_as_it_is(
    change: str, comfy: SimpleNamespace, small: Path, ours: Any, ksampler: Any, controlled: Any,
    conds: Conds, tmp_path: Path,
) -> None:  # fmt: skip
    """8b sees through the base's x_embedder: a base with the change baked in gives the same."""
    settings = controlled("blur 8b")
    if change == "fp8":
        model = comfy.loading.load_model(str(small), "fp8_e4m3fn")
        baked = load_file(small)
        baked = {k: t.to(torch.float8_e4m3fn).float() for k, t in baked.items()}
    elif change == "partial":
        model, baked = partially_loaded(ours, 2_000_000), load_file(small)
    else:
        model, _ = comfy.sd.load_lora_for_models(ours, None, x_embedder_lora(), 1.0, 0)
        baked = {**load_file(small)}
        key = "model.diffusion_model.x_embedder.proj.weight"
        up, down = (x_embedder_lora()[f"lora_unet_x_embedder_proj.lora_{s}.weight"]
                    for s in ("up", "down"))  # fmt: skip
        baked[key] = baked[key] + (up @ down).view_as(baked[key])
    save_file(baked, tmp_path / "baked.safetensors")
    whole = comfy.loading.load_model(str(tmp_path / "baked.safetensors"), "default")
    found, expected = (ksampler(m, **settings) for m in (model, whole))
    assert difference(found, expected) < (1e-3 if change == "fp8" else EXACT)


def x_embedder_lora() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "lora_unet_x_embedder_proj.lora_up.weight": torch.randn(256, 2, generator=generator) / 8,
        "lora_unet_x_embedder_proj.lora_down.weight": torch.randn(2, 64, generator=generator) / 8,
    }


@pytest.mark.parametrize(
    "case",
    ["batch", "odd size", "wide", "cfg 1", "unequal lengths", "areas", "mask", "hook", "range"],
)
def test_it_acts_as_the_hosts_own_wherever_the_host_puts_it(
    case: str, comfy: SimpleNamespace, ours: Any, stock: Any, ksampler: Any, controlled: Any,
    stock_controlled: Any, conds: Conds, picture: Tensor,
) -> None:  # fmt: skip
    """With a 2b depth ControlNet, whose maths the host gets right in fp32 on the CPU."""
    settings: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if case == "batch":
        settings["latent"] = {"samples": torch.zeros(3, 16, 16, 16)}
    elif case == "odd size":
        settings["latent"] = {"samples": torch.zeros(1, 16, 15, 17)}
        given["image"] = picture[:, :120].repeat(1, 1, 2, 1)[:, :, :136]
    elif case == "wide":
        settings["latent"] = {"samples": torch.zeros(1, 16, 12, 20)}
        given["image"] = picture[:, :96].repeat(1, 1, 2, 1)[:, :, :160]
    elif case == "cfg 1":
        settings["cfg"] = 1.0
    elif case == "unequal lengths":
        given["negative"] = conds.longer
    elif case == "hook":
        given["positive"] = hooked(comfy, conds)

    def run(model: Any, attach: Any) -> Tensor:
        attached = attach("depth 2b", **given)
        if case == "areas":
            attached["positive"] = area(attached["positive"], 0.0) + conds.longer
        elif case == "mask":
            attached["positive"] = masked(attached["positive"]) + conds.longer
        elif case == "range":
            attached["positive"] = [
                [c, {**d, "start_percent": 0.1, "end_percent": 0.6}]
                for c, d in attached["positive"]
            ] + conds.longer
        return ksampler(model, **{**attached, **settings})

    assert difference(run(ours, controlled), run(stock, stock_controlled)) < EXACT


def test_a_prompts_zero_mask_hides_the_controlnet(
    ours: Any, ksampler: Any, controlled: Any, conds: Conds
) -> None:
    both = controlled("depth 2b")
    for name in ("positive", "negative"):
        nowhere = {"mask": torch.zeros(1, 128, 128), "mask_strength": 1.0,
                   "set_area_to_bounds": False}  # fmt: skip
        plain = conds.positive if name == "positive" else conds.negative
        both[name] = [[c, {**d, **nowhere}] for c, d in both[name]] + plain
    assert torch.equal(ksampler(ours, **both), ksampler(ours))


@pytest.mark.parametrize("name", ["depth 2b", "blur 8b"])
def test_skip_layer_guidance_beside_it(
    name: str, comfy: SimpleNamespace, ours: Any, ksampler: Any, controlled: Any, conds: Conds
) -> None:
    """Kept or dropped in the skipped pass; a batched twin gives what a pass of its own gives."""
    both = controlled(name)
    keep = ksampler(skipping(comfy, ours), **both)
    drop = ksampler(skipping(comfy, ours, controlnet="drop"), **both)
    assert difference(keep, drop) > 1e-3
    alone = ours.clone()
    alone.set_model_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v}, "attn1_patch")
    assert difference(ksampler(skipping(comfy, alone), **both), keep) < EXACT
    assert difference(ksampler(skipping(comfy, alone, controlnet="drop"), **both), drop) < EXACT


def test_positive_and_negative_run_in_one_batch(
    ours: Any, ksampler: Any, controlled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ours.model.diffusion_model
    seen: list[int] = []
    velocity = network._velocity

    def spy(x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return velocity(x, *rest)

    monkeypatch.setattr(type(network), "_velocity", lambda self, x, *rest: spy(x, *rest))
    ksampler(ours, **controlled("depth 2b"))
    assert set(seen) == {2} and len(seen) == 8


@pytest.mark.parametrize("shape", [(1, 64, 96, 3), (1, 128, 128, 4), (1, 128, 128, 1)])
def test_hints_of_another_size_or_depth_are_brought_to_the_latents(
    shape: tuple[int, ...], ours: Any, ksampler: Any, controlled: Any
) -> None:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    out = ksampler(ours, **controlled("depth 2b", image=image))
    assert torch.isfinite(out).all() and difference(out, ksampler(ours)) > 1e-2


def test_a_hint_for_each_latent(ours: Any, ksampler: Any, controlled: Any) -> None:
    pair = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    latent = {"samples": torch.zeros(2, 16, 16, 16)}
    out = ksampler(ours, latent=latent, **controlled("depth 2b", image=pair))
    for i in range(2):
        same = ksampler(ours, latent=latent, **controlled("depth 2b", image=pair[i : i + 1]))
        assert difference(out[i : i + 1], same[i : i + 1]) < EXACT
    with pytest.raises(Exception, match="got 2 pictures for 3 latents"):
        latent = {"samples": torch.zeros(3, 16, 16, 16)}
        ksampler(ours, latent=latent, **controlled("depth 2b", image=pair))


def test_depth_maps_come_in_either_polarity(
    ours: Any, ksampler: Any, controlled: Any, picture: Tensor
) -> None:
    bright = ksampler(ours, **controlled("depth 2b"))
    dark = ksampler(ours, **controlled("depth 2b", near="near is dark", image=1 - picture))
    assert difference(bright, dark) < EXACT
    assert difference(ksampler(ours, **controlled("depth 2b", near="near is dark")), bright) > 1e-3


def test_another_bases_controlnet_is_refused(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, controlled: Any, files: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    for kind, hidden, words in (
        ("2b", 1536, r"width 1536 \(SD3.5 Medium\), but the model has 256"),
        ("8b", 2432, r"width 2432 \(SD3.5 Large\), but the model has 256"),
    ):
        file = tmp_path / f"{kind}.safetensors"
        save_file(small_layers(kind, hidden), file)
        files[kind] = file
        with pytest.raises(Exception, match=words):
            ksampler(ours, **controlled(kind))
        del files[kind]


def test_layers_that_do_not_divide_the_base_are_refused(
    ours: Any, ksampler: Any, controlled: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    config = ControlNetConfig("2b", 3, SMALL.hidden, SMALL.hidden)
    model = ControlNetEmbedder(config, device="meta")
    tensors = {k: weight(7, k, tuple(t.shape)) for k, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "three.safetensors")
    files["three"] = tmp_path / "three.safetensors"
    with pytest.raises(Exception, match="3 layers, which can't be shared out evenly"):
        ksampler(ours, **controlled("three"))
    del files["three"]


def test_a_missing_vae_and_a_wrong_one_are_explained(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, controlled: Any
) -> None:
    without = controlled("blur 8b", vae=None)
    with pytest.raises(Exception, match="reads its picture through the VAE, and none is connected"):
        ksampler(ours, **without)

    class Wrong:
        def encode(self, pixels: Tensor) -> Tensor:
            return torch.zeros(1, 4, 16, 16)

    with pytest.raises(Exception, match=r"makes latents of shape \[4, 16, 16\]"):
        ksampler(ours, **controlled("blur 8b", vae=Wrong()))


def test_a_base_that_is_not_sd3_is_explained(comfy: SimpleNamespace) -> None:
    with pytest.raises(Exception, match="is for Stable Diffusion 3.5, but the model is a Linear"):
        comfy.host_controlnet.base_of(torch.nn.Linear(1, 1), torch.float32)


def hint_of(comfy: SimpleNamespace, files: dict[str, Path], name: str, **settings: Any) -> Any:
    options = comfy.host_controlnet.Options(settings.pop("near", "near is bright"))
    net = comfy.host_controlnet.controlnet_from(comfy.loading.read(files[name]), options)
    values = {
        "kind": "as the ControlNet", "blur_radius": 24.0, "canny_low": 0.1, "canny_high": 0.2,
        "depth_map": "near is bright", "normalise": True, **settings,
    }  # fmt: skip
    return comfy.controlnet.SD35ControlHint.execute(control_net=net, **values).result


def test_a_hint_is_made_for_the_controlnets_own_kind(
    comfy: SimpleNamespace, files: dict[str, Path], picture: Tensor
) -> None:
    noise = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(0))
    blur, _ = hint_of(comfy, files, "blur 8b", image=noise)
    assert blur.shape == noise.shape and blur.std() < 0.3 * noise.std()
    assert torch.equal(hint_of(comfy, files, "blur 8b", image=noise, blur_radius=0)[0], noise)
    square = torch.zeros(1, 128, 128, 3)
    square[:, 32:96, 32:96] = 1
    canny, seen = hint_of(comfy, files, "canny 8b", image=square)
    assert set(canny.unique().tolist()) == {0.0, 1.0} and 0.01 < canny.mean() < 0.1
    assert torch.equal(canny, seen)
    depth, seen = hint_of(comfy, files, "depth 2b", image=0.2 + 0.1 * picture)
    assert depth.amin() == 0 and depth.amax() == 1
    assert torch.allclose(seen, 1 - depth, atol=1e-6)
    dark, same = hint_of(
        comfy, files, "depth 2b", image=1 - (0.2 + 0.1 * picture), depth_map="near is dark"
    )
    assert torch.allclose(dark, depth, atol=1e-5) and torch.allclose(same, seen, atol=1e-5)


def test_the_hosts_own_controlnet_for_another_model_is_refused_before_the_run(
    comfy: SimpleNamespace, files: dict[str, Path], vae: Any, picture: Tensor, conds: Conds
) -> None:
    import comfy.controlnet as host_controlnet
    import comfy.latent_formats as formats

    def apply(control_net: Any) -> Any:
        node = comfy.controlnet.SD35ControlNetApply
        prompts = conds.positive, conds.negative
        return node.execute(*prompts, control_net, vae, picture, 1.0, 0.0, 1.0).result

    with pytest.raises(Exception, match="a ControlNet, one of an older model, and this node"):
        apply(host_controlnet.ControlNet(None))
    flux = host_controlnet.ControlNet(None, latent_format=formats.Flux())
    with pytest.raises(Exception, match="one made for Flux"):
        apply(flux)
    flux.set_cond_hint(picture.movedim(-1, 1), 1.0, (0.0, 1.0))
    assert comfy.facts.control_fact(flux).foreign == "made for Flux", "the check says so too"
    assert apply(host_controlnet.load_controlnet(str(files["canny 8b"])))


def test_another_kind_of_hint_is_refused(
    comfy: SimpleNamespace, files: dict[str, Path], picture: Tensor
) -> None:
    with pytest.raises(Exception, match="kind is canny, but the ControlNet was trained on depth"):
        hint_of(comfy, files, "depth 2b", image=picture, kind="canny")
    with pytest.raises(Exception, match="low threshold is 0.5 and the high one 0.2"):
        hint_of(comfy, files, "canny 2b", image=picture, canny_low=0.5)
