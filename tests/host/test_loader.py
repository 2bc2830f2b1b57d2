"""SD35Loader in this process: layouts, encoders, variants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd35_core.checkpoint.tensor_file import TensorFile, write_file
from sd35_core.encoders.t5 import T5Config, T5Encoder, t5_tokenizer
from sd35_core.packing.formats import FP8, RAW_FP8
from sd35_core.packing.kitchen import NVFP4
from sd35_core.pipeline import Pipeline
from sd35_core.quantization.plan import Plan
from sd35_core.quantization.quantize import quantize_file
from tools import host as hosts
from tools.nano.prepare import clip_tokenizer

from ..conftest import NANO
from ..unit.files import to_diffusers
from ..unit.models import random_weights
from .cases import SMALL, difference

WHOLE = {"clip_l": None, "clip_g": None, "t5xxl": None}
PROMPT = "a small avocado at the top left"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model as separate files, named with a space, an umlaut and Chinese."""
    folder = tmp_path_factory.mktemp("einzelne Stücke 零件")
    prefixes = {
        "model": "model.diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "vae": "first_stage_model.",
    }
    with safe_open(NANO, framework="pt") as file:
        metadata = file.metadata()
    whole, paths = load_file(NANO), {}
    for name, prefix in prefixes.items():
        paths[name] = folder / f"{name}.safetensors"
        tensors = {k[len(prefix) :]: t for k, t in whole.items() if k.startswith(prefix)}
        save_file(tensors, paths[name], metadata=metadata)
    return paths


def encode(clip: Any, text: str = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def test_one_file_and_separate_files_are_the_same(
    comfy: SimpleNamespace, parts: dict[str, Path]
) -> None:
    whole, alone = comfy.loading.read(NANO), comfy.loading.read(parts["model"])
    encoders = {name: str(parts[name]) for name in ("clip_l", "clip_g")}
    for seen, expected in zip(
        encode(comfy.text.clip_from(alone, encoders)), encode(comfy.text.clip_from(whole, WHOLE))
    ):
        assert torch.equal(seen, expected)
    first, second = (comfy.loading.model_from(file, "default") for file in (whole, alone))
    weights = second.model.diffusion_model.state_dict()
    for key, tensor in first.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor, weights[key])
    vaes = [comfy.loading.vae_from(f) for f in (whole, comfy.loading.read(parts["vae"]))]
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(vae.decode(latent) for vae in vaes))


def test_diffusers_layout_samples_alike(
    comfy: SimpleNamespace, ours: Any, ksampler: Any, tmp_path: Path
) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(to_diffusers(random_weights(SMALL)), path)
    model = comfy.loading.load_model(str(path), "default")
    assert torch.equal(ksampler(model), ksampler(ours))


@pytest.mark.parametrize("missing", ["clip_l", "clip_g"])
def test_an_encoder_that_is_left_out_is_zero(comfy: SimpleNamespace, missing: str) -> None:
    file = comfy.loading.read(NANO)
    context, pooled = encode(comfy.text.clip_from(file, WHOLE))
    some, some_pooled = encode(
        comfy.text.clip_from(file, {k: v for k, v in WHOLE.items() if k != missing})
    )
    left = slice(0, 48) if missing == "clip_l" else slice(48, 112)
    for seen, expected in ((some, context), (some_pooled, pooled)):
        assert not seen[..., left].any()
        kept = torch.ones(seen.shape[-1], dtype=torch.bool)
        kept[left] = False
        assert torch.equal(seen[..., kept], expected[..., kept])


def test_weighted_and_long_prompts_are_encoded(comfy: SimpleNamespace) -> None:
    clip = comfy.text.clip_from(comfy.loading.read(NANO), WHOLE)
    plain, weighted = encode(clip)[0], encode(clip, "a (small:1.5) avocado at the top left")[0]
    assert plain.shape == weighted.shape == (1, 77, 4096)
    assert difference(weighted, plain) > 0
    assert encode(clip, "an avocado and " * 60)[0].shape == (1, 231, 4096)


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a T5 of random weights."""
    torch.manual_seed(1)
    t5 = T5Encoder(T5Config(64, 4, 2))
    t5.initialise()
    file = TensorFile(NANO)
    described = json.loads(file.metadata["sd35_config"])
    described["text_encoders"]["t5xxl"] = t5.config.described()
    tensors = {f"text_encoders.t5xxl.transformer.{k}": t for k, t in t5.half().state_dict().items()}
    path = tmp_path_factory.mktemp("t5") / "with_t5.safetensors"
    write_file(path, {**file, **tensors}, {**file.metadata, "sd35_config": described})
    return path


@pytest.mark.parametrize("caption", ["", PROMPT, "an avocado and " * 60])
def test_a_small_t5_reads_as_in_the_core(
    comfy: SimpleNamespace, comfyui: hosts.Host, with_t5: Path, caption: str
) -> None:
    clip = comfy.text.clip_from(comfy.loading.read(with_t5), WHOLE)
    assert comfy.text.names_in(clip) == ["clip_l", "clip_g", "t5xxl"]
    words = t5_tokenizer(comfyui.folder / "comfy" / "text_encoders" / "t5_tokenizer")
    expected, pooled = Pipeline.load(with_t5, clip_tokenizer(), words).encode([caption])
    context, seen = encode(clip, caption)
    assert difference(context, expected) < 1e-4 and difference(seen, pooled) < 1e-4
    deaf = comfy.text.clip_from(comfy.loading.read(with_t5), {"clip_l": None, "clip_g": None})
    assert torch.equal(encode(deaf, caption)[0], context[:, :77])


def test_a_model_with_a_small_t5_is_saved_and_loaded_whole(
    comfy: SimpleNamespace, with_t5: Path, tmp_path: Path
) -> None:
    file = comfy.loading.read(with_t5)
    clip = comfy.text.clip_from(file, WHOLE)
    model, vae = comfy.loading.model_from(file, "default"), comfy.loading.vae_from(file)
    saved = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(saved), model, clip, vae)
    again = comfy.text.clip_from(comfy.loading.read(saved), WHOLE)
    assert difference(encode(again, PROMPT)[0], encode(clip, PROMPT)[0]) < 1e-3


@pytest.mark.parametrize(
    ("plan", "most"), [(Plan(8), 0.05), (Plan(8, FP8), 0.1), (Plan(4, four=NVFP4), 0.4)]
)
def test_a_quantized_t5_reads_nearly_as_before(
    comfy: SimpleNamespace, with_t5: Path, tmp_path: Path, plan: Plan, most: float
) -> None:
    """In ComfyUI's own text path, which knows these formats."""
    prefix = "text_encoders.t5xxl.transformer."
    file = TensorFile(with_t5)
    alone = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
    save_file(alone, tmp_path / "t5.safetensors")
    form = plan.eight if plan.bits == 8 else plan.four
    if form not in comfy.quant_algos:
        pytest.skip(f"this ComfyUI knows no {form}")
    out, report = quantize_file(tmp_path / "t5.safetensors", plan)
    assert {layer.name.split(".")[-2] for layer in report.layers} == {
        "q", "k", "v", "o", "wi_0", "wi_1", "wo",
    }  # fmt: skip
    paths = {"clip_l": None, "clip_g": None, "t5xxl": str(out)}
    whole, packed = (comfy.text.clip_from(comfy.loading.read(with_t5), p) for p in (WHOLE, paths))
    seen, expected = (encode(clip, PROMPT)[0][:, 77:] for clip in (packed, whole))
    assert 1e-4 < difference(seen, expected) < most
    with pytest.raises(Exception, match="does not know 2 bits of this pack"):
        quantize_file(tmp_path / "t5.safetensors", Plan(2))


