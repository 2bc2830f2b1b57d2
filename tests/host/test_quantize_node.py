"""SD35Quantize: a file beside the original, calibrated by really drawing; what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sd35_core.checkpoint.tensor_file import TensorFile

from ..conftest import NANO, PACK
from .cases import difference, lora

PROMPTS = "a big avocado on a pink background\na small owl on a blue background"
DEPTH = PACK / "models" / "nano" / "controlnet" / "sd35_nano_depth.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copies of the small model and one of its ControlNets, for files to be written beside."""
    for path in (NANO, DEPTH):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path


@pytest.fixture
def parts(comfy: SimpleNamespace, folder: Path) -> SimpleNamespace:
    """MODEL, CLIP, VAE and CONTROL_NET of these copies."""
    path, host = folder / NANO.name, comfy.host_controlnet
    file = comfy.loading.read(path)
    return SimpleNamespace(
        model=comfy.loading.load_model(str(path), "default"),
        clip=comfy.text.clip_from(file, {"clip_l": None, "clip_g": None}),
        vae=comfy.loading.vae_from(file),
        control=host.controlnet_from(comfy.loading.read(folder / DEPTH.name), host.Options()),
    )


@pytest.fixture
def quantize(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node -> its report."""
    node = comfy.quantize.SD35Quantize
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None))

    def run(format: str, **inputs: Any) -> str:
        settings = {"prompts": PROMPTS, "side": 128, "steps": 2, **inputs}
        return node.execute(format, **settings).ui["text"][0]

    return run


def test_a_model_is_written_beside_the_original(
    comfy: SimpleNamespace, folder: Path, parts: Any, quantize: Any, ksampler: Any
) -> None:
    conds = [comfy.calibration.encoded(parts.clip, p) for p in PROMPTS.splitlines()]
    settings = {"positive": conds[0], "negative": conds[1]}
    expected = ksampler(parts.model, **settings)
    errors = {}
    for name, format, given in (
        ("int8", "8 bit (int8)", {}),
        ("2bit_adaln8_datafree", "2 bit", {}),
        ("2bit_adaln8", "2 bit", {"clip": parts.clip}),
    ):
        report = quantize(format, model=parts.model, **given)
        out = folder / f"sd35_nano_{name}.safetensors"
        assert str(out) in report and ("without calibration" in report) == ("clip" not in given)
        assert out.stat().st_size < NANO.stat().st_size
        again = comfy.loading.load_model(str(out), "default")
        errors[name] = difference(ksampler(again, **settings), expected)
        assert "captions" not in report, "whose pictures were not counted"
    assert errors["int8"] < 0.1 and errors["2bit_adaln8"] < errors["2bit_adaln8_datafree"]
    file = TensorFile(folder / "sd35_nano_2bit_adaln8.safetensors")
    assert any(key.startswith("text_encoders.") for key in file), "the other parts are kept"


def test_bits_where_they_matter_fit_a_size(
    comfy: SimpleNamespace, folder: Path, parts: Any, quantize: Any, ksampler: Any
) -> None:
    fit = {"model": parts.model, "clip": parts.clip, "size": 0.009}
    report = quantize("to fit a size", **fit)
    out = folder / "sd35_nano_0.009gb.safetensors"
    assert str(out) in report and "fitted to 0.009 GB (calibrated)" in report
    file = TensorFile(out)
    parts_of_model = [k for k in file if k.startswith("model.diffusion_model.")]
    taken = sum(file[k].numel() * file[k].element_size() for k in parts_of_model)
    assert 0.93 * 9e6 < taken < 1.01 * 9e6
    forms = {bytes(file[k].tolist()) for k in parts_of_model if k.endswith("comfy_quant")}
    assert len(forms) > 1
    conds = [comfy.calibration.encoded(parts.clip, p) for p in PROMPTS.splitlines()]
    settings = {"positive": conds[0], "negative": conds[1]}
    again = comfy.loading.load_model(str(out), "default")
    assert difference(ksampler(again, **settings), ksampler(parts.model, **settings)) < 0.5
    with pytest.raises(Exception, match="smallest that can be made of it is"):
        quantize("to fit a size", **{**fit, "size": 0.002})
    with pytest.raises(Exception, match="connect model and clip"):
        quantize("to fit a size", model=parts.model)


def test_a_controlnet_is_calibrated_on_its_base(
    comfy: SimpleNamespace, folder: Path, parts: Any, quantize: Any
) -> None:
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    report = quantize(
        "2 bit", model=parts.model, control_net=parts.control, clip=parts.clip, vae=parts.vae,
        image=image,
    )  # fmt: skip
    out = folder / "sd35_nano_depth_2bit_adaln8.safetensors"
    assert str(out) in report and "2 bits (calibrated)" in report
    host = comfy.host_controlnet
    loaded = host.controlnet_from(comfy.loading.read(out), host.Options())
    assert loaded.config.control_type == "depth"
    assert quantize("8 bit (fp8)", control_net=parts.control)
    with pytest.raises(Exception, match="connect its hint to image"):
        quantize("2 bit", model=parts.model, control_net=parts.control, clip=parts.clip)
    with pytest.raises(Exception, match="connect its base to model too"):
        quantize("2 bit", control_net=parts.control, clip=parts.clip)


def test_what_has_no_file_of_its_own_is_refused(
    comfy: SimpleNamespace, folder: Path, parts: Any, quantize: Any, small: Path
) -> None:
    before = set(folder.iterdir())
    with pytest.raises(Exception, match="Connect a model or a ControlNet"):
        quantize("8 bit (int8)")
    patched, _ = comfy.sd.load_lora_for_models(parts.model, None, lora("kohya"), 1.0, 0)
    with pytest.raises(Exception, match="carries a LoRA or a merge"):
        quantize("8 bit (int8)", model=patched)
    with pytest.raises(Exception, match="needs a ControlNet from SD35ControlNetLoader"):
        quantize("8 bit (int8)", control_net=object())
    stock = comfy.sd.load_diffusion_model(str(small))
    with pytest.raises(Exception, match="needs a model from SD35Loader"):
        quantize("2 bit", model=stock, clip=parts.clip)
    quantize("8 bit (int8)", model=parts.model)
    twice = comfy.loading.load_model(str(folder / "sd35_nano_int8.safetensors"), "default")
    with pytest.raises(Exception, match="quantized already"):
        quantize("2 bit", model=twice)
    assert {path.name for path in set(folder.iterdir()) - before} == {"sd35_nano_int8.safetensors"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits a file's size as POSIX does")
def test_a_full_disk_leaves_the_older_file(folder: Path, parts: Any, quantize: Any) -> None:
    import resource

    older = folder / "sd35_nano_int8.safetensors"
    older.write_bytes(b"older")
    before = set(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        with pytest.raises(Exception, match=r"could not be written \(30 MB\).*Make room"):
            quantize("8 bit (int8)", model=parts.model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(folder.iterdir()) == before and older.read_bytes() == b"older"


def test_a_file_that_another_wrote_stays_and_the_report_says_so(
    folder: Path, parts: Any, quantize: Any
) -> None:
    name, second = (folder / f"sd35_nano_int8{end}.safetensors" for end in ("", "_2"))
    name.symlink_to(folder / NANO.name)
    source = (folder / NANO.name).read_bytes()
    for _ in range(2):
        report = quantize("8 bit (int8)", model=parts.model)
        assert f"'{name.name}' is there already and was not written by SD3.5 Quantize" in report
        assert f"Wrote {second}:" in report
    assert name.is_symlink() and (folder / NANO.name).read_bytes() == source
    name.unlink()
    for _ in range(2):
        report = quantize("8 bit (int8)", model=parts.model)
        assert f"Wrote {name}:" in report and "is there already" not in report
    assert {path.name for path in folder.iterdir()} == {
        NANO.name, DEPTH.name, name.name, second.name,
    }  # fmt: skip


def test_a_cancelled_run_leaves_nothing(
    comfy: SimpleNamespace, folder: Path, parts: Any, quantize: Any
) -> None:
    import comfy.model_management as management

    before = set(folder.iterdir())
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        quantize("8 bit (int8)", model=parts.model)
    assert set(folder.iterdir()) == before


def test_a_model_of_the_pack_is_written_into_the_hosts_folder(
    comfy: SimpleNamespace, base: Path, quantize: Any
) -> None:
    before = set(NANO.parent.iterdir())
    model = comfy.loading.load_model(str(NANO), "default")
    clip = comfy.text.clip_from(comfy.loading.read(NANO), {"clip_l": None, "clip_g": None})
    for name, score, format, given in (
        ("fp8", "97.2%", "8 bit (fp8)", {}),
        ("int8", "97.4%", "8 bit (int8)", {}),
        ("2bit_adaln8_datafree", "83.8%", "2 bit", {}),
        ("2bit_adaln8", "90.6%", "2 bit", {"clip": clip}),
    ):
        report = quantize(format, model=model, **given)
        out = base / "models" / "diffusion_models" / f"sd35_nano_{name}.safetensors"
        assert (
            report.startswith(f"Wrote {out}: 22.5 MB ->") and set(NANO.parent.iterdir()) == before
        )
        assert f"97.4% before, {score} after" in report
        comfy.files.folder_paths.filename_list_cache.clear()
        assert out.name in comfy.files.model_files()
        assert comfy.files.model_path(out.name) == out
        out.unlink()


def test_the_figures_of_the_packs_model_need_no_file_of_it(
    comfy: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who deletes the small model can quantize others."""
    figures = NANO.with_name("quantization.json")
    (folder / NANO.name).unlink()
    monkeypatch.setattr(comfy.quantize, "SHIPPED", folder / figures.name)
    (folder / figures.name).write_bytes(figures.read_bytes())
    assert comfy.quantize.shipped_score(folder / DEPTH.name, "sd35_nano_int8.safetensors") == ""
