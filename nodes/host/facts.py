"""What a run is about to do: the workflow as queued, and the objects that arrived at a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.text_encoders.sd3_clip import T5XXLTokenizer
from server import PromptServer
from torch import Tensor

from ...sd35_core.checkpoint.sizes import MODULATION, Weights
from ...sd35_core.errors import CheckpointError
from ...sd35_core.network.latent import PIXELS
from ...sd35_core.sampling.recipes import layers_text
from ...sd35_core.workflow.graph import Budget, TooLargeError
from ...sd35_core.workflow.headers import model_of
from ...sd35_core.workflow.links import leading_to
from ...sd35_core.workflow.lora_files import lora_in
from ...sd35_core.workflow.reader import setups
from ...sd35_core.workflow.setup import Card, Control, Latent, Lora, Model, Prompt, Setup, Skip
from ...sd35_core.workflow.workflow_file import api_graph
from . import files
from .control_base import StockMMDiT
from .controlnet import SD35ControlNet
from .guidance import SKIPS
from .network import HostMMDiTX, network_in
from .report import log

HONOURED = {
    "patches": {"attn1_patch", "attn1_output_patch"},
    "patches_replace": {"dit", "attn1"},
}
"""What our network calls of what other nodes hang on a model; the host's own calls "dit" alone."""
SECONDS = 10.0
"""For reading the workflow in a run."""
LONG = 150
"""Words from which a prompt's T5 tokens are worth counting."""


def running_prompt() -> dict[str, Any]:
    """What the server is running, in the API's format; empty outside a run."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return {}
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return running[0][2] if running else {}


def find_file(folder: str, name: str) -> Path | None:
    """The file that a widget names, in the host's folders or the pack's."""
    try:
        if folder in files.MODEL_FOLDERS:
            return files.model_path(name)
        if folder == "controlnet":
            return files.controlnet_path(name)
        return files.path_in(folder, name)
    except CheckpointError:
        return None


def setups_after(prompt: dict[str, Any], node_id: str | None) -> list[Setup]:
    """Set-ups of the samplers that a node leads to, as the workflow says; none where reading it
    takes more than SECONDS: the objects themselves are judged all the same."""
    if not prompt:
        return []
    budget = Budget(SECONDS)
    try:
        graph = api_graph(prompt, budget)
        concerned = leading_to(graph, node_id)
        return [
            setup for key, setup in setups(graph, find_file, budget).items() if key in concerned
        ]
    except TooLargeError as error:
        log.warning(str(error))
        return []


def setups_at(
    prompt: dict[str, Any],
    node_id: str | None,
    model: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    vae: Any = None,
) -> list[Setup]:
    """Set-ups of the samplers that a node leads to, with what it got."""
    return [
        observed(setup, model, positive, negative, latent, vae)
        for setup in setups_after(prompt, node_id) or [Setup()]
    ]


def card_of(number: int = 2) -> Card:
    """What the host samples on; `number`: bytes of a number that it computes with."""
    management = comfy.model_management
    device = management.get_torch_device()
    shared = management.is_device_cpu(device) or management.is_device_mps(device)
    return Card(int(management.get_total_memory(device)), number, shared)


def loras_on(setup: Setup, model: Model) -> tuple[Lora, ...]:
    """A set-up's LoRAs, held against the model that arrived."""
    paths = {lora.name: find_file("loras", lora.name) for lora in setup.loras}
    return tuple(
        replace(lora, file=lora_in(path, model)) if (path := paths[lora.name]) else lora
        for lora in setup.loras
    )


def observed(
    setup: Setup, model: Any, positive: Any, negative: Any, latent: dict[str, Any], vae: Any
) -> Setup:
    """A set-up with what the objects themselves show in place of what the workflow says."""
    facts = model_facts(model)
    recipe = setup.model.recipe if setup.model and setup.model.recipe else facts.recipe
    options = model.model_options
    skips = tuple(
        Skip(layers_text(skip.layers), skip.scale, skip.start, skip.end)
        for skip in options.get(SKIPS, ())
    )
    return replace(
        setup,
        model=replace(facts, recipe=recipe),
        positive=prompt_facts(positive, setup.positive),
        negative=prompt_facts(negative, setup.negative),
        same_prompts=setup.same_prompts or positive is negative,
        skips=setup.skips if len(setup.skips) >= len(skips) else skips,
        controls=control_facts(positive, negative, setup.controls),
        latent=latent_facts(latent, setup.latent),
        loras=loras_on(setup, facts),
        vae_channels=setup.vae_channels if vae is None else channels_of(vae),
        idle=setup.idle or idle_hooks(options.get("transformer_options", {}), facts.own),
        card=card_of(4 if model.model.get_dtype_inference().itemsize >= 4 else 2),
    )


