"""Workflows of ComfyUI's own nodes and the same with this pack's, on a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_core.checkpoint.layouts import under
from sd35_core.workflow.check import files_under
from sd35_core.workflow.migration import migrated
from sd35_core.workflow.workflow_file import api_graph
from tools import host as hosts

from ..conftest import NANO
from ..unit.models import random_weights
from ..unit.stock_workflows import CLIP, CONTROLNET, MODEL, SKIP, stock, with_model
from .cases import SMALL, difference, embedder_tensors

EXACT = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "the simple template": {},
    "the canny template": {"scheduler": "simple", "controlnet": CONTROLNET},
    "a shift and skipped layers": {
        "sampler": "dpmpp_2m", "scheduler": "normal", "shift": 2.0, "skip": SKIP, "steps": 12,
    },
    "three loaders, from a picture": {"apart": True, "denoise": 0.6, "scheduler": "beta"},
}  # fmt: skip


def random_clip_l() -> dict[str, torch.Tensor]:
    """CLIP-L in its published size with small random weights; ComfyUI takes no other."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        found = CLIPTextModel(config).state_dict()
    named = {k if k.startswith("text_model.") else f"text_model.{k}": t for k, t in found.items()}
    return {k: t.half() for k, t in named.items() if not k.endswith("position_ids")}


@pytest.fixture(scope="module")
def stock_files(base: Path) -> Path:
    """A checkpoint that ComfyUI's own loaders read: a small random SD3.5, CLIP-L, the small model's
    VAE; the three in files of their own; a ControlNet. Gives the models folder."""
    models = base / "models"
    clip = random_clip_l()
    vae = under(load_file(NANO), "first_stage_model.")
    weights = {f"model.diffusion_model.{k}": t for k, t in random_weights(SMALL).items()}
    whole = {f"text_encoders.clip_l.transformer.{k}": t for k, t in clip.items()}
    whole |= {f"first_stage_model.{k}": t for k, t in vae.items()}
    save_file({**weights, **whole}, models / "checkpoints" / MODEL)
    save_file(clip, models / "text_encoders" / CLIP)
    save_file(vae, models / "vae" / "tiny_vae.safetensors")
    save_file(embedder_tensors("8b", 1), models / "controlnet" / CONTROLNET)
    return models


def drawn(server: hosts.Server, base: Path, workflow: dict[str, Any], name: str) -> torch.Tensor:
    """The latent that a workflow's sampler gives."""
    prompt = api_graph(workflow)
    (sampler,) = (k for k, n in prompt.items() if n["class_type"] in ("KSampler", "SD35Sampler"))
    inputs = {"samples": [sampler, 0], "filename_prefix": f"latents/{name}"}
    prompt["save"] = {"class_type": "SaveLatent", "inputs": inputs}
    hosts.run_prompt(server.url, prompt)
    path = max((base / "output" / "latents").glob(f"{name}_*.latent"))
    return load_file(path)["latent_tensor"]


@pytest.mark.parametrize("case", CASES)
def test_the_replaced_nodes_draw_the_picture_of_the_stock_ones(
    server: hosts.Server, base: Path, stock_files: Path, case: str
) -> None:
    workflow = stock(**CASES[case])
    if CASES[case].get("apart"):
        workflow = with_model(workflow, "small.safetensors")
    found = migrated(workflow, files_under(stock_files))
    kinds = {node["type"] for node in found.workflow["nodes"]}
    assert not found.left and "SD35Loader" in kinds and "SD35Sampler" in kinds
    assert not {"KSampler", "CheckpointLoaderSimple", "SkipLayerGuidanceSD3", "UNETLoader"} & kinds
    name = case.replace(" ", "_").replace(",", "")
    before = drawn(server, base, workflow, f"{name}_stock")
    after = drawn(server, base, found.workflow, f"{name}_ours")
    assert before.abs().max() > 0.1
    assert difference(after, before) < EXACT


def test_the_server_answers_the_canvas_and_refuses_what_is_none(
    server: hosts.Server, stock_files: Path
) -> None:
    answer = hosts.call(server.url, "/sd35/migrate", stock())
    assert answer["workflow"]["nodes"][0]["type"] == "SD35Loader" and not answer["left"]
    assert "CheckpointLoaderSimple (1) is SD3.5 Loader now." in answer["report"]
    again = hosts.call(server.url, "/sd35/migrate", answer["workflow"])
    assert again["workflow"] == answer["workflow"] and not again["replaced"]
    with pytest.raises(hosts.HostError, match="damaged"):
        hosts.call(server.url, "/sd35/migrate", {"nodes": [5], "links": []})
    assert json.loads(json.dumps(answer))
