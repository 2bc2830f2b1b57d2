"""Runs of a LoRA: what they learn from, how they stop and go on, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sd35_core.checkpoint.layouts import from_diffusers
from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import TensorFile, metadata_of
from sd35_core.errors import SettingError
from sd35_core.training.__main__ import main
from sd35_core.training.config import TIMESTEPS, TrainingConfig, read_config
from sd35_core.training.history import BANDS, SPAN, History
from sd35_core.training.judging import Judged, judged_before
from sd35_core.training.lora import LoraPlan, attach, spelled
from sd35_core.training.objective import draw_timesteps
from sd35_core.training.run import DivergedError, Run
from sd35_core.training.watching import train
from sd35_core.training.written import sha256_of, tags_of
from sd35_core.workflow.lora_files import lora_in, lora_words
from sd35_core.workflow.setup import Lora, Model

from .files import to_diffusers
from .models import TINY, random_weights

# What a step draws


@pytest.mark.parametrize(("kind", "shift", "median"), [
    (TIMESTEPS[0], 1.0, 0.5), (TIMESTEPS[1], 1.0, 0.5), (TIMESTEPS[2], 1.0, 0.75),
    (TIMESTEPS[1], 4.0, 0.8),
])  # fmt: skip
def test_timesteps_have_the_median_that_their_kind_has(
    kind: str, shift: float, median: float
) -> None:
    """sigma = shift u / (1 + (shift - 1) u) at u = 0.5; shifted takes 3 where none is asked for."""
    t = draw_timesteps(20_000, torch.Generator().manual_seed(1), shift, kind)
    assert float(t.median()) == pytest.approx(median, abs=0.01)
    quarter = float((t < 0.25).float().mean())
    if kind == TIMESTEPS[1] and shift == 1:
        assert quarter == pytest.approx(0.25, abs=0.01)
    if kind == TIMESTEPS[0]:
        assert quarter == pytest.approx(0.136, abs=0.01), "the normal's share below -1.0986"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp16 = true", "training in fp16 is refused.*bf16 = true"),
        ('mixed_precision = "fp16"', "fp16 is refused"),
        ('objective = "epsilon"', "objective is 'epsilon'; known are velocity"),
        ('timesteps = "cosine"', "timesteps is 'cosine'; known are logit-normal, uniform, shifted"),
        ("dropout_of = 0.5", "dropout_of is 0.5, but should be a table"),
    ],
)
def test_what_is_not_here_is_refused_with_the_reason(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'output = "o"\nexamples = "e"\n{text}\n', encoding="utf-8")
    with pytest.raises(SettingError, match=words):
        read_config(path)


@pytest.mark.parametrize(
    ("own", "words"), [({"clip_x": 0.1}, "clip_x"), ({"t5xxl": 1.5}, "t5xxl is 1.5")]
)
def test_a_dropout_that_can_not_be_is_refused(
    lora_config: TrainingConfig, own: dict[str, float], words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        Run(replace(lora_config, dropout_of=own))


# Blocks and spellings


def test_named_blocks_are_those_of_the_guide_for_large_alone() -> None:
    class Large(torch.nn.Module):
        config = replace(TINY, depth=38)

        def named_modules(self, *_: object):  # pyright: ignore[reportIncompatibleMethodOverride]
            return ((f"joint_blocks.{i}.x_block.attn.qkv", None) for i in range(38))

    def blocks(name: str, model: object) -> list[int]:
        names = LoraPlan(blocks=name).layers(model)  # pyright: ignore[reportArgumentType]
        return [int(layer.split(".")[1]) for layer in names]

    assert blocks("composition", Large()) == list(range(12, 25))
    assert blocks("detail", Large()) == list(range(30, 38))
    with pytest.raises(SettingError, match="12-24 in Stability AI's guide for SD3.5 Large"):
        blocks("composition", load_tiny())


def load_tiny() -> torch.nn.Module:
    from sd35_core.network.mmditx import MMDiTX

    model = MMDiTX(TINY)
    model.load_state_dict(random_weights(TINY))
    return model


def test_diffusers_modulation_of_the_last_text_is_in_its_own_order() -> None:
    """Merged into diffusers' weights and brought back, it is merged into ours."""
    model, plain = load_tiny(), random_weights(TINY)
    layers = attach(model, LoraPlan(2, 2.0, ("modulation",)))  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        layer.up.data.normal_(generator=generator)
    ours = dict(plain)
    for name, layer in layers.items():
        ours[f"{name}.weight"] = plain[f"{name}.weight"] + layer.up @ layer.down
    theirs = to_diffusers(plain)
    found = spelled(layers, TINY.depth, "diffusers")
    for key in [key for key in found if key.endswith("lora_A.weight")]:
        name = key.removeprefix("transformer.").removesuffix("lora_A.weight")
        theirs[f"{name}weight"] = theirs[f"{name}weight"] + found[
            key.replace("lora_A", "lora_B")] @ found[key]  # fmt: skip
    again = from_diffusers(theirs)
    changed = [key for key in ours if not torch.equal(ours[key], plain[key])]
    assert len(changed) == len(layers)
    for key in changed:
        assert torch.allclose(again[key], ours[key], atol=1e-5), key


