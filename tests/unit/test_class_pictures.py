"""Prior preservation: pictures of the class, drawn by the model itself before a LoRA is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.errors import SettingError
from sd35_core.pipeline import Pipeline
from sd35_core.training.config import CLASS, TrainingConfig, read_config
from sd35_core.training.run import Run


@pytest.fixture
def of_class(lora_config: TrainingConfig, clip_files: Path, tmp_path: Path) -> TrainingConfig:
    """A LoRA of four steps beside three pictures of a class."""
    torch.manual_seed(0)
    save_file(TinyAutoencoder().state_dict(), tmp_path / "vae.safetensors")
    return replace(
        lora_config, vae=str(tmp_path / "vae.safetensors"), tokenizer=str(clip_files), steps=4,
        batch=2, save_every=2, class_prompt="a square", class_pictures=3,
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures that were drawn, one entry each."""
    found: list[int] = []
    latents = Pipeline.latents

    def counted(self: Pipeline, *inputs: Any, **more: Any) -> torch.Tensor:
        found.append(len(inputs[0]))
        return latents(self, *inputs, **more)

    monkeypatch.setattr(Pipeline, "latents", counted)
    return found


def kept_in(config: TrainingConfig) -> torch.Tensor:
    return load_file(Path(config.output) / CLASS)["latents"]


def test_they_are_drawn_once_by_the_base_and_kept(
    of_class: TrainingConfig, drawn: list[int]
) -> None:
    run = Run(of_class)
    seen: list[tuple[int, int]] = []
    run.go_on(drawn=lambda count, total: seen.append((count, total)))
    first = kept_in(of_class)
    assert drawn == [1, 1, 1] and first.shape == (3, 16, 4, 4) and first.dtype == torch.float16
    assert seen[0] == (0, 3) and seen[-1] == (3, 3) and len(seen) > 3 * 28
    assert len(first.flatten(1).unique(dim=0)) == 3
    examples = run.of_class[0]
    assert torch.equal(examples["latents"], first) and examples["tokens_l"].shape == (3, 77)
    again = Run(replace(of_class, steps=6))
    again.resume()
    again.go_on()
    assert len(drawn) == 3
    more = Run(replace(of_class, class_pictures=5))
    more.resume()
    more.go_on()
    assert len(drawn) == 5 and torch.equal(kept_in(of_class)[:3], first)
    (Path(of_class.output) / CLASS).unlink()
    learned = Run(of_class)
    learned.resume()
    assert any(layer.up.any() for layer in learned.model.lora.values())
    learned.go_on()
    assert torch.equal(kept_in(of_class), first), "by the base, whatever was learned since"
    other = Run(replace(of_class, class_prompt="a red circle"))
    other.go_on()
    assert len(drawn) == 11 and not torch.equal(kept_in(of_class), first)


def test_drawing_that_was_interrupted_goes_on_where_it_stopped(
    of_class: TrainingConfig, tmp_path: Path, drawn: list[int]
) -> None:
    whole = Run(replace(of_class, output=str(tmp_path / "whole")))
    whole.go_on()
    parts = replace(of_class, output=str(tmp_path / "parts"))
    first = Run(parts)
    first.go_on(interrupted=lambda: len(drawn) >= 5)
    assert first.step == 0 and len(kept_in(parts)) == 2
    second = Run(parts)
    second.resume()

    class Cancelled(Exception):
        pass

    def cancel(count: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        second.go_on(drawn=cancel)
    assert len(kept_in(parts)) == 2
    last = Run(parts)
    last.resume()
    last.go_on()
    assert torch.equal(kept_in(parts), kept_in(whole.config))
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_step_learns_from_both_at_their_weights(of_class: TrainingConfig) -> None:
    config = replace(of_class, class_weight=0.5, accumulate=2)
    run = Run(config)
    run.go_on(interrupted=lambda: len(run.of_class) > 0)
    step, beside = run.step, run.of_class
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    for _ in range(2):
        for share, groups in ((1.0, run.groups), (0.5, beside)):
            (share / 2 * run.batch_loss(generator, groups)).backward()
    wanted = {name: p.grad for name, p in run.learning.items()}
    length = torch.stack([g.norm() for g in wanted.values() if g is not None]).norm()
    scale = min(1.0, config.clip_norm / (float(length) + 1e-6))
    again = Run(config)
    again.of_class, again.step = beside, step
    again.optimisers = []
    again.advance()
    for name, parameter in again.learning.items():
        gradient = wanted[name]
        assert gradient is not None and parameter.grad is not None
        assert torch.allclose(parameter.grad, scale * gradient, rtol=1e-4, atol=1e-7), name
    assert again.history.table[-1, 1].sum() == 2 * config.batch, "the curve is the subject's"


def test_a_model_that_draws_no_numbers_is_named(of_class: TrainingConfig) -> None:
    run = Run(of_class)
    with torch.no_grad():
        run.model.diffusion_model.x_embedder.proj.bias.fill_(float("nan"))
    with pytest.raises(SettingError, match=r"no numbers for the class 'a square' .picture 1 of 3"):
        run.go_on()


def test_a_file_of_that_name_that_no_training_wrote_stays(of_class: TrainingConfig) -> None:
    file = Path(of_class.output) / CLASS
    file.parent.mkdir(parents=True)
    save_file({"latents": torch.ones(1)}, file)
    with pytest.raises(SettingError, match="class.safetensors' was not written by a training"):
        Run(of_class)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rank = 0", "class_prompt is for a LoRA"),
        ("text_encoders = ''", "whose text encoders stay as they are"),
        ("class_pictures = 0", "class_pictures is 0 and class_weight 1"),
        ("class_weight = 0.0", "class_pictures is 50 and class_weight 0"),
        ("class_weight = nan", "class_weight nan"),
        ("tokenizer = ''", "'class_prompt' needs the key 'tokenizer' too"),
        ("vae = ''", "'class_prompt' needs the key 'vae' too"),
    ],
)
def test_what_can_not_be_preserved_is_refused(text: str, words: str, tmp_path: Path) -> None:
    given = {
        "output": "'o'", "examples": "'e'", "start": "'s'", "text_encoders": "'s'",
        "lora_rank": "4", "vae": "'v'", "tokenizer": "'t'", "class_prompt": "'a dog'",
    }  # fmt: skip
    key, value = text.split(" = ")
    lines = [f"{name} = {said}" for name, said in {**given, key: value}.items()]
    path = tmp_path / "c.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SettingError, match=words):
        read_config(path)
