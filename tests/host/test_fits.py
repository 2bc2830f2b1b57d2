"""What ComfyUI's own VAE and T5 take, against what the check reckons with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd35_core.workflow.memory import phases
from sd35_core.workflow.setup import Card, Encoders, Latent, Setup, Vae
from tools import host as hosts

SIDE, LAYERS = 512, 2
MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
what, sys.argv = sys.argv[2], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from comfy.text_encoders.sd3_clip import T5XXLModel

def of_this_process(kind):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])

def decoder():
    shape = dict(ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[],
                 in_channels=3, resolution=256, z_channels=16)
    return Decoder(**shape).bfloat16()

def t5():
    config = {"t5xxl_model_config": {"num_layers": LAYERS}}
    return T5XXLModel(dtype=torch.float16, model_options=config)

with torch.no_grad():
    decoder()(torch.randn(1, 16, 8, 8).bfloat16())  # what libraries take once is outside
    before = of_this_process("VmRSS")
    made = {"vae": decoder, "t5": t5}[what]()
    for parameter in made.parameters():
        parameter.data.zero_()
    open("/proc/self/clear_refs", "w").write("5")
    if what == "vae":
        made(torch.randn(1, 16, SIDE // 8, SIDE // 8).bfloat16())
    else:
        made.encode_token_weights([[(5, 1.0)] * 77])
    seen = of_this_process("VmHWM") - before
    print(json.dumps([sum(p.nbytes for p in made.parameters()), seen]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux alone")
@pytest.mark.parametrize("what", ["vae", "t5"])
def test_the_hosts_own_models_take_what_is_reckoned_within_10_percent(
    comfyui: hosts.Host, what: str
) -> None:
    script = MEASURE.replace("SIDE", str(SIDE)).replace("LAYERS", str(LAYERS))
    done = subprocess.run(
        [str(comfyui.python), "-c", script, str(comfyui.folder), what], check=True,
        capture_output=True, encoding="utf-8",
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    weights, seen = json.loads(done.stdout.splitlines()[-1])
    setup = {
        "vae": Setup(vae=Vae(weights, 256), latent=Latent(SIDE, SIDE, 1)),
        "t5": Setup(encoders=Encoders(weights=weights, t5_weights=weights, largest=4096 * 10240)),
    }[what]
    (need,) = phases(setup, Card(24 * 10**9))
    share = need.total / seen
    sys.stdout.write(f"{what}: {share:.3f} of {seen / 1e9:.2f} GB\n")
    assert abs(share - 1) < 0.1, (need, share)
