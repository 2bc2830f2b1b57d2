"""Set-ups of SD3.5 as prompts: right ones, and what is put wrong in each and said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Graph = dict[str, dict[str, Any]]
Change = Callable[[Graph], None]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def medium() -> Graph:
    """SD3.5 Medium as its recipe has it."""
    return {
        "1": node(
            "SD35Loader", model="sd3.5_medium.safetensors", clip_l="l", clip_g="g", t5xxl="t",
            vae="from model file", weight_dtype="default",
        ),
        "2": node("CLIPTextEncode", text="an old fisherman mends his net", clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "5": node(
            "SD35Sampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent=["4", 0],
            seed=1, steps=50, cfg=5.0, shift=3.0, sampler="dpmpp_2m", schedule="normal",
            denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="x"),
    }  # fmt: skip


def set_to(key: str, **inputs: Any) -> Change:
    return lambda graph: graph[key]["inputs"].update(inputs)


def both(*changes: Change) -> Change:
    def change(graph: Graph) -> None:
        for one in changes:
            one(graph)

    return change


def on_model(kind: str, **inputs: Any) -> Change:
    """A node between whatever the sampler's model is and the sampler."""

    def change(graph: Graph) -> None:
        key = str(10 + len(graph))
        graph[key] = node(kind, model=graph["5"]["inputs"]["model"], **inputs)
        graph["5"]["inputs"]["model"] = [key, 0]

    return change


def slg(**inputs: Any) -> Change:
    values = {"layers": "7, 8, 9", "scale": 2.5, "start": 0.01, "end": 0.2, **inputs}
    return on_model("SkipLayerGuidance", **values)


def stock_slg(**inputs: Any) -> Change:
    values = {"double_layers": "7, 8, 9", "single_layers": "", "scale": 2.5,
              "start_percent": 0.01, "end_percent": 0.2, **inputs}  # fmt: skip
    return on_model("SkipLayerGuidanceDiT", **values)


def control(name: str, vae: bool = True, **inputs: Any) -> Change:
    """A ControlNet on both prompts."""

    def change(graph: Graph) -> None:
        key = str(10 + len(graph))
        graph[key] = node("SD35ControlNetLoader", control_net=name, depth_maps="near is bright")
        values = {"strength": 1.0, "start": 0.0, "end": 1.0, **inputs}
        sampler = graph["5"]["inputs"]
        applied = node(
            "SD35ControlNetApply", positive=sampler["positive"], negative=sampler["negative"],
            control_net=[key, 0], image=["99", 0], **values,
        )  # fmt: skip
        if vae:
            applied["inputs"]["vae"] = ["1", 2]
        graph[key + "0"] = applied
        sampler.update(positive=[key + "0", 0], negative=[key + "0", 1])

    return change


def ksampler(graph: Graph, scheduler: str = "normal") -> None:
    old = graph["5"]["inputs"]
    graph["5"] = node(
        "KSampler", model=old["model"], positive=old["positive"], negative=old["negative"],
        latent_image=old["latent"], seed=1, steps=old["steps"], cfg=old["cfg"],
        sampler_name="dpmpp_2m", scheduler=scheduler, denoise=old["denoise"],
    )  # fmt: skip


def upscale(control: str = "", **inputs: Any) -> Change:
    """SD35Upscale in the sampler's place, with a ControlNet if one is named."""

    def change(graph: Graph) -> None:
        old = graph["5"]["inputs"]
        links = ("model", "positive", "negative")
        widgets = ("seed", "steps", "cfg", "shift", "sampler", "schedule")
        kept = {name: old[name] for name in (*links, *widgets)}
        values = {"factor": 2.0, "tile": 1024, "overlap": 128, "denoise": 0.4, "strength": 0.8,
                  "end": 0.8, "blur": 8.0, "positions": "own", **inputs}  # fmt: skip
        graph["5"] = node("SD35Upscale", vae=["1", 2], image=["99", 0], **kept, **values)
        if control:
            graph["60"] = node("SD35ControlNetLoader", control_net=control)
            graph["5"]["inputs"]["control_net"] = ["60", 0]

    return change


def stock_loader(graph: Graph) -> None:
    graph["1"] = node("CheckpointLoaderSimple", ckpt_name="sd3.5_medium.safetensors")


def large(graph: Graph) -> None:
    graph["1"]["inputs"]["model"] = "sd3.5_large.safetensors"
    graph["5"]["inputs"].update(steps=40, cfg=4.5)