# Stopping, going on, and what is kept


@pytest.mark.parametrize("stop", [1, 7, 10, 13])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    lora_config: TrainingConfig, tmp_path: Path, stop: int
) -> None:
    config = replace(lora_config, steps=14, save_every=5, accumulate=2, batch=2)
    whole = Run(replace(config, output=str(tmp_path / "whole")))
    whole.go_on()
    first = Run(replace(config, output=str(tmp_path / "parts")))
    file = first.go_on(interrupted=lambda: first.step >= stop)
    assert first.step == stop
    found = lora_in(file, Model(depth=2, hidden=128))
    assert found.layers == found.matched, "a usable LoRA"
    again = Run(replace(config, output=str(tmp_path / "parts")))
    again.resume()
    assert again.step == stop
    again.go_on()
    for name in ("model.safetensors", "best.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert again.best == whole.best and again.last == whole.last
    assert torch.equal(whole.history.table, again.history.table)


def test_the_best_is_kept_where_later_ones_are_worse(
    lora_config: TrainingConfig, tmp_path: Path
) -> None:
    run = Run(replace(lora_config, held_out=0.25))
    assert len(run.held_out[0]["latents"]) == 2 and len(run.groups[0]["latents"]) == 6
    for _ in range(20):
        run.advance()
    run.keep_best()
    best, kept = run.best, load_file(Path(run.config.output) / "best.safetensors")
    with torch.no_grad():
        for tensor in run.average.values():
            tensor.normal_()
    run.keep_best()
    assert run.best == best
    again = load_file(Path(run.config.output) / "best.safetensors")
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    run.save()
    resumed = Run(run.config)
    resumed.resume()
    assert resumed.best == best


def test_a_resumed_run_knows_how_good_the_best_was(
    lora_config: TrainingConfig, tmp_path: Path
) -> None:
    """Whether the best file is there or not: a loss alone is no LoRA."""
    config = replace(lora_config, steps=4, save_every=2, output=str(tmp_path / "run"))
    first = Run(config)
    first.go_on(interrupted=lambda: first.step >= 3)
    assert first.best is not None and first.best.step == 2, "3 is no step at which it is judged"
    again = Run(config)
    again.resume()
    assert again.best == first.best
    (tmp_path / "run" / "best.safetensors").unlink()
    bare = Run(config)
    bare.resume()
    assert bare.best is None


def test_one_beats_another_by_more_than_noise() -> None:
    noise = (0.5, 1.0, 0.75, 1.25, 0.5, 1.0, 0.75, 1.25)
    other = Judged(9, noise)
    assert not other.beats(other)
    assert Judged(3, tuple(loss - 0.01 for loss in noise)).beats(other), "batch by batch"
    assert not other.beats(Judged(3, tuple(loss - 0.01 for loss in noise)))
    mixed = tuple(loss + step for loss, step in zip(noise, (0.1, -0.11) * 4))
    assert not Judged(3, mixed).beats(other)
    broken = Judged(9, (math.nan,) * 8)
    assert other.beats(broken) and not broken.beats(other) and not broken.beats(broken)
    assert judged_before(json.dumps(other)) == other
    for odd in (
        "",
        "0.5",
        "[1, 2]",
        "[1, [2]]",
        "{}",
        "[null, [1]]",
        json.dumps(broken),
        "[" * 9999,
    ):
        assert judged_before(odd) is None


def test_the_log_says_where_an_earlier_one_was_better(
    lora_config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(replace(lora_config, steps=6, save_every=2))
    advance = run.advance

    def spoilt() -> float:
        loss = advance()
        if run.step == 6:
            with torch.no_grad():
                for tensor in run.average.values():
                    tensor.normal_()
        return loss

    monkeypatch.setattr(run, "advance", spoilt)
    with caplog.at_level("INFO", logger="sd35"):
        train(run)
    best, last = run.better(), run.last
    assert best is not None and last is not None and best.step in (2, 4) and last.step == 6
    words = f"step {best.step} was better by more than noise: loss {best.loss:.4f} against"
    assert f"{words} {last.loss:.4f} after step 6" in caplog.text
    said = metadata_of(Path(run.config.output) / "best.safetensors")
    assert said["ss_steps"] == str(best.step)


def test_pictures_can_not_all_be_held_out(lora_config: TrainingConfig) -> None:
    with pytest.raises(SettingError, match="held_out is 0.99 of a group of 8 pictures"):
        Run(replace(lora_config, held_out=0.99))


def test_a_run_that_runs_away_stops_and_keeps_what_it_had(lora_config: TrainingConfig) -> None:
    run = Run(replace(lora_config, steps=20))

    def break_it(loss: float) -> None:
        if run.step == 3:
            run.groups[0]["latents"].fill_(float("nan"))

    with pytest.raises(DivergedError, match="ran away at step 4: the loss is nan.*Lower the rate"):
        run.go_on(break_it)
    assert run.step == 3
    kept = load_file(Path(run.config.output) / "model.safetensors")
    assert kept and all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_ctrl_c_leaves_a_lora(
    lora_config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(lora_config, steps=1000))
    advance = run.advance

    def pressed() -> float:
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return advance()

    monkeypatch.setattr(run, "advance", pressed)
    train(run)
    assert run.step == 5
    assert lora_in(Path(run.config.output) / "model.safetensors").layers


# Losses


def test_losses_are_told_apart_by_noise() -> None:
    history = History()
    for step in range(2 * SPAN):
        history.add(torch.tensor([0.1, 0.3, 0.9]), torch.tensor([1.0, 2.0, 3.0 + step]))
    smoothed = history.smoothed()
    assert smoothed.shape == (2 * SPAN, 1 + BANDS)
    last = smoothed[-1]
    assert last[1] == 1 and last[2] == 2 and torch.isnan(last[3])
    assert float(last[4]) == pytest.approx(3 + 1.5 * SPAN - 0.5)
    assert "0 to 0.25: 1.0000" in history.words() and "0.5 to 0.75" not in history.words()
    again = History(history.table)
    assert torch.equal(again.table, history.table)
    picture = history.curve(400, 200)
    assert picture.size == (400, 200) and len(picture.getcolors(1 << 16)) > 3
    assert History().curve(400, 200).size == (400, 200)


def test_a_run_leaves_its_curve(lora_config: TrainingConfig) -> None:
    run = Run(replace(lora_config, steps=2))
    run.go_on()
    assert Image.open(Path(run.config.output) / "loss.png").size == (768, 384)
    assert run.history.table.shape == (2, 2, BANDS)
    assert run.history.table[:, 1].sum() == 2 * run.config.batch


# Files


@pytest.mark.parametrize("keys", ["kohya", "comfyui", "diffusers"])
def test_the_command_line_chooses_the_names(
    lora_config: TrainingConfig, tmp_path: Path, keys: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        f'output = "out"\nexamples = {json.dumps(list(lora_config.examples))}\n'
        f"start = {json.dumps(lora_config.start)}\n"
        f"text_encoders = {json.dumps(lora_config.text_encoders)}\n"
        'steps = 1\nbatch = 2\nbf16 = false\ndevice = "cpu"\ntrigger = "my cat"\n',
        encoding="utf-8",
    )
    assert main(["lora", str(path), "--keys", keys]) == 0
    file = tmp_path / "out" / "model.safetensors"
    words = lora_words(Lora("x", file=lora_in(file)))
    name = {"comfyui": "ComfyUI"}.get(keys, keys)
    assert f"LoRA in names of {name}, rank 16, alpha 16" in words and "to 1, as it was" in words
    said = metadata_of(file)
    assert said["ss_new_sd_model_hash"] == sha256_of(Path(lora_config.start))
    assert said["modelspec.trigger_phrase"] == "my cat"
    assert said["ss_network_dim"] == "16" and said["ss_steps"] == "1"
    assert json.loads(said["sd35_config"])["lora"]["targets"] == ["attention"]
    assert TensorFile(file)
    assert main(["lora", str(path), "--keys", "unknown"]) == 1
    assert main(["lora", str(path), "--other"]) == 2
    assert main([str(path), "--keys", keys]) == 2


def test_tags_are_the_parts_between_commas() -> None:
    captions = ["a cat, sitting", "a cat, a cat, outside", ""]
    assert tags_of(captions) == {"a cat": 2, "outside": 1, "sitting": 1}
    assert len(tags_of([str(i) for i in range(1000)])) == 200


def test_the_shape_is_the_bases_whatever_the_settings_say(lora_config: TrainingConfig) -> None:
    run = Run(replace(lora_config, depth=9, pos_embed_max_size=2, context_dim=8))
    assert run.config.network == load(lora_config.start).config
