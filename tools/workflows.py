"""Make the canvas twins of workflows/api/*.json in the real front end, and their thumbnails.

    python tools/workflows.py [NAME ...]

Nodes keep the ids of the API file; tools/layout.py places them. Workflows for models that are
downloaded name their files' addresses, so that ComfyUI offers to get them; their
thumbnails are drawn by the small model.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_picture, write_text, write_whole
from tools import host
from tools.layout import as_app, laid_out

FOLDER = host.PACK / "workflows"
SHOWN = "text_to_image"
HUGGING_FACE = "https://huggingface.co"
STABILITY = f"{HUGGING_FACE}/stabilityai/stable-diffusion-3.5"
ENCODERS = f"{HUGGING_FACE}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders"
LORA = "SD35-lora-Chinese-Line-Art.safetensors"
MODELS = {
    "sd3.5_medium.safetensors": ("checkpoints", f"{STABILITY}-medium/resolve/main"),
    "sd3.5_large.safetensors": ("checkpoints", f"{STABILITY}-large/resolve/main"),
    "sd3.5_large_turbo.safetensors": ("checkpoints", f"{STABILITY}-large-turbo/resolve/main"),
    "clip_l.safetensors": ("text_encoders", ENCODERS),
    "clip_g.safetensors": ("text_encoders", ENCODERS),
    "t5xxl_fp16.safetensors": ("text_encoders", ENCODERS),
    **{
        f"sd3.5_large_controlnet_{kind}.safetensors": (
            "controlnet",
            f"{STABILITY}-controlnets/resolve/main",
        )
        for kind in ("blur", "canny", "depth")
    },
    LORA: ("loras", f"{HUGGING_FACE}/Shakker-Labs/SD3.5-LoRA-Chinese-Line-Art/resolve/main"),
}
"""File that a widget may name -> its folder in `models`, and where it is downloaded."""

FILES = (
    "**Files**: {files}; *clip_l*, *clip_g* and *t5xxl_fp16* in models/text_encoders. ComfyUI "
    "offers to download what is missing; Stability AI's files want its licence accepted on "
    "Hugging Face first. *t5xxl_fp8_e4m3fn_scaled* takes half the memory, *none* does without T5."
)
LARGE = "*sd3.5_large* in models/checkpoints"


def control_files(kind: str) -> str:
    files = f"{LARGE}, *sd3.5_large_controlnet_{kind}* in models/controlnet"
    return FILES.format(files=files)


NOTES = {
    "text_to_image": "### SD3.5 text to image\n"
    "The model here, **sd35_nano**, is the small one that comes with the pack: 128 pixels, "
    "pictures like *a big avocado on a pink background*.\n\n"
    "For real pictures open the workflow *medium*, *large* or *large_turbo*.",
    "image_to_image": "### Image to image\nThe first picture is encoded, made noisy and drawn to "
    "the end with another prompt. **denoise** says how much is new: 0.6 keeps places and "
    "colours; 1 keeps nothing.\n\nTo start from a picture of your own, put *Load Image* in the "
    "place of *VAE Decode*.",
    "inpaint": "### Inpainting\nOnly the white part of the mask is painted anew; what is black "
    "stays. Here two *Solid Masks* make it, so that the workflow runs at once.\n\nWith *Load "
    "Image* in the place of *VAE Decode* paint the mask in ComfyUI's mask editor, and connect its "
    "MASK output to *Set Latent Noise Mask*.",
    "compare": "### Two settings, one seed\nBoth samplers start from the same noise, so what "
    "differs comes from the settings alone. Here both take 4 steps: *euler* on the left is done, "
    "*dpmpp_2m* on the right is not; from 20 steps on they draw the same.\n\nChange anything in A "
    "or B: only what changed is computed again.",
    "sweep": "### Which layers to skip?\nOne queue draws the seed without Skip Layer Guidance and "
    "with each set of layers. The small model has four layers and gains nothing from it: this "
    "shows the node.\n\nFor **SD3.5 Medium** choose its file, its settings (50 steps, cfg 4, "
    "shift 3, schedule normal) and layers such as *7; 8; 9; 7, 8, 9*.",
    "check": "### What will go wrong?\n*SD3.5 Check* reads everything that leads to the sampler, "
    "its widgets too, and says under the node what will go wrong or do nothing, and what to do.\n\n"
    "Try it: set the shift to 3, or the width to 512, and run again. *stop at errors* ends a run "
    "that would be in vain before it samples.",
    "quantize": "### A smaller file\n1. Run: *SD3.5 Quantize* writes "
    "**sd35_nano_int8.safetensors** beside the model and says what it costs.\n"
    "2. Press R, choose that file in the loader, bypass *SD3.5 Quantize* (Ctrl+B) and run again: "
    "the same seed in 8 bits.\n\n*8 bit (int8)* hardly changes pictures and needs no prompts. "
    "*2 bit* is a quarter of it, changes them, and is calibrated on the prompts: take such as you "
    "will use, and for SD3.5 Medium and Large a side of 512.",
    "train_lora": "### Teach it a style\nFour pictures are drawn and turned into negatives; *SD3.5 "
    "Train LoRA* learns from them in a minute or two on a processor, writes **in_negative** into "
    "models/loras, and the last sampler draws with it.\n\nFor pictures of your own connect *Load "
    "Image-Text (from Folder)* to images and captions, or write a folder in ComfyUI's input folder "
    "into folder. For SD3.5 Medium and Large take a side of 512, 500 steps or more and a rate of "
    "0.0001. Cancelling leaves what was learned; the same queue again goes on from there.",
    "controlnet_canny": "### Keep the outline\nThe first picture's edges steer the second. To "
    "use a picture of your own, put *Load Image* in the place of *VAE Decode*.\n\n"
    "The second output of *SD3.5 Control Hint* shows what the ControlNet sees.",
    "controlnet_blur": "### Keep colours and places\nA blurred picture steers the second: its "
    "colours and masses stay, the details come from the prompt. With Large this ControlNet "
    "makes a small picture a large one.\n\nUse your own picture with *Load Image*.",
    "controlnet_depth": "### Keep the shape\nHere a picture on black stands in for a depth map: "
    "bright is near.\n\nWith the real models take a depth node's map and leave *depth_map* at "
    "*near is bright*.",
    "controlnet_two": "### Two at once\nEach *Apply* adds its ControlNet to those before. "
    "Together they steer more strongly, so both have less than strength 1.",
    "upscale": "### Larger\nThe picture is made four times as wide and high, and *SD3.5 Upscale* "
    "draws its details anew, in tiles of the size that the model draws well. The blur ControlNet "
    "keeps it faithful; **denoise** says how much is invented.\n\nFor your own picture put *Load "
    "Image* in the place of *VAE Decode*, and say in the prompt what it shows. With SD3.5 Large "
    "take its blur ControlNet and tiles of 1024.",
    "medium": "### SD3.5 Medium\nStability AI's recipe: 50 steps, cfg 5, dpmpp_2m, shift 3.\n\n"
    + FILES.format(files="*sd3.5_medium* in models/checkpoints"),
    "medium_skip_layers": "### SD3.5 Medium + Skip Layer Guidance\nGuides away from what the model "
    "draws without layers 7, 8 and 9, in steps 1 to 9 of 50: hands, bodies and structure get "
    "better. It adds to the prompt's guidance, so cfg is 4, not 5. The rest is Stability AI's "
    "recipe for Medium.\n\n" + FILES.format(files="*sd3.5_medium* in models/checkpoints"),
    "large": "### SD3.5 Large\nStability AI's recipe: 40 steps, cfg 4.5, dpmpp_2m, shift 3.\n\n"
    + FILES.format(files=LARGE),
    "large_turbo": "### SD3.5 Large Turbo\nDistilled to draw in 4 steps without guidance: cfg 1, "
    "euler, shift 3. At cfg 1 the negative prompt does nothing.\n\n"
    + FILES.format(files="*sd3.5_large_turbo* in models/checkpoints"),
    "large_canny": "### SD3.5 Large + canny\nThe picture's edges stay, the rest comes from the "
    "prompt. Stability AI's recipe: 60 steps, cfg 3.5, euler, shift 3.\n\n"
    + control_files("canny"),
    "large_blur": "### SD3.5 Large + blur\nMakes a small or soft picture a sharp one: colours and "
    "masses stay, the details come from the prompt, which should say what the picture shows. "
    "Stability AI's recipe: 60 steps, cfg 3.5, euler, shift 3.\n\n" + control_files("blur"),
    "large_depth": "### SD3.5 Large + depth\nThe shape stays, the rest comes from the prompt. Load "
    "a depth map, or put a depth node after *Load Image*: bright is near. Stability AI's recipe: "
    "60 steps, cfg 3.5, euler, shift 3.\n\n" + control_files("depth"),
    "lora": f"### A LoRA on SD3.5 Large\n*{LORA.removesuffix('.safetensors')}* of Shakker Labs "
    "draws in ink when the prompt says *Chinese line art*. Any LoRA for SD3.5 does instead, in "
    "diffusers', kohya's or OneTrainer's form; one for Medium wants Medium. The rest is Stability "
    "AI's recipe for Large.\n\n" + FILES.format(files=f"{LARGE}, the LoRA in models/loras"),
}
SMALL_ENCODERS = dict.fromkeys(("clip_l", "clip_g", "t5xxl", "vae"), "from model file")
SMALL_SIDE = 128
CAPTION = "drawn by the small model"
SMALL_PROMPTS = {
    "medium": "a big owl on a green background",
    "medium_skip_layers": "a big robot on a teal background",
    "large": "a big castle on an orange and pink gradient",
    "large_turbo": "a big balloon on a sky blue background",
    "large_canny": "a big rabbit on a lime background",
    "large_blur": "a big dress on a sky blue and lime gradient",
    "large_depth": "a big teddy bear on a green background",
    "lora": "a big panda on a white background",
}
"""What the small model draws for the thumbnails: it knows few words."""

SAME_SEED = {"compare", "quantize", "sweep", "train_lora"}
"""Where every run starts from one seed; elsewhere the last sampler takes a new one each time."""

FILL = """({prompt, note, fixed}) => {
    const graph = window.app.graph;
    const words = {SD35Quantize: 320, SD35SkipLayerSweep: 60, SD35TrainLoRA: 64};
    for (const [id, {inputs}] of Object.entries(prompt)) {
        const node = graph.getNodeById(id);
        const [width, height] = node.computeSize();
        node.setSize([width, height + (words[node.type] ?? 0)]);
        for (const widget of node.widgets ?? []) {
            const value = inputs[widget.name];
            if (value !== undefined && !Array.isArray(value)) widget.value = value;
        }
        const control = node.widgets?.find(w => w.name === "control_after_generate");
        if (control) control.value = fixed.includes(id) ? "fixed" : "randomize";
    }
    const node = window.LiteGraph.createNode("MarkdownNote");
    graph.add(node);
    node.widgets[0].value = note;
    return JSON.stringify(graph.serialize());
}"""
"""Gives the nodes their sizes, with room under those that write much, and adds the note. Widgets
are set again: a panel may have filled them with the model's recipe on opening."""


