"""A real ComfyUI, imported into this process or running as a server."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd35_core.errors import SettingError
from sd35_core.quantization.quantize import quantize_file
from tools import host as hosts
from tools.inprocess import import_pack

from ..conftest import NANO, PACK
from ..unit.models import random_weights
from .cases import KINDS, PLANS, SMALL, Conds, embedder_tensors

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
    gc.collect()
    gc.freeze()  # the modules stay: looking through them takes 0.2 s at every collection
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    import nodes as stock

    def module(name: str) -> Any:
        return importlib.import_module(f"sd35_pack.nodes.{name}")

    from comfy.quant_ops import QUANT_ALGOS

    return SimpleNamespace(
        sd=comfy.sd,
        quant_algos=QUANT_ALGOS,
        utils=comfy.utils,
        samplers=comfy.samplers,
        stock=stock,
        files=module("host.files"),
        loading=module("host.loading"),
        text=module("host.text"),
        loader=module("loader"),
        controlnet=module("controlnet"),
        facts=module("host.facts"),
        host_controlnet=module("host.controlnet"),
        calibration=module("host.calibration"),
        quantize=module("quantize"),
        training=module("training"),
        guidance=module("guidance"),
        sampler=module("sampler"),
        upscale=module("upscale"),
        tiles=module("host.tiles"),
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


@pytest.fixture(scope="session")
def files(base: Path) -> dict[str, Path]:
    """One random ControlNet of each kind and type."""
    paths = {}
    for name, (kind, control_type) in KINDS.items():
        paths[name] = base / "models" / "controlnet" / f"{name}.safetensors"
        save_file(embedder_tensors(kind, control_type), paths[name])
    return paths


@pytest.fixture(scope="session")
def vae(comfy: SimpleNamespace) -> Any:
    return comfy.loading.vae_from(comfy.loading.read(NANO))


@pytest.fixture(scope="session")
def picture() -> Tensor:
    """A smooth 128x128 picture, (1, 128, 128, 3) in 0..1."""
    ramp = torch.linspace(0, 1, 128)
    waves = [0.5 + 0.5 * torch.sin(9 * ramp[:, None] + k + 5 * ramp[None]) for k in range(3)]
    return torch.stack(waves, dim=-1)[None]


@pytest.fixture
def controlled(
    comfy: SimpleNamespace, files: dict[str, Path], vae: Any, picture: Tensor, conds: Conds
) -> Any:
    """(name, **settings) -> positive and negative with the ControlNet, by our nodes."""

    def attach(name: str, **settings: Any) -> dict[str, Any]:
        options = comfy.host_controlnet.Options(
            settings.pop("near", "near is bright"), settings.pop("reference", "Stability AI")
        )
        loaded = comfy.host_controlnet.controlnet_from(comfy.loading.read(files[name]), options)
        values = {
            "positive": conds.positive, "negative": conds.negative, "control_net": loaded,
            "vae": vae, "image": picture, "strength": 0.8, "start": 0.0, "end": 1.0, **settings,
        }  # fmt: skip
        out = comfy.controlnet.SD35ControlNetApply.execute(**values).result
        return {"positive": out[0], "negative": out[1]}

    return attach


@pytest.fixture(scope="session")
def quantized(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small random model in each format."""
    folder, found = tmp_path_factory.mktemp("quantized"), {}
    for name, plan in PLANS.items():
        with suppress(SettingError):  # the comfy-kitchen of an older host knows fewer
            out = folder / f"{name}.safetensors"
            found[name] = quantize_file(small, plan, out=out)[0]
    return found
