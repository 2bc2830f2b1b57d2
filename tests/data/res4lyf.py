"""A pack beside ours with a node of the same id, and the inputs of RES4LYF's."""


class SD35Loader:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "RES4LYF/loaders", "load", ("STRING",), True

    @classmethod
    def INPUT_TYPES(cls):
        clips = (["clip_g.safetensors", ".none", ".use_ckpt_clip"],)
        return {
            "required": {
                "model_name": (["sd3.5_medium.safetensors"],),
                "weight_dtype": (["default", "fp8_e4m3fn"],),
                "clip_name1": clips,
                "clip_name2_opt": clips,
                "clip_name3_opt": clips,
                "vae_name": ([".use_ckpt_vae"],),
            }
        }

    def load(self, model_name, **_):
        return {"ui": {"text": [f"theirs: {model_name}"]}, "result": (model_name,)}


NODE_CLASS_MAPPINGS = {"SD35Loader": SD35Loader}
