"""SD3.5 workflows of ComfyUI's own nodes, as the canvas saves them, built like its templates."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
Source = tuple[int, int]
TYPES = {
    "latent_image": "LATENT", "samples": "LATENT", "positive": "CONDITIONING",
    "negative": "CONDITIONING", "conditioning": "CONDITIONING", "images": "IMAGE",
    "pixels": "IMAGE",
}  # fmt: skip
"""Of sockets whose name is not their type's."""
OUTPUTS = {
    "CheckpointLoaderSimple": "MODEL CLIP VAE", "UNETLoader": "MODEL", "CLIPLoader": "CLIP",
    "TripleCLIPLoader": "CLIP", "VAELoader": "VAE", "ControlNetLoader": "CONTROL_NET",
    "ModelSamplingSD3": "MODEL", "SkipLayerGuidanceSD3": "MODEL", "LoadImage": "IMAGE MASK",
    "CLIPTextEncode": "CONDITIONING", "ConditioningZeroOut": "CONDITIONING",
    "EmptySD3LatentImage": "LATENT", "ControlNetApplyAdvanced": "CONDITIONING CONDITIONING",
    "KSampler": "LATENT", "VAEDecode": "IMAGE", "VAEEncode": "LATENT",
    "PerturbedAttention": "MODEL", "ImageScale": "IMAGE",
}  # fmt: skip
MODEL, CONTROLNET, CLIP = "sd35_tiny.safetensors", "canny 8b.safetensors", "l.safetensors"
SKIP = {"layers": "1, 2", "scale": 2.5, "start_percent": 0.1, "end_percent": 0.4}


class Board:
    """A canvas that is filled node by node."""

    def __init__(self) -> None:
        self.nodes: list[Json] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, widgets: Json | None = None, **sources: Source) -> int:
        """A node with its widgets, by name, and where its inputs come from; gives its id."""
        number = len(self.nodes) + 1
        inputs: list[Json] = []
        for place, (name, (node, slot)) in enumerate(sources.items()):
            link = [len(self.links) + 1, node, slot, number, place, TYPES.get(name, name.upper())]
            self.links.append(link)
            self.nodes[node - 1]["outputs"][slot]["links"].append(link[0])
            inputs.append({"name": name, "type": link[5], "link": link[0]})
        named = [(name, value) for name, value in (widgets or {}).items() if name != "control"]
        inputs += [
            {"name": n, "type": "COMBO", "widget": {"name": n}, "link": None} for n, _ in named
        ]
        outputs = OUTPUTS.get(kind, "").split()
        self.nodes.append({
            "id": number, "type": kind, "pos": [250 * number, 60], "size": [240, 90], "mode": 0,
            "flags": {}, "order": number, "color": "#223", "bgcolor": "#335", "inputs": inputs,
            "outputs": [{"name": n, "type": n, "links": []} for n in outputs],
            "properties": {"cnr_id": "comfy-core", "ver": "0.3.64", "Node name for S&R": kind},
            "widgets_values": list((widgets or {}).values()),
        })  # fmt: skip
        return number

    def made(self, **more: Any) -> Json:
        return {
            "last_node_id": len(self.nodes), "last_link_id": len(self.links),
            "nodes": self.nodes, "links": self.links, "version": 0.4, "config": {},
            "groups": [{"id": 1, "title": "Step 1", "bounding": [0, 0, 400, 300], "flags": {}}],
            "extra": {"ds": {"scale": 1, "offset": [0, 0]}}, **more,
        }  # fmt: skip


def with_model(workflow: Json, name: str) -> Json:
    """The workflow with another file in its first loader."""
    workflow["nodes"][0]["widgets_values"][0] = name
    return workflow


def stock(
    sampler: str = "euler",
    scheduler: str = "sgm_uniform",
    steps: int = 8,
    shift: float | None = None,
    skip: Json | None = None,
    controlnet: str = "",
    apart: bool = False,
    denoise: float = 1.0,
    between: str = "",
) -> Json:
    """Text to image. shift: by ModelSamplingSD3; skip: widgets of SkipLayerGuidanceSD3; controlnet:
    the file, with its hint the picture that ComfyUI comes with; apart: model, CLIP and VAE from
    loaders of their own; between: another node on the model's way; denoise below 1: from that
    picture."""
    board = Board()
    if apart:
        model = board.add("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}), 0
        clip = board.add("CLIPLoader", {"clip_name": CLIP, "type": "sd3", "device": "default"}), 0
        vae = board.add("VAELoader", {"vae_name": "tiny_vae.safetensors"}), 0
    else:
        loader = board.add("CheckpointLoaderSimple", {"ckpt_name": MODEL})
        model, clip, vae = (loader, 0), (loader, 1), (loader, 2)
    if shift is not None:
        model = board.add("ModelSamplingSD3", {"shift": shift}, model=model), 0
    if skip is not None:
        model = board.add("SkipLayerGuidanceSD3", skip, model=model), 0
    if between:
        model = board.add(between, {"scale": 3.0}, model=model), 0
    positive = board.add("CLIPTextEncode", {"text": "a bottle with a galaxy inside"}, clip=clip), 0
    negative = board.add("ConditioningZeroOut", conditioning=positive), 0
    picture: Source = (0, 0)
    if controlnet or denoise < 1:
        loaded = board.add("LoadImage", {"image": "example.png"}), 0
        size = {"upscale_method": "bilinear", "width": 128, "height": 128, "crop": "center"}
        picture = board.add("ImageScale", size, image=loaded), 0
    if controlnet:
        control = board.add("ControlNetLoader", {"control_net_name": controlnet}), 0
        ends = {"strength": 0.66, "start_percent": 0.0, "end_percent": 0.7}
        applied = board.add(
            "ControlNetApplyAdvanced", ends, positive=positive, negative=negative,
            control_net=control, image=picture, vae=vae,
        )  # fmt: skip
        positive, negative = (applied, 0), (applied, 1)
    if denoise < 1:
        latent = board.add("VAEEncode", pixels=picture, vae=vae), 0
    else:
        size = {"width": 128, "height": 128, "batch_size": 1}
        latent = board.add("EmptySD3LatentImage", size), 0
    settings = {
        "seed": 585483408983215, "control": "randomize", "steps": steps, "cfg": 4.01,
        "sampler_name": sampler, "scheduler": scheduler, "denoise": denoise,
    }  # fmt: skip
    drawn = board.add(
        "KSampler", settings, model=model, positive=positive, negative=negative, latent_image=latent
    )
    decoded = board.add("VAEDecode", samples=(drawn, 0), vae=vae)
    board.add("SaveImage", {"filename_prefix": "ComfyUI"}, images=(decoded, 0))
    return board.made()
