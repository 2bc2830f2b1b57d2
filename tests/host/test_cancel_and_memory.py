"""Cancelled, or out of memory, in this process: what is said, and what is let go."""

from __future__ import annotations

import gc
import weakref
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..conftest import NANO
from .cases import Conds, sampled

CANNY = NANO.parent / "controlnet" / "sd35_nano_canny.safetensors"


def test_loading_ends_between_two_tensors_when_it_is_cancelled(comfy: SimpleNamespace) -> None:
    import comfy.model_management as management

    file = comfy.loading.read(NANO)
    key = next(iter(file))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        file[key]
    assert file[key].numel()


def test_a_cancelled_run_with_a_controlnet_lets_the_model_go(comfy: SimpleNamespace) -> None:
    import comfy.model_management as management

    def cancel(_: Any) -> None:
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    model, file = comfy.loading.load_model(str(NANO), "default"), comfy.loading.read(NANO)
    clip = comfy.text.clip_from(file, {"clip_l": None, "clip_g": None})
    prompt = comfy.calibration.encoded(clip, "a big owl")
    host, hint = comfy.host_controlnet, torch.zeros(1, 64, 64, 3)
    control = host.controlnet_from(comfy.loading.read(CANNY), host.Options())
    vae, node = comfy.loading.vae_from(file), comfy.controlnet.SD35ControlNetApply
    steered = node.execute(prompt, prompt, control, vae, hint, 1.0, 0.0, 1.0).result
    model.set_model_sampler_post_cfg_function(cancel)
    with pytest.raises(management.InterruptProcessingException):
        sampled(comfy, model, SimpleNamespace(positive=steered[0], negative=steered[1]))
    network = weakref.ref(model.model.diffusion_model)
    del model
    management.unload_all_models()
    gc.collect()
    management.cleanup_models_gc()
    assert network() is None


def test_no_more_memory_on_the_card_stays_an_error_by_which_the_host_unloads_its_models(
    comfy: SimpleNamespace, ours: Any, conds: Conds
) -> None:
    import comfy.model_management as management

    before = sampled(comfy, ours, conds)
    layer, calls = ours.model.diffusion_model.joint_blocks[2].x_block.mlp.fc2, count()

    def full(*_: Any) -> None:
        if next(calls) == 1:
            raise management.OOM_EXCEPTION("Tried to allocate 20.00 MiB. GPU 0 is full.")

    hook = layer.register_forward_pre_hook(full)
    words = "sampling 2 pictures of 64x64 .20.00 MiB more were asked for.. Make the picture"
    with pytest.raises(management.OOM_EXCEPTION, match=words):
        sampled(comfy, ours, conds)
    hook.remove()
    assert ours.model.modulation_cache is None
    assert torch.equal(sampled(comfy, ours, conds), before)


def test_a_file_of_which_memory_ends_is_not_called_damaged(
    comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_left(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(comfy.loader.loading, "model_from", nothing_left)
    widgets = ["from model file"] * 4
    with pytest.raises(MemoryError, match=f"while loading '{NANO.name}'. Close other programs"):
        comfy.loader.SD35Loader.execute(NANO.name, *widgets, "default")


def test_a_model_of_which_only_the_weights_are_left_stops_no_controlnet(
    ours: Any, ksampler: Any, controlled: Any
) -> None:
    """As after a run that ended in an error: a ring of copies is collected at once, and the host
    keeps an entry of theirs without a model."""
    import comfy.model_management as management

    settings = controlled("canny 2b")
    expected = ksampler(ours, steps=2, **settings)
    copy = ours.clone()
    copy.ring = copy.clone()
    management.load_models_gpu([copy.ring])
    del copy
    gc.collect()
    assert None in management.loaded_models(only_currently_used=True)
    assert torch.equal(ksampler(ours, steps=2, **controlled("canny 2b")), expected)
