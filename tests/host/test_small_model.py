"""The shipped model: what training and drawing without a host compute is what the host computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sd35_core.pipeline import Pipeline, Settings
from tools.nano.judge import judge
from tools.nano.pictures import emoji_folder
from tools.nano.prepare import clip_tokenizer
from tools.nano.scenes import PLACES, parse, render
from tools.nano.scoring import draw, judge_all, unseen

from ..conftest import NANO
from .cases import difference

WHOLE = {"clip_l": None, "clip_g": None, "t5xxl": None}
CAPTION = "a small avocado at the top left on a sky blue background"


@pytest.fixture(scope="module")
def pipeline(comfy: SimpleNamespace) -> Pipeline:
    return Pipeline.load(NANO, clip_tokenizer())


def host_encoding(comfy: SimpleNamespace, caption: str) -> list[Any]:
    clip = comfy.text.clip_from(comfy.loading.read(NANO), WHOLE)
    context, pooled = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
    return [[context, {"pooled_output": pooled}]]


@pytest.mark.parametrize("caption", [CAPTION, "", "a big owl, purple background", "owl " * 90])
def test_text_is_encoded_alike(comfy: SimpleNamespace, pipeline: Pipeline, caption: str) -> None:
    ((context, extra),) = host_encoding(comfy, caption)
    seen, pooled = pipeline.encode([caption])
    if len(caption.split()) < 70:
        assert difference(seen, context) < 1e-5
        assert difference(pooled, extra["pooled_output"]) < 1e-5
    else:
        assert seen.shape[1] < context.shape[1], "without a host a long caption is cut"


def test_latents_are_decoded_and_encoded_alike(comfy: SimpleNamespace, pipeline: Pipeline) -> None:
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    latent = 0.5 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    pixels = pipeline.autoencoder.decode(latent).clamp(0, 1)
    assert difference(vae.decode(latent), pixels.permute(0, 2, 3, 1)) < 1e-4
    encoded = vae.encode(pixels.permute(0, 2, 3, 1))
    assert difference(encoded, pipeline.autoencoder.encode(pixels)) < 1e-4


def test_a_whole_picture_is_drawn_alike(comfy: SimpleNamespace, pipeline: Pipeline) -> None:
    model = comfy.loading.model_from(comfy.loading.read(NANO), "default")
    prompts = [host_encoding(comfy, caption) for caption in (CAPTION, "")]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    settings = (5, 12, 4.0, 1.0, "dpmpp_2m", "simple", 1.0)
    out = comfy.sampler.SD35Sampler.execute(model, *prompts, latent, *settings)
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    host = vae.decode(out.result[0]["samples"])[0]
    (seen,) = pipeline.draw([CAPTION], [5], Settings(steps=12))
    assert (seen.float() / 255 - host).abs().mean() < 0.02, "bf16 here, fp32 there"


def test_image_to_image_keeps_the_layout(comfy: SimpleNamespace) -> None:
    """Half the noise and another thing in the prompt, which names no place."""
    folder = emoji_folder()
    model = comfy.loading.model_from(comfy.loading.read(NANO), "default")
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    kept = 0
    for i, place in enumerate(PLACES):
        given = parse(f"an apple {place} on a sky blue background")
        wanted = "an orange on a sky blue background"
        pixels = torch.frombuffer(bytearray(render(given, folder).tobytes()), dtype=torch.uint8)
        latent = {"samples": vae.encode(pixels.view(1, 128, 128, 3).float() / 255)}
        prompts = [host_encoding(comfy, caption) for caption in (wanted, "")]
        settings = (i, 16, 4.0, 1.0, "dpmpp_2m", "simple", 0.5)
        out = comfy.sampler.SD35Sampler.execute(model, *prompts, latent, *settings)
        made = (255 * vae.decode(out.result[0]["samples"])[0]).round().byte()
        kept += judge(Image.fromarray(made.numpy()), given, folder).place_right
    assert kept >= 8, "of nine places"


@pytest.mark.parametrize("size", [(160, 160), (192, 128)])
def test_sizes_without_training_give_recognisable_pictures(
    pipeline: Pipeline, size: tuple[int, int]
) -> None:
    scenes = [scene for scene in unseen(40) if len(scene.names) == 1][:24]
    pictures = draw(pipeline, scenes, Settings(steps=16, size=size))
    assert pictures[0].size == size
    right = sum(verdict.thing_right for verdict in judge_all(pictures, scenes))
    assert right >= 12, "one in 256 by chance"


def test_what_the_host_saves_of_it_still_knows_its_text_encoders(
    comfy: SimpleNamespace, tmp_path: Path
) -> None:
    """The host keeps tensors and drops the metadata that describes them."""
    file = comfy.loading.read(NANO)
    model, clip = comfy.loading.model_from(file, "default"), comfy.text.clip_from(file, WHOLE)
    saved = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(saved), model, clip, comfy.loading.vae_from(file), metadata={})
    again = comfy.text.clip_from(comfy.loading.read(saved), WHOLE)
    seen, expected = (c.encode_from_tokens(c.tokenize(CAPTION)) for c in (again, clip))
    assert difference(seen, expected) < 1e-3, "it saves in 16 bits"
    assert Pipeline.load(saved, clip_tokenizer())