def test_a_packed_clip_is_refused_and_a_cast_one_is_not(tmp_path: Path) -> None:
    prefix = "text_encoders.clip_l.transformer."
    file = TensorFile(NANO)
    alone = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
    save_file(alone, tmp_path / "clip_l.safetensors")
    with pytest.raises(Exception, match="CLIP is read by ComfyUI, which knows no packed layers"):
        quantize_file(tmp_path / "clip_l.safetensors", Plan(8))
    _, report = quantize_file(tmp_path / "clip_l.safetensors", Plan(8, RAW_FP8))
    assert report.after < report.before and {layer.form for layer in report.layers} == {RAW_FP8}


def test_a_published_clip_l_goes_through_the_hosts_loader(
    comfy: SimpleNamespace, tmp_path: Path
) -> None:
    from comfy.sd1_clip import SDClipModel

    reference = SDClipModel(device="cpu", dtype=torch.float16).transformer
    for parameter in reference.parameters():
        parameter.data = torch.full_like(parameter, 0.01)
    path = tmp_path / "clip_l.safetensors"
    save_file({k: t.contiguous() for k, t in reference.state_dict().items()}, path)
    clip = comfy.text.clip_from(comfy.loading.read(NANO), {"clip_l": str(path)})
    assert comfy.text.names_in(clip) == ["clip_l"]
    context, pooled = encode(clip)
    assert context.shape[-1] == 4096 and pooled.shape == (1, 2048)


def test_the_shipped_model_is_small_and_described(comfy: SimpleNamespace) -> None:
    assert NANO.stat().st_size <= 40e6
    file = comfy.loading.read(NANO)
    model = comfy.loading.model_from(file, "default")
    config = model.model.diffusion_model.config
    assert config.qk_norm and config.dual_blocks and config.in_channels == 16
    clip = comfy.text.clip_from(file, WHOLE)
    words = comfy.loading.summary(file, model, comfy.text.names_in(clip))
    assert words == "SD3.5 nano: 11.0 M parameters, float32. Text encoders: clip_l, clip_g."


def test_the_host_can_make_a_model_without_dynamic_weights(
    comfy: SimpleNamespace, small: Path
) -> None:
    model = comfy.loading.load_model(str(small), "default")
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert type(again.model) is type(model.model)
    clip = comfy.text.clip_from(comfy.loading.read(NANO), WHOLE)
    factory, arguments = clip.patcher.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not None


def test_files_are_found_in_the_hosts_folders_and_the_packs(
    comfy: SimpleNamespace, base: Path, small: Path
) -> None:
    shutil.copy(small, base / "models" / "checkpoints" / "small.safetensors")
    try:
        names = comfy.files.model_files()
        assert names[0] == NANO.name
        assert comfy.files.model_path(NANO.name) == NANO.resolve()
        assert comfy.files.model_path("small.safetensors") == small
        both = comfy.files.model_path("checkpoints/small.safetensors")
        assert both == base / "models" / "checkpoints" / "small.safetensors"
        assert len(names) == len(set(names))
    finally:
        (base / "models" / "checkpoints" / "small.safetensors").unlink()
    with pytest.raises(Exception, match="'gone.safetensors' is not in ComfyUI's"):
        comfy.files.model_path("gone.safetensors")


@pytest.mark.parametrize("name", ["../small.safetensors", "/etc/passwd", "..\\..\\x.safetensors"])
def test_no_path_leads_out_of_the_folders(comfy: SimpleNamespace, name: str) -> None:
    with pytest.raises(Exception, match="is not in ComfyUI's"):
        comfy.files.model_path(name)
    with pytest.raises(Exception, match="is not in ComfyUI's"):
        comfy.files.path_in("vae", name)