def model_facts(model: Any) -> Model:
    """Of a MODEL, whoever loaded it."""
    network = network_in(model.model)
    sampling = model.get_model_object("model_sampling")
    flow = (
        isinstance(sampling, comfy.model_sampling.CONST)
        and abs(float(sampling.timestep(torch.tensor(1.0))) - 1000) < 1
    )
    if isinstance(network, HostMMDiTX):
        _, made_from = model.cached_patcher_init or (None, ("",))
        packed = model.model.model_config.quant_config is not None
        facts = model_of(network.config, Path(made_from[0]).name, packed)
        cache = model.model.modulation_mode
        held = weights_of(network, packed)
        return replace(facts, flow=flow, weights=held, modulation_cache=cache)
    if isinstance(network, StockMMDiT):
        hidden, pooled = network.y_embedder.mlp[0].weight.shape
        names = {(24, True): "sd3.5_medium", (38, False): "sd3.5_large", (24, False): "sd3_medium"}
        depth = len(network.joint_blocks)
        variant = names.get((depth, hasattr(network.joint_blocks[0].x_block, "attn2")))
        return Model(
            recipe=variant,
            variant=variant,
            depth=depth,
            hidden=hidden,
            context_dim=network.context_embedder.weight.shape[1],
            pooled_dim=pooled,
            positions=network.pos_embed_max_size,
            flow=flow,
            own=False,
            dual=hasattr(network.joint_blocks[0].x_block, "attn2"),
            weights=weights_of(network, model.model.model_config.quant_config is not None),
        )
    return Model(kind=type(model.model).__name__, flow=True, own=False)


def weights_of(network: Any, packed: bool) -> Weights:
    """What a network's tensors take, as the host counts them."""
    tensors = network.state_dict()
    adaln = {key: tensor for key, tensor in tensors.items() if MODULATION in key}
    return Weights(
        whole=sum(tensor.nbytes for tensor in tensors.values()),
        resting=sum(tensor.nbytes for tensor in adaln.values()),
        row=sum(len(tensor) for key, tensor in adaln.items() if key.endswith(".weight")),
        packed=packed,
    )


def prompt_facts(conditioning: Any, known: Prompt | None) -> Prompt | None:
    """Of a CONDITIONING's first entry, with the text that the workflow says."""
    if not conditioning:
        return known
    encoded, extra = conditioning[0]
    pooled = extra.get("pooled_output")
    known = known or Prompt()
    tokens = known.tokens
    if known.text is not None and len(known.text.split()) > LONG:
        tokens = len(T5XXLTokenizer().tokenize_with_weights(known.text)[0])
    return replace(
        known,
        tokens=tokens,
        width=encoded.shape[-1],
        pooled=0 if pooled is None else pooled.shape[-1],
        pooled_is_zero=pooled is not None and not bool(pooled.any()),
        finite=finite(encoded) and (pooled is None or finite(pooled)),
    )


def control_facts(positive: Any, negative: Any, known: tuple[Control, ...]) -> tuple[Control, ...]:
    """Of the ControlNets on the positive prompt; those that are off, which the node that applies
    them left out, as the workflow says."""
    here, there = controls_on(positive), controls_on(negative)
    alike = len(here) == len(there)
    off = [c for c in known if c.strength == 0 or (c.start is not None and c.start == c.end)]
    return (*(replace(control_fact(control), on_both=alike) for control in here), *off)


def controls_on(conditioning: Any) -> list[Any]:
    """The ControlNets of a CONDITIONING's first entry, the last one first."""
    control = conditioning[0][1].get("control") if conditioning else None
    found = []
    while control is not None:
        found.append(control)
        control = control.previous_controlnet
    return found


def control_fact(control: Any) -> Control:
    """Of one CONTROL_NET with its picture."""
    hidden, control_type, foreign, layers = None, None, None, 0
    if isinstance(control, SD35ControlNet):
        hidden, control_type = control.config.hidden, control.config.control_type
        layers = control.config.layers
    elif isinstance(control, comfy.controlnet.ControlNetSD35):
        hidden = control.control_model.hidden_size
        layers = len(control.control_model.transformer_blocks)
    elif type(control) is not comfy.controlnet.ControlNet or not control.latent_format:
        foreign = f"a {type(control).__name__} of another model"
    elif type(control.latent_format) is not comfy.latent_formats.SD3:
        foreign = f"made for {type(control.latent_format).__name__}"
    start, end = control.timestep_percent_range
    picture = control.cond_hint_original
    loaded = getattr(control, "control_model_wrapped", None)
    return Control(
        hidden=hidden,
        control_type=control_type,
        strength=control.strength,
        start=start,
        end=end,
        vae=control.vae is not None,
        foreign=foreign,
        weights=loaded.model_size() if loaded and layers else None,
        layers=layers,
        hints=None if picture is None else len(picture),
        blank=picture is not None and float(picture.max() - picture.min()) < 1e-3,
        hint_size=None if picture is None else (picture.shape[-1], picture.shape[-2]),
    )


def latent_facts(latent: dict[str, Any], known: Latent | None) -> Latent:
    """Of a LATENT."""
    samples = latent["samples"]
    return Latent(
        width=samples.shape[-1] * PIXELS,
        height=samples.shape[-2] * PIXELS,
        batch=len(samples),
        channels=samples.shape[1],
        empty=not bool(samples.any()),
        finite=finite(samples),
        masked="noise_mask" in latent or bool(known and known.masked),
    )


def channels_of(vae: Any) -> int:
    """A VAE's latent channels; 0 for none."""
    return vae.latent_channels if getattr(vae, "first_stage_model", None) is not None else 0


def idle_hooks(options: dict[str, Any], own: bool) -> tuple[str, ...]:
    """Hooks on a model that its network never calls."""
    names = [
        name
        for kind, called in HONOURED.items()
        for name in options.get(kind, {})
        if name not in (called if own else called & {"dit"})
    ]
    return tuple(f"A node before this one (its hook is '{name}')" for name in sorted(set(names)))


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
