"""The shipped model: what training and drawing without a host compute is what the host computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.nano.draw import Painter, noise_of

from ..conftest import NANO
from .conftest import difference

WHOLE = {"clip_l": None, "clip_g": None, "t5xxl": None}
CAPTION = "a small avocado at the top left on a sky blue background"


@pytest.fixture(scope="module")
def painter(comfy: SimpleNamespace) -> Painter:
    return Painter(NANO)


def host_encoding(comfy: SimpleNamespace, caption: str) -> list[Any]:
    clip = comfy.text.clip_from(comfy.loading.read(NANO), WHOLE)
    context, pooled = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
    return [[context, {"pooled_output": pooled}]]


@pytest.mark.parametrize("caption", [CAPTION, "", "a big owl, purple background", "owl " * 90])
def test_text_is_encoded_alike(comfy: SimpleNamespace, painter: Painter, caption: str) -> None:
    ((context, extra),) = host_encoding(comfy, caption)
    seen, pooled = painter.encode([caption])
    if len(caption.split()) < 70:
        assert difference(seen, context) < 1e-5
        assert difference(pooled, extra["pooled_output"]) < 1e-5
    else:
        assert seen.shape[1] < context.shape[1], "without a host a long caption is cut"


def test_latents_are_decoded_and_encoded_alike(comfy: SimpleNamespace, painter: Painter) -> None:
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    latent = 0.5 * noise_of(3)
    pixels = painter.autoencoder.decode(latent).clamp(0, 1)
    assert difference(vae.decode(latent), pixels.permute(0, 2, 3, 1)) < 1e-4
    encoded = vae.encode(pixels.permute(0, 2, 3, 1))
    assert difference(encoded, painter.autoencoder.encode(pixels)) < 1e-4


def test_a_whole_picture_is_drawn_alike(comfy: SimpleNamespace, painter: Painter) -> None:
    model = comfy.loading.model_from(comfy.loading.read(NANO), "default")
    prompts = [host_encoding(comfy, caption) for caption in (CAPTION, "")]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    settings = (5, 12, 4.0, 1.0, "dpmpp_2m", "simple", 1.0)
    out = comfy.sampler.SD35Sampler.execute(model, *prompts, latent, *settings)
    vae = comfy.loading.vae_from(comfy.loading.read(NANO))
    host = vae.decode(out.result[0]["samples"])[0]
    (picture,) = painter.draw([CAPTION], [5], steps=12)
    seen = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(128, 128, 3)
    assert (seen.float() / 255 - host).abs().mean() < 0.02, "bf16 here, fp32 there"
