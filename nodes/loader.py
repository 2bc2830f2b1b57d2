"""SD35Loader: files -> MODEL, CLIP, VAE."""

from __future__ import annotations

from comfy_api.latest import io

from ..sd35_core.workflow.own_nodes import ALIAS, FROM_MODEL, LOADER, NAMES, NONE
from .host import files, loading, text
from .host.memory import enough_memory
from .host.report import told
from .host.resting import AUTO, MODES


class SD35Loader(io.ComfyNode):
    """Loads any SD3 or SD3.5 model, from one file or from several."""

    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        encoders = [FROM_MODEL, NONE, *files.listed("text_encoders")]
        return io.Schema(
            node_id=LOADER,
            display_name=NAMES[LOADER],
            category="SD3.5",
            description="Loads Stable Diffusion 3 or 3.5: one checkpoint, or a diffusion model "
            "with text encoders and VAE beside it. Says which variant it found.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=files.model_files(),
                    tooltip="Checkpoint or diffusion model, in Stability's, ComfyUI's or "
                    "diffusers' layout. sd35_nano.safetensors comes with the pack.",
                ),
                io.Combo.Input(
                    "clip_l",
                    options=encoders,
                    tooltip="CLIP-L. 'from model file' takes it from a checkpoint if it is there.",
                ),
                io.Combo.Input(
                    "clip_g",
                    options=encoders,
                    tooltip="CLIP-G. 'from model file' takes it from a checkpoint if it is there.",
                ),
                io.Combo.Input(
                    "t5xxl",
                    options=encoders,
                    tooltip="T5-XXL, optional: 'none' saves 5 to 10 GB and costs long prompts "
                    "and lettering some accuracy.",
                ),
                io.Combo.Input(
                    "vae",
                    options=[FROM_MODEL, NONE, *files.listed("vae")],
                    tooltip="SD3.5's VAE has 16 channels; those of SD 1.5 and SDXL don't fit.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(loading.WEIGHT_DTYPES),
                    tooltip="How the diffusion model's weights are kept. fp8 halves their memory "
                    "and changes the picture a little; default keeps what the file has.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "modulation_cache",
                    options=list(MODES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="A third of the weights depend on step and prompt alone. With the "
                    "cache they are used once at a run's start and stay off the card: the same "
                    "picture, less memory. auto: when the model doesn't fit.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The text encoders together."),
                io.Vae.Output(tooltip="Turns latents into pictures and back."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, model: str, clip_l: str, clip_g: str, t5xxl: str, vae: str, **_: str
    ) -> list[str]:
        """Changes when a chosen file is replaced, so that it is loaded again."""
        encoders = {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl}
        paths = [files.model_path(model), *encoder_paths(encoders).values()]
        if vae not in (FROM_MODEL, NONE):
            paths.append(files.path_in("vae", vae))
        return [files.fingerprint(path) for path in paths if path is not None]

    @classmethod
    def execute(
        cls,
        model: str,
        clip_l: str,
        clip_g: str,
        t5xxl: str,
        vae: str,
        weight_dtype: str,
        modulation_cache: str = AUTO,
    ) -> io.NodeOutput:
        with enough_memory(
            f"loading '{model}'",
            "Close other programs, take a file in fp8 or one from SD35Quantize, or do without "
            "t5xxl.",
        ):
            file = loading.read(files.model_path(model))
            patcher = loading.model_from(file, weight_dtype, modulation_cache)
            encoders = encoder_paths({"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl})
            clip = text.clip_from(file, encoders) if encoders else None
            if vae == NONE:
                decoder = loading.no_vae()
            elif vae == FROM_MODEL:
                decoder = loading.vae_from(file)
            else:
                decoder = loading.vae_from(loading.read(files.path_in("vae", vae)))
        said = loading.summary(file, patcher, text.names_in(clip))
        return io.NodeOutput(patcher, clip, decoder, ui=told(said, cls.hidden.unique_id))


class SD35ModelLoader(SD35Loader):
    """The same node under a name that no other pack has; RES4LYF has an SD35Loader too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = SD35Loader.define_schema()
        schema.node_id = ALIAS
        schema.display_name = NAMES[ALIAS]
        schema.category = "SD3.5/beside RES4LYF"
        schema.description = (
            "SD3.5 Loader under another name: the pack RES4LYF has a node SD35Loader as well, and "
            "ComfyUI keeps one of them. Workflows with ours are opened with this one then."
        )
        return schema


def encoder_paths(chosen: dict[str, str]) -> dict[str, str | None]:
    """Encoder -> its file, or None for the model's own; those set to 'none' are left out."""
    return {
        name: None if value == FROM_MODEL else str(files.path_in("text_encoders", value))
        for name, value in chosen.items()
        if value != NONE
    }
