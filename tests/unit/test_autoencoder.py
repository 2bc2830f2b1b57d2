"""The tiny autoencoder: the layout that hosts know as TAESD, and its two scales."""

from __future__ import annotations

import pytest
import torch

from sd35_core.encoders.autoencoder import TinyAutoencoder


@pytest.fixture(scope="module")
def model() -> TinyAutoencoder:
    torch.manual_seed(0)
    return TinyAutoencoder().requires_grad_(False).eval()


def test_a_latent_cell_is_eight_pixels(model: TinyAutoencoder) -> None:
    latent = model.encode(torch.rand(2, 3, 32, 48))
    assert latent.shape == (2, 16, 4, 6)
    assert model.decode(latent).shape == (2, 3, 32, 48)


def test_keys_and_shapes_are_those_of_taesd(model: TinyAutoencoder) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = {
        "taesd_encoder.0.weight": (64, 3, 3, 3),
        "taesd_encoder.2.weight": (64, 64, 3, 3),
        "taesd_encoder.13.conv.4.bias": (64,),
        "taesd_encoder.14.weight": (16, 64, 3, 3),
        "taesd_decoder.1.weight": (64, 16, 3, 3),
        "taesd_decoder.7.weight": (64, 64, 3, 3),
        "taesd_decoder.18.conv.0.weight": (64, 64, 3, 3),
        "taesd_decoder.19.weight": (3, 64, 3, 3),
        "vae_scale": (),
        "vae_shift": (),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert "taesd_encoder.2.bias" not in shapes and "taesd_decoder.7.bias" not in shapes
    assert len(shapes) == 136


def test_scale_and_shift_only_change_how_latents_are_written_down(model: TinyAutoencoder) -> None:
    image = torch.rand(1, 3, 16, 16)
    plain, made = model.encode(image), model.decode(model.encode(image))
    moved = TinyAutoencoder()
    moved.load_state_dict(model.state_dict())
    moved.requires_grad_(False)
    moved.vae_scale.fill_(2.0)
    moved.vae_shift.fill_(0.5)
    assert torch.allclose(moved.encode(image), plain / 2 + 0.5, atol=1e-6)
    assert torch.allclose(moved.decode(moved.encode(image)), made, atol=1e-5)


def test_latents_far_outside_the_range_decode_to_finite_pictures(model: TinyAutoencoder) -> None:
    far, farther = (torch.full((1, 16, 2, 2), value) for value in (1e3, 1e6))
    assert torch.equal(model.decode(far), model.decode(farther))
    assert model.decode(far).isfinite().all()


def test_the_scales_are_not_trained() -> None:
    fixed = {name for name, p in TinyAutoencoder().named_parameters() if not p.requires_grad}
    assert fixed == {"vae_scale", "vae_shift"}
