"""Write a trained run as one checkpoint: python -m tools.nano.export CONFIG.toml VAE OUT

The moving average's weights in fp16, under the keys of a single-file SD3.5 checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file

from sd35_core.checkpoint import write_file
from sd35_core.training import Run, read_config


def export(config_path: Path, vae_path: Path, out: Path) -> None:
    """Raises SettingError or CheckpointError for a configuration or run that can't be read."""
    run = Run(read_config(config_path))
    run.resume()
    trained = run.averaged()
    parts = {
        "model.diffusion_model.": trained.diffusion_model.state_dict(),
        "text_encoders.clip_l.transformer.": trained.clip_l.state_dict(),
        "text_encoders.clip_g.transformer.": trained.clip_g.state_dict(),
        "first_stage_model.": load_file(vae_path),
    }
    tensors = {
        prefix + key: tensor.half()
        for prefix, part in parts.items()
        for key, tensor in part.items()
    }
    described = {
        "architecture": "sd3.5_medium",
        "text_encoders": {
            "clip_l": trained.clip_l.config.described(),
            "clip_g": trained.clip_g.config.described(),
        },
        "steps_trained": run.step,
        **run.config.metadata,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, tensors, {"sd35_config": described, "modelspec.title": "SD3.5 nano"})
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB) from step {run.step}")


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:4]))