def turbo(graph: Graph) -> None:
    graph["1"]["inputs"]["model"] = "sd3.5_large_turbo.safetensors"
    graph["5"]["inputs"].update(steps=4, cfg=1.0, sampler="euler")


def nano(graph: Graph) -> None:
    graph["1"]["inputs"]["model"] = "sd35_nano.safetensors"
    graph["4"]["inputs"].update(width=128, height=128)
    graph["5"]["inputs"].update(steps=28, cfg=4.0, shift=1.0, schedule="simple")


def encoded(graph: Graph) -> None:
    """Image to image."""
    graph["8"] = node("VAEEncode", pixels=["99", 0], vae=["1", 2])
    graph["5"]["inputs"].update(latent=["8", 0], denoise=0.6)


def inpaint(graph: Graph) -> None:
    encoded(graph)
    graph["9"] = node("SetLatentNoiseMask", samples=["8", 0], mask=["99", 1])
    graph["5"]["inputs"].update(latent=["9", 0], denoise=1.0)


def lora(name: str, strength: float = 1.0) -> Change:
    return on_model("LoraLoaderModelOnly", lora_name=name, strength_model=strength)


def custom(graph: Graph) -> None:
    """SamplerCustomAdvanced with the pack's schedule."""
    old = graph["5"]["inputs"]
    graph["20"] = node("CFGGuider", model=old["model"], positive=old["positive"],
                       negative=old["negative"], cfg=old["cfg"])  # fmt: skip
    graph["21"] = node("SD35Sigmas", steps=old["steps"], shift=3.0, schedule="normal", denoise=1.0)
    graph["22"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    graph["5"] = node("SamplerCustomAdvanced", noise=["23", 0], guider=["20", 0],
                      sampler=["22", 0], sigmas=["21", 0], latent_image=old["latent"])  # fmt: skip


LONG = "a very detailed and carefully painted harbour with boats, " * 30
WRONG: dict[str, tuple[Change, str, str]] = {
    "Turbo with cfg 4": (
        both(turbo, set_to("5", cfg=4.0)), "turbo cfg",
        "cfg is 4, but Large Turbo was distilled to go without guidance.*Set cfg to 1"),
    "Turbo with 40 steps": (
        both(turbo, set_to("5", steps=40)), "turbo steps", "steps is 40.*Set steps to 4"),
    "Turbo with skipped layers": (both(turbo, slg()), "turbo slg", "Remove the node"),
    "Medium in 4 steps": (set_to("5", steps=4), "few steps", "steps is 4.*Set steps to 50"),
    "Large at cfg 1": (both(large, set_to("5", cfg=1.0)), "low cfg", "cfg is 1.*Set cfg to 4.5"),
    "cfg 15": (set_to("5", cfg=15.0), "high cfg", "cfg is 15"),
    "Turbo with cfg 0, as in diffusers": (
        both(turbo, set_to("5", cfg=0.0)), "zero cfg", "negative prompt alone.*Set cfg to 1"),
    "AuraFlow's shift": (
        both(lambda g: ksampler(g, "normal"), on_model("ModelSamplingAuraFlow", shift=3.0)),
        "model sampling", "which gives noise"),
    "shift 1": (set_to("5", shift=1.0), "shift", "shift is 1, but SD3.5 was made for 3"),
    "the small model with shift 3": (
        both(nano, set_to("5", shift=3.0)), "shift", "shift is 3.*Set shift to 1"),
    "karras": (lambda g: ksampler(g, "karras"), "schedule", "karras.*Use normal"),
    "a negative prompt at cfg 1": (
        both(turbo, set_to("3", text="ugly")), "unused negative", "Empty it, or raise cfg"),
    "one prompt for both": (
        set_to("5", negative=["2", 0]), "same prompts", "guidance cancels itself"),
    "an empty latent at denoise 0.5": (
        set_to("5", denoise=0.5), "denoise of nothing", "denoise is 0.5.*empty"),
    "a picture at denoise 1": (
        both(encoded, set_to("5", denoise=1.0)), "denoise of all", "nothing of the picture"),
    "layers that are no numbers": (slg(layers="7, x"), "slg layers", "'x' is not a layer number"),
    "a layer that is not there": (slg(layers="30"), "slg layers", "layers 0 to 23.*no layer 30"),
    "a window the wrong way round": (
        slg(start=0.5, end=0.2), "slg window", "starts at 0.5 and ends at 0.2"),
    "skipped layers on no step": (
        both(set_to("5", steps=10), slg(end=0.05)), "slg steps", "none of the 10 steps"),
    "scale 0": (slg(scale=0.0), "slg off", "its scale is 0"),
    "ComfyUI's skip-layer node with karras": (
        both(stock_slg(), lambda g: ksampler(g, "karras")), "slg steps", "acts on 0"),
    "ComfyUI's skip-layer node with linear_quadratic": (
        both(stock_slg(), lambda g: ksampler(g, "linear_quadratic")), "slg steps", "acts on 27"),
    "Medium's layers on Large": (both(large, slg()), "slg large", "Layers 7, 8, 9 are SD3.5 Medi"),
    "skipped layers at cfg 8": (both(slg(), set_to("5", cfg=8.0)), "slg cfg", "cfg is 8"),
    "Large's ControlNet on Medium": (
        control("large_canny.safetensors"), "control base",
        "canny ControlNet was made for SD3.5 Large, but the model is SD3.5 Medium"),
    "the small model's ControlNet in ComfyUI's own loader": (
        both(nano, control("sd35_nano_canny.safetensors"),
             lambda g: [n.update(class_type="ControlNetLoader",
                                 inputs={"control_net_name": "sd35_nano_canny.safetensors"})
                        for n in g.values() if n["class_type"] == "SD35ControlNetLoader"][0]),
        "control loader", "Load it with SD3.5 ControlNet Loader"),
    "a ControlNet without VAE": (
        both(large, control("large_canny.safetensors", vae=False)), "control vae",
        "none is connected"),
    "a ControlNet of SD 1.5": (control("sd15.safetensors"), "control kind", "can't steer SD3.5"),
    "a ControlNet at strength 0": (
        both(large, control("large_canny.safetensors", strength=0.0)), "control off",
        "its strength is 0"),
    "a ControlNet's window the wrong way round": (
        both(large, control("large_canny.safetensors", start=0.8, end=0.2)), "control window",
        "starts at 0.8 and ends at 0.2"),
    "a ControlNet on no step": (
        both(large, control("large_canny.safetensors", start=0.51, end=0.52),
             set_to("5", steps=10)), "control steps", "none of the 10 steps"),
    "a ControlNet at strength 3": (
        both(large, control("large_canny.safetensors", strength=3.0)), "control strength", "is 3"),
    "a ControlNet on Turbo": (
        both(turbo, control("large_canny.safetensors")), "control turbo", "untried"),
    "600 words": (set_to("2", text=LONG), "long prompt", "T5 tokens.*256"),
    "no prompt": (set_to("2", text="  "), "empty prompt", "The positive prompt is empty"),
    "a zeroed prompt": (
        lambda g: (g.update({"30": node("ConditioningZeroOut", conditioning=["2", 0])}),
                   g["5"]["inputs"].update(positive=["30", 0]))[0],
        "pooled empty", "all zeros"),
    "1000x1000": (set_to("4", width=1000, height=1000), "size multiple", "Use 992x992"),
    "256x256": (set_to("4", width=256, height=256), "size", "0.06 megapixels"),
    "2048x2048": (set_to("4", width=2048, height=2048), "size", "4.00 megapixels"),
    "beyond Large's table": (
        both(large, set_to("4", width=3200, height=512)), "size table", "3072x3072"),
    "the small model at 512": (
        both(nano, set_to("4", width=512, height=512)), "size", "draws 128x128 well"),
    "tiles without overlap": (upscale(overlap=0), "upscale overlap", "overlap by 0.*about 128"),
    "tiles that never get on": (
        upscale(tile=512, overlap=504), "upscale overlap", "504 pixels of a tile of 512"),
    "small tiles": (upscale(tile=256, overlap=32), "size", "0.06 megapixels"),
    "enlarging freely": (upscale(denoise=0.8), "upscale denoise", "becomes another one"),
    "enlarging by depth": (
        both(large, upscale("large_depth.safetensors")), "upscale control", "needs a depth map"),
    "enlarging by lines": (
        both(large, upscale("large_canny.safetensors")), "upscale control", "lets colours drift"),
    "enlarging with Large's ControlNet on Medium": (
        upscale("large_blur.safetensors"), "control base", "made for SD3.5 Large"),
    "no VAE": (set_to("1", vae="none"), "vae missing", "There is no VAE"),
    "SD 1.5's VAE": (set_to("1", vae="sd15_vae.safetensors"), "vae channels", "4 latent channels"),
    "an SDXL LoRA": (lora("sdxl.safetensors"), "lora nothing", "none of its 1 layers"),
    "a LoRA of Large on Medium": (
        lora("large_lora.safetensors"), "lora variant",
        r"made for SD3.5 Large \(width 2432\), and the model is SD3.5 Medium \(width 1536\)"),
    "a LoRA of Medium on Large": (
        both(large, lora("medium_lora.safetensors")), "lora variant", "SD3.5 Medium or SD3 Medium"),
    "a LoRA of FLUX": (
        lora("flux.safetensors"), "lora nothing", "made for FLUX or Hunyuan Video"),
    "a LoRA of SD3.5 Medium on blocks that lack attn2": (
        lora("attn2.safetensors"), "lora part", "only 1 of 2 layers.*second attention"),
    "a LoRA at 0": (lora("medium_lora.safetensors", 0.0), "lora off", "strength 0"),
    "a LoRA on a quantized model": (
        both(nano, set_to("1", model="packed.safetensors"), lora("nano_lora.safetensors")),
        "lora quantized", "unpacked weights"),
    "a LoRA whose names ComfyUI does not know": (
        lora("unet_lora.safetensors"), "lora nothing", "finds none of its 1 layers.*'unet."),
    "a LoHa of Large on Medium": (
        lora("large_loha.safetensors"), "lora variant", "width 2432"),
    "a LoKr of which one layer is not there": (
        lora("lokr.safetensors"), "lora part", "only 1 of 2 layers"),
    "diffusers' DoRA": (lora("dora.safetensors"), "lora dora", "leaves out its 1 magnitudes"),
    "a scale in the metadata alone": (
        lora("alpha.safetensors", 0.5), "lora alpha", "2 times.*strength to 1 where 0.5"),
    "FreeU": (on_model("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2), "failing",
              "FreeU V2 is made for U-Nets"),
    "SAG": (on_model("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0), "failing", "error"),
    "U-Net attention": (
        on_model("UNetSelfAttentionMultiply", q=2.0, k=1.0, v=1.0, out=1.0), "idle",
        "does nothing"),
    "FluxGuidance": (
        lambda g: (g.update({"30": node("FluxGuidance", conditioning=["2", 0], guidance=3.5)}),
                   g["5"]["inputs"].update(positive=["30", 0]))[0],
        "idle", "FluxGuidance does nothing"),
    "cfg++ at cfg 5": (
        both(ksampler, set_to("5", sampler_name="euler_cfg_pp", cfg=5.0)), "cfg of cfg++",
        "Set cfg to 0.8 to 2, or take euler"),
    "cfg 8": (set_to("5", cfg=8.0), "high cfg", "cfg is 8"),
    "BasicGuider on Large": (
        both(large, custom, lambda g: g.update({"20": node(
            "BasicGuider", model=["1", 0], conditioning=["2", 0])})), "low cfg", "cfg is 1"),
    "DualCFGGuider at 15": (
        both(custom, lambda g: g.update({"20": node(
            "DualCFGGuider", model=["1", 0], cond1=["2", 0], cond2=["2", 0], negative=["3", 0],
            cfg_conds=15.0, cfg_cond2_negative=15.0)})), "high cfg", "cfg is 15"),
    "ComfyUI's simple skip-layer node on Large": (
        both(large, on_model("SkipLayerGuidanceDiTSimple", double_layers="7, 8, 9",
                             single_layers="", start_percent=0.0, end_percent=1.0)),
        "slg large", "Layers 7, 8, 9 are SD3.5 Medium's"),
    "no T5 for letters": (
        both(set_to("1", clip_l="l.safetensors", clip_g="g.safetensors", t5xxl="none"),
             set_to("2", text='a sign that says "Moor"')), "t5 missing", "asks for letters"),
    "no T5 for a long prompt": (
        both(set_to("1", clip_l="l.safetensors", clip_g="g.safetensors", t5xxl="none"),
             set_to("2", text="a harbour with boats, " * 30)), "t5 missing", "is long"),
    "T5 alone": (set_to("1", clip_l="none", clip_g="none", t5xxl="t5xxl.safetensors"),
                 "t5 alone", "Load CLIP-L and CLIP-G"),
    "encoders for FLUX": (
        lambda g: (g.update({"30": node("DualCLIPLoader", clip_name1="t5xxl.safetensors",
                                        clip_name2="clip_l.safetensors", type="flux")}),
                   g["2"]["inputs"].update(clip=["30", 0]))[0],
        "encoder type", "combined for flux.*type to sd3"),
    "FLUX's VAE": (
        lambda g: (g.update({"30": node("VAELoader", vae_name="ae.safetensors")}),
                   g["6"]["inputs"].update(vae=["30", 0]))[0],
        "vae name", "'ae.safetensors' is FLUX's VAE"),
    "a latent for videos": (
        lambda g: g.update({"4": node("EmptyHunyuanLatentVideo", width=848, height=480, length=25,
                                      batch_size=1)}),
        "latent video", "EmptyHunyuanLatentVideo.*Use EmptySD3LatentImage"),
    "EasyCache on ComfyUI's own model": (
        both(stock_loader, on_model("EasyCache")), "idle", "EasyCache does nothing"),
    "two caches": (
        both(on_model("SD35StepCache", pace="safe"), on_model("EasyCache")), "caches",
        "EasyCache and SD3.5 Step Cache both"),
    "ModelSamplingSD3 before our sampler": (
        on_model("ModelSamplingSD3", shift=5.0), "shift twice", r"\(3\) counts"),
    "ModelSamplingDiscrete": (
        both(on_model("ModelSamplingDiscrete", sampling="eps"), ksampler), "model sampling",
        "gives noise"),
    "our node on ComfyUI's own model": (
        both(stock_loader, slg()), "model loader", "Load it with SD3.5 Loader"),
    "another model": (set_to("1", model="flux.safetensors"), "model", "not Stable Diffusion 3"),
}  # fmt: skip

RIGHT: dict[str, Change] = {
    "Medium": lambda g: None,
    "Medium with skipped layers": both(slg(), set_to("5", cfg=4.0)),
    "Large": large,
    "Large Turbo": turbo,
    "Large with canny": both(large, control("large_canny.safetensors"),
                             set_to("5", steps=60, cfg=3.5, sampler="euler")),
    "Large with blur at 0.6": both(large, control("large_blur.safetensors", strength=0.6)),
    "Large with two ControlNets": both(
        large, control("large_canny.safetensors", strength=0.7),
        control("large_depth.safetensors", strength=0.5)),
    "a ControlNet that ends early": both(large, control("large_canny.safetensors", end=0.6)),
    "enlarging": upscale(),
    "enlarging freely with the blur ControlNet": both(
        large, upscale("large_blur.safetensors", denoise=1.0, factor=4.0)),
    "the small model": nano,
    "the small model at 160x160": both(nano, set_to("4", width=160, height=160)),
    "the small model with its ControlNet": both(nano, control("sd35_nano_canny.safetensors")),
    "the small model with layer 1 skipped": both(nano, slg(layers="1")),
    "image to image": encoded,
    "image to image at 0.3": both(encoded, set_to("5", denoise=0.3)),
    "inpainting at denoise 1": inpaint,
    "KSampler": ksampler,
    "KSampler with beta": lambda g: ksampler(g, "beta"),
    "KSampler after ModelSamplingSD3": both(on_model("ModelSamplingSD3", shift=4.0), ksampler),
    "SamplerCustomAdvanced": custom,
    "ComfyUI's own loader and sampler": both(stock_loader, ksampler),
    "ComfyUI's skip-layer node on normal": both(stock_slg(), ksampler),
    "a LoRA for Medium": lora("medium_lora.safetensors"),
    "a LoRA in diffusers' names": lora("diffusers_lora.safetensors"),
    "two LoRAs": both(lora("medium_lora.safetensors", 0.5), lora("diffusers_lora.safetensors")),
    "a quantized model": both(nano, set_to("1", model="packed.safetensors")),
    "step cache": on_model("SD35StepCache", pace="safe"),
    "EasyCache": on_model("EasyCache"),
    "Perturbed-Attention Guidance": on_model("PerturbedAttentionGuidance", scale=3.0),
    "a wide picture": set_to("4", width=1344, height=768),
    "1440x1440": set_to("4", width=1440, height=1440),
    "a batch of four": set_to("4", batch_size=4),
    "a long but fitting prompt": both(
        set_to("2", text="a harbour with boats, " * 30), set_to("1", t5xxl="t5xxl.safetensors")),
    "a zeroed negative prompt": lambda g: (
        g.update({"30": node("ConditioningZeroOut", conditioning=["3", 0])}),
        g["5"]["inputs"].update(negative=["30", 0]))[0],
    "20 steps": set_to("5", steps=20),
    "behind SD3.5 Check": lambda g: (
        g.update({"40": node("SD35Check", model=["1", 0], positive=["2", 0], negative=["3", 0],
                             latent=["4", 0], strict="report")}),
        g["5"]["inputs"].update(model=["40", 0], positive=["40", 1], negative=["40", 2],
                                latent=["40", 3]))[0],
    "behind Reroute": lambda g: (
        g.update({"41": node("Reroute", **{"": ["1", 0]})}),
        g["5"]["inputs"].update(model=["41", 0]))[0],
}  # fmt: skip
