"""SD35TrainLoRA: pictures in, a LoRA's file and the model with it out; cancelled; refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sd35_core.checkpoint.tensor_file import metadata_of
from sd35_core.workflow.lora_files import lora_in
from sd35_core.workflow.setup import Model

from ..conftest import NANO
from .cases import difference, lora

CAPTIONS = ["a red square in negative", "a green square in negative"]
FEW = {"name": "test_lora", "steps": 4, "rate": 1e-2, "rank": 4, "side": 128, "batch": 2, "seed": 0}


@pytest.fixture(scope="module")
def parts(comfy: SimpleNamespace) -> SimpleNamespace:
    """MODEL, CLIP and VAE of the small model."""
    file = comfy.loading.read(NANO)
    return SimpleNamespace(
        model=comfy.loading.load_model(str(NANO), "default"),
        clip=comfy.text.clip_from(file, {"clip_l": None, "clip_g": None}),
        vae=comfy.loading.vae_from(file),
    )


@pytest.fixture
def images() -> list[Tensor]:
    """Two pictures of other sizes, as the host's dataset nodes give them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 140, 130, 3, generator=generator) for _ in range(2)]


@pytest.fixture
def train(comfy: SimpleNamespace, parts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node, its inputs as lists, as the host calls it -> its outputs."""
    node = comfy.training.SD35TrainLoRA
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None))

    def run(**inputs: Any) -> tuple[Any, str, Tensor, Tensor]:
        given = {"model": parts.model, "clip": parts.clip, "vae": parts.vae, **FEW, **inputs}
        lists = {k: v if isinstance(v, list) else [v] for k, v in given.items()}
        with torch.inference_mode():
            return node.execute(**lists).args

    return run


@pytest.fixture
def loras(base: Path) -> Path:
    return base / "models" / "loras"


def test_pictures_become_a_lora_and_the_model_has_it_on(
    comfy: SimpleNamespace, parts: Any, train: Any, images: list[Tensor], loras: Path, ksampler: Any
) -> None:
    model, report, curve, blank = train(images=images, captions=CAPTIONS, trigger="in negative")
    path = loras / "test_lora.safetensors"
    assert f"Wrote {path}" in report and "2 pictures, step 4 of 4: loss" in report
    assert curve.shape == (1, 384, 768, 3) and 0 <= float(curve.min()) < float(curve.max()) <= 1
    assert blank.shape == (1, 64, 64, 3) and bool((blank == 1).all())
    found = lora_in(path, Model(depth=4, hidden=256))
    assert found.layers and found.matched == found.layers
    conds = [comfy.calibration.encoded(parts.clip, text) for text in (CAPTIONS[0], "")]
    settings = {"positive": conds[0], "negative": conds[1]}
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    stock, _ = comfy.sd.load_lora_for_models(parts.model, None, tensors, 1.0, 0.0)
    drawn = ksampler(model, **settings)
    assert difference(drawn, ksampler(stock, **settings)) == 0
    assert difference(drawn, ksampler(parts.model, **settings)) > 1e-3
    _, again, *_ = train(images=images, captions=CAPTIONS, seed=1)
    assert "test_lora_2.safetensors" in again, "nothing is replaced"


def test_pictures_of_the_class_are_drawn_before_and_once(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], loras: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Cancelled after one of two, it draws the other; another training draws none."""
    from comfy import model_management as management

    node = comfy.training.train_lora.__globals__
    pipeline = node["Pipeline"]
    latents, drawn = pipeline.latents, []

    def counted(self: Any, *inputs: Any, **more: Any) -> Tensor:
        if len(drawn) == 1:
            management.interrupt_current_processing()
        found = latents(self, *inputs, **more)
        drawn.append(found)
        return found

    monkeypatch.setattr(pipeline, "latents", counted)
    settings = {"images": images, "captions": CAPTIONS, "steps": 1, "class_prompt": "a square",
                "class_pictures": 2, "name": "beside"}  # fmt: skip
    with pytest.raises(management.InterruptProcessingException):
        train(**settings)
    assert len(drawn) == 1 and not (loras / "beside.safetensors").exists()
    drawn.append(None)
    _, report, *_ = train(**settings)
    assert "2 pictures beside 2 of 'a square', step 1 of 1" in report and len(drawn) == 3
    _, report, *_ = train(**settings, rate=1e-3)
    assert len(drawn) == 3 and "beside_2.safetensors" in report
    assert torch.isfinite(drawn[0]).all() and drawn[0].abs().mean() > 0.1


def test_samples_grow_into_a_strip_on_the_node(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], parts: Any, ksampler: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two prompts, a row at each of three steps; the last is as KSampler draws it, but for bf16."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    sent: list[Any] = []
    bar = comfy.utils.ProgressBar
    monkeypatch.setattr(
        bar, "update_absolute", lambda self, done, total, preview=None: sent.append(preview)
    )
    settings = {"images": images, "captions": CAPTIONS, "steps": 3, "name": "strip"}
    model, _, _, strip = train(**settings, samples="a red square\n\n a green ring ")
    assert strip.shape == (1, 3 * (128 + 16), 256, 3)
    rows = strip[0].view(3, 144, 256, 3)[:, 16:]
    assert (rows[0] - rows[2]).abs().max() > 0.01, "it learned"
    grown = [preview for preview in sent if preview is not None]
    assert [preview[1].height for preview in grown] == [144, 288] and grown[0][0] == "JPEG"
    cond, empty = (comfy.calibration.encoded(parts.clip, text) for text in ("a red square", ""))
    shifted = ModelSamplingSD3().patch(model, 1.0)[0]
    latent = ksampler(
        shifted, seed=0, steps=28, scheduler="simple", positive=cond, negative=empty
    )  # fmt: skip
    alone = parts.vae.decode(latent)[0]
    away = float((alone - rows[2, :, :128]).abs().mean())
    assert away < 0.02, away


def test_captions_of_any_length_share_a_batch(
    comfy: SimpleNamespace, parts: Any, images: list[Tensor]
) -> None:
    """Two of the CLIPs' 77 rows and one; what fills the shorter up is what the host's own encoder
    says of no words."""
    node = comfy.training.train_lora.__globals__
    captions = ["a red square " * 40, "a green square"]
    pictures = node["pictures_given"](images, captions, 128)
    (group,) = node["encoded_examples"](pictures, parts.clip, parts.vae)
    assert group["rows"].tolist() == [[154, 0], [77, 0]] and group["rows_empty"].tolist() == [77, 0]
    short, empty = (comfy.calibration.encoded(parts.clip, c)[0][0][0] for c in (captions[1], ""))
    assert torch.equal(group["context"][1], torch.cat([short, empty]).half())
    assert torch.equal(group["context_empty"], torch.cat([empty, empty]).half())


def test_a_cancelled_run_leaves_a_lora_and_goes_on(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], loras: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from comfy import model_management as management

    monkeypatch.setattr(comfy.training, "told", lambda text, _: said.append(text) or {})
    said: list[str] = []
    inner = comfy.training.train_lora.__globals__["Run"]
    advance = inner.advance

    def cancelled(run: Any) -> float:
        loss = advance(run)
        if run.step == 2:
            management.interrupt_current_processing()
        return loss

    settings = {"images": images, "captions": CAPTIONS, "name": "stopped", "seed": 7}
    monkeypatch.setattr(inner, "advance", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(**settings)
    assert "step 2 of 4" in said[0]
    found = lora_in(loras / "stopped.safetensors", Model(depth=4, hidden=256))
    assert found.layers and found.matched == found.layers
    monkeypatch.setattr(inner, "advance", advance)
    seen: list[int] = []
    monkeypatch.setattr(inner, "advance", lambda run: seen.append(run.step) or advance(run))
    _, report, *_ = train(**settings)
    assert seen == [2, 3] and "step 4 of 4" in report


def test_a_run_that_runs_away_leaves_its_lora_and_begins_anew(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], loras: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inner = comfy.training.train_lora.__globals__["Run"]
    diverged, advance = comfy.training.train_lora.__globals__["DivergedError"], inner.advance
    steps: list[int] = []

    def run_away(run: Any) -> float:
        steps.append(run.step)
        if run.step == 2:
            raise diverged("Training ran away at step 3.")
        return advance(run)

    monkeypatch.setattr(inner, "advance", run_away)
    settings = {"images": images, "captions": CAPTIONS, "name": "away", "seed": 8}
    for file in ("away", "away_2"):
        with pytest.raises(Exception, match=rf"ran away .* in '{file}\.safetensors'"):
            train(**settings)
        assert lora_in(loras / f"{file}.safetensors", Model(depth=4, hidden=256)).layers
    assert steps == [0, 1, 2, 0, 1, 2]


def test_a_better_one_on_the_way_is_kept_beside_the_last(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], loras: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inner = comfy.training.train_lora.__globals__["Run"]
    advance = inner.advance

    def spoilt(run: Any) -> float:
        loss = advance(run)
        if run.step == 4:
            with torch.no_grad():
                for tensor in run.average.values():
                    tensor.normal_()
        return loss

    monkeypatch.setattr(inner, "advance", spoilt)
    _, report, *_ = train(images=images, captions=CAPTIONS, name="spoilt", seed=3)
    best = loras / "spoilt_best.safetensors"
    said = metadata_of(best)["ss_steps"]
    assert said in ("1", "2", "3")
    assert f"The LoRA of step {said} was better by more than noise: loss" in report
    assert f"it is in '{best.name}', beside the last one" in report
    assert metadata_of(loras / "spoilt.safetensors")["ss_steps"] == "4"
    assert not list(loras.glob("test_lora*_best*")), "none where the last is the best"


def test_a_run_that_is_cancelled_before_it_begins_leaves_nothing(
    train: Any, images: list[Tensor], loras: Path, comfy: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from comfy import model_management as management

    inner = comfy.training.train_lora.__globals__["Run"]
    resume = inner.resume

    def cancelled(run: Any) -> None:
        resume(run)
        management.interrupt_current_processing()

    monkeypatch.setattr(inner, "resume", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(images=images, captions=CAPTIONS, name="never", seed=9)
    assert not (loras / "never.safetensors").exists()


def test_a_folder_in_the_hosts_input_does_instead(
    train: Any, base: Path, comfy: SimpleNamespace, tmp_path: Path
) -> None:
    import folder_paths

    folder = Path(folder_paths.get_input_directory()) / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (96, 64), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square", encoding="utf-8")
    _, report, *_ = train(folder="mine", name="of_folder", steps=1)
    assert "2 pictures, step 1 of 1" in report
    for outside in ("..", str(tmp_path), "nowhere", "mine/../.."):
        with pytest.raises(Exception, match="no folder in ComfyUI's input folder"):
            train(folder=outside)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "one of the two, not both and not neither"),
        ({"folder": "mine", "images": [torch.rand(1, 64, 64, 3)]}, "not both and not neither"),
        ({"images": [torch.rand(1, 64, 64, 3)]}, "a text for each image, or one for all"),
        ({"images": [torch.rand(3, 64, 64, 3)], "captions": CAPTIONS}, "3 images and 2 captions"),
        ({"images": [torch.rand(1, 1, 1, 3)], "captions": ["x"]}, "1x1 pixels, too few"),
        ({"name": "\u540d" * 100}, "200 bytes at most"),
        ({"name": "NUL"}, "none that Windows keeps"),
        ({"name": "../up"}, r"name is '../up'"),
        ({"images": [torch.rand(1, 64, 64, 3)], "captions": ["x"], "blocks": "detail"},
         "30-37 in Stability AI's guide for SD3.5 Large"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_said_before_training(
    train: Any, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        train(**inputs)


def test_a_model_with_a_lora_on_is_no_base(
    comfy: SimpleNamespace, parts: Any, train: Any, images: list[Tensor]
) -> None:
    patched, _ = comfy.sd.load_lora_for_models(parts.model, None, lora("kohya"), 1.0, 0)
    with pytest.raises(Exception, match="carries a LoRA or a merge"):
        train(model=patched, images=images, captions=CAPTIONS)


def test_a_turbo_base_is_warned_of(
    comfy: SimpleNamespace, train: Any, images: list[Tensor], tmp_path: Path
) -> None:
    base = tmp_path / "sd3.5_large_turbo.safetensors"
    shutil.copy(NANO, base)
    model = comfy.loading.load_model(str(base), "default")
    _, report, *_ = train(model=model, images=images, captions=CAPTIONS, steps=1, name="turbo")
    assert "This is Large Turbo by its file's name" in report