def build(page: Any, prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """The canvas workflow of an API prompt, as the front end writes it."""
    page.evaluate("() => window.app.clean()")  # pictures of the last one count into nodes' sizes
    page.evaluate("async ([p, n]) => { await window.app.loadApiJson(p, n); }", [prompt, name])
    page.wait_for_timeout(500)
    fixed = [key for key in prompt if name in SAME_SEED or is_first(prompt, key)]
    arguments = {"prompt": prompt, "note": NOTES[name], "fixed": fixed}
    made = json.loads(page.evaluate(FILL, arguments))
    for node in made["nodes"]:
        files = [value for value in node.get("widgets_values", ()) if value in tuple(MODELS)]
        if files:
            node["properties"]["models"] = [download(file) for file in files]
    return as_app(laid_out(made), name)


def is_first(prompt: dict[str, Any], key: str) -> bool:
    """Whether a sampler draws what another one goes on from."""
    return prompt[key]["_meta"]["title"] == "First picture"


def download(file: str) -> dict[str, str]:
    """What the front end offers to download when the file is missing."""
    directory, address = MODELS[file]
    return {"name": file, "url": f"{address}/{file}", "directory": directory}


def files_of(prompt: dict[str, Any]) -> list[str]:
    """The files of a workflow that have to be downloaded."""
    values = (value for node in prompt.values() for value in node["inputs"].values())
    return [value for value in values if isinstance(value, str) and value in MODELS]


def with_small_model(
    prompt: dict[str, Any], text: str | None = None, lora: str | None = None
) -> dict[str, Any]:
    """A workflow for a large model with the files and settings of the one in the pack.

    `text` replaces the prompt; its LoRA gives way to `lora`, or is left out.
    """
    from sd35_core.sampling.recipes import RECIPES

    recipe = RECIPES["sd35_nano"]
    steps = {k: getattr(recipe, k) for k in ("steps", "cfg", "shift", "sampler", "schedule")}
    instead: dict[str, dict[str, Any]] = {
        "SD35Loader": {"model": "sd35_nano.safetensors", **SMALL_ENCODERS},
        "EmptySD3LatentImage": {"width": SMALL_SIDE, "height": SMALL_SIDE},
        "SD35Sampler": steps,
        "SkipLayerGuidance": {"layers": "1"},
        "LoraLoaderModelOnly": {"lora_name": lora},
    }
    small = copy.deepcopy(prompt)
    for key, node in prompt.items():
        inputs = small[key]["inputs"]
        inputs.update(instead.get(node["class_type"], {}))
        if text is not None and inputs.get("text"):
            inputs["text"] = text
        if node["class_type"] == "SD35ControlNetLoader":
            control_net = inputs["control_net"]
            inputs["control_net"] = control_net.replace("sd3.5_large_controlnet", "sd35_nano")
        if node["class_type"] == "LoraLoaderModelOnly" and lora is None:
            without(small, key, "model")
    return small


def drawn(prompt: dict[str, Any]) -> dict[str, Any]:
    """A workflow without what writes files beside models."""
    return {key: node for key, node in prompt.items() if node["class_type"] != "SD35Quantize"}


def without(prompt: dict[str, Any], key: str, passed: str) -> None:
    """Take out a node; what it gave comes from its input `passed`."""
    source = prompt.pop(key)["inputs"][passed]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == key:
                node["inputs"][name] = source


def thumbnail(url: str, prompt: dict[str, Any], path: Path, caption: str = "") -> None:
    """What the workflow draws, with what it shows on the way small in a corner."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    history = host.run_prompt(url, prompt)
    saved = [key for key in history["outputs"] if prompt[key]["class_type"] == "SaveImage"]
    shown = sorted((key for key in history["outputs"] if key not in saved), key=int)
    history["outputs"] = {key: history["outputs"][key] for key in shown + saved}
    found = [Image.open(io.BytesIO(data)).convert("RGB") for data in host.pictures(url, history)]
    sheet = ImageOps.pad(found.pop(), (512, 512), Image.Resampling.LANCZOS, color="white")
    for place, picture in enumerate(found):
        inset = ImageOps.expand(picture.resize((136, 136), Image.Resampling.LANCZOS), 4, "white")
        sheet.paste(inset, (12 + 156 * place, 12))
    if caption:
        draw = ImageDraw.Draw(sheet, "RGBA")
        draw.rectangle((0, 480, 512, 512), fill=(0, 0, 0, 150))
        draw.text((256, 496), caption, "white", ImageFont.load_default(18), anchor="mm")
    write_picture(path, sheet, replace=True, quality=88)


def main() -> int:
    found = host.find_comfyui()
    if not host.started_again():
        return host.start_again(found.python, __file__)
    from tools import browser

    paths = sorted((FOLDER / "api").glob("*.json"))
    wanted = sys.argv[1:] or [path.stem for path in paths]
    prompts = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in paths
        if path.stem in wanted
    }
    with host.Server(found) as server:
        for name, prompt in prompts.items():
            caption = CAPTION if files_of(prompt) else ""
            small = with_small_model(prompt, SMALL_PROMPTS[name]) if caption else prompt
            thumbnail(server.url, drawn(small), FOLDER / f"{name}.jpg", caption)
        with browser.canvas(server.url) as page:
            for name, prompt in prompts.items():
                made = build(page, prompt, name)
                text = json.dumps(made, indent=1, ensure_ascii=False)
                write_text(FOLDER / f"{name}.json", text + "\n", replace=True)
                print(f"Wrote workflows/{name}.json and its thumbnail")
        with browser.canvas(server.url) as page:
            browser.load(page, json.loads((FOLDER / f"{SHOWN}.json").read_text(encoding="utf-8")))
            browser.run(page)
            canvas = host.PACK / "web" / "docs" / "canvas.png"
            write_whole(canvas, page.screenshot(), replace=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
