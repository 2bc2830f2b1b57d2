"""A real ComfyUI, imported into this process or running as a server."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd35_core.network.config import MMDiTXConfig
from tools import host as hosts
from tools.inprocess import import_pack

from ..conftest import PACK
from ..unit.models import random_weights

SMALL = MMDiTXConfig(
    depth=4,
    hidden=256,
    context_dim=4096,
    pooled_dim=2048,
    pos_embed_max_size=32,
    qk_norm=True,
    dual_blocks=(0, 1),
)


FOLDERS = ("checkpoints", "controlnet", "diffusion_models", "loras", "text_encoders", "vae")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's base directory, with models that the tests make."""
    base = tmp_path_factory.mktemp("host base")
    for folder in FOLDERS:
        (base / "models" / folder).mkdir(parents=True)
    save_file(
        {f"model.diffusion_model.{k}": t for k, t in random_weights(SMALL).items()},
        base / "models" / "diffusion_models" / "small.safetensors",
    )
    return base


@pytest.fixture(scope="session")
def comfy(comfyui: hosts.Host, base: Path) -> SimpleNamespace:
    """The host's modules in this process, on the CPU, and the pack as the host imports it."""
    import_pack(comfyui, base)
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    import nodes as stock

    def module(name: str) -> Any:
        return importlib.import_module(f"sd35_pack.nodes.{name}")

    return SimpleNamespace(
        sd=comfy.sd,
        utils=comfy.utils,
        samplers=comfy.samplers,
        stock=stock,
        files=module("host.files"),
        loading=module("host.loading"),
        text=module("host.text"),
        loader=module("loader"),
        controlnet=module("controlnet"),
        host_controlnet=module("host.controlnet"),
        calibration=module("host.calibration"),
        quantize=module("quantize"),
        guidance=module("guidance"),
        sampler=module("sampler"),
    )


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def small(base: Path) -> Path:
    return base / "models" / "diffusion_models" / "small.safetensors"


@pytest.fixture
def ours(comfy: SimpleNamespace, small: Path) -> Any:
    return comfy.loading.load_model(str(small), "default")


@pytest.fixture
def stock(comfy: SimpleNamespace, small: Path) -> Any:
    """The same file as the host's own SD3 model."""
    return comfy.sd.load_diffusion_model(str(small))


class Conds:
    """Random encoded prompts of SD3.5's widths, the same for every test."""

    def __init__(self, width: int = 4096, pooled: int = 2048):
        generator = torch.Generator().manual_seed(11)

        def cond(length: int) -> list[Any]:
            pooled_output = torch.randn(1, pooled, generator=generator)
            context = torch.randn(1, length, width, generator=generator)
            return [[context, {"pooled_output": pooled_output}]]

        self.positive, self.negative, self.longer = cond(77), cond(77), cond(154)


@pytest.fixture(scope="session")
def conds() -> Conds:
    return Conds()


@pytest.fixture(scope="session")
def ksampler(comfy: SimpleNamespace, conds: Conds) -> Any:
    """The stock KSampler: (model, **settings) -> the latent."""

    def sample(model: Any, **settings: Any) -> Tensor:
        values = {
            "seed": 5,
            "steps": 8,
            "cfg": 4.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "normal",
            "positive": conds.positive,
            "negative": conds.negative,
            "latent": {"samples": torch.zeros(1, 16, 16, 16)},
            **settings,
        }
        return comfy.stock.common_ksampler(model, **values)[0]["samples"]

    return sample


def difference(seen: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    assert seen.shape == expected.shape
    return float((seen - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def server(comfyui: hosts.Host, base: Path) -> Iterator[hosts.Server]:
    """A running host with the pack and the tests' models."""
    with hosts.Server(comfyui, base=base, arguments=["--cpu"]) as running:
        yield running


@pytest.fixture
def workflow() -> dict[str, Any]:
    import json

    path = PACK / "workflows" / "api" / "text_to_image.json"
    return json.loads(path.read_text(encoding="utf-8"))
