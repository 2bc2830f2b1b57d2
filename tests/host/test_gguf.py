"""GGUF files through SD35Loader's path, written by the package gguf itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_core.checkpoint.gguf_file import GGUFFile
from sd35_core.errors import CheckpointError

from .cases import difference

gguf = pytest.importorskip("gguf")


def write(path: Path, source: Path, kind: str, architecture: str = "sd3") -> Path:
    """A file of the small model with its large matrices in a GGUF format."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, tensor in load_file(source).items():
        values = tensor.numpy()
        form = gguf.GGMLQuantizationType[kind]
        if tensor.ndim != 2 or "mlp" not in key or kind == "F32":
            form = gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, form)
        writer.add_tensor(key.removeprefix("model.diffusion_model."), data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "most"), [("F32", 1e-6), ("BF16", 0.05), ("Q8_0", 0.1), ("Q4_1", 1)]
)
def test_a_gguf_file_draws_what_its_decoded_weights_draw(
    kind: str, most: float, comfy: SimpleNamespace, small: Path, ours: Any, ksampler: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = write(tmp_path / "model.gguf", small, kind)
    model = comfy.loading.load_model(str(path), "default")
    plain = tmp_path / "plain.safetensors"
    save_file({key: t.contiguous() for key, t in GGUFFile(path).items()}, plain)
    seen = ksampler(model)
    assert torch.equal(seen, ksampler(comfy.loading.load_model(str(plain), "default")))
    assert difference(seen, ksampler(ours)) < most


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_decode(kind: str, tmp_path: Path) -> None:
    """The package can't write these: blocks of any bytes, with scales that are numbers."""
    form = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[form]
    blocks = np.random.default_rng(0).integers(0, 60, (256, 4 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "sd3")
    writer.add_tensor("w", blocks, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = GGUFFile(tmp_path / "k.gguf")["w"]
    assert weight.shape == (256, 4 * values) and torch.isfinite(weight).all() and weight.std() > 0


def test_what_is_wrong_is_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comfy: SimpleNamespace
) -> None:
    path = write(tmp_path / "model.gguf", small, "Q8_0")
    whole = path.read_bytes()
    for size in (0, 3, 100, 5000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="model.gguf"):
            dict(GGUFFile(path))
    with pytest.raises(CheckpointError, match="architecture 'llama', expected 'sd3'"):
        GGUFFile(write(tmp_path / "llama.gguf", small, "Q8_0", "llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install --upgrade gguf"):
        GGUFFile(path)


def test_the_loader_lists_them(comfy: SimpleNamespace, base: Path, small: Path) -> None:
    path = write(base / "models" / "diffusion_models" / "a model.gguf", small, "Q8_0")
    assert path.name in comfy.files.model_files()
    assert comfy.files.model_path(path.name) == path


def test_decoding_ends_between_two_tensors_when_it_is_cancelled(
    comfy: SimpleNamespace, small: Path, tmp_path: Path
) -> None:
    import comfy.model_management as management

    file = comfy.loading.read(write(tmp_path / "model.gguf", small, "Q8_0"))
    key = next(iter(file))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        file[key]
    assert file[key].numel()
