"""Training: the loss by hand, the timesteps' distribution, a run that learns, stops and resumes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.checkpoint.tensor_file import read_file
from sd35_core.errors import CheckpointError, SettingError
from sd35_core.network.layers import grid_positions
from sd35_core.training import optimisers as of_training
from sd35_core.training.__main__ import main
from sd35_core.training.config import OPTIMISERS, TrainingConfig, read_config
from sd35_core.training.objective import crops, draw_timesteps, flow_losses
from sd35_core.training.run import Run
from sd35_core.training.trained import Trained


def test_the_loss_on_fixed_noise_is_the_one_computed_by_hand() -> None:
    """x = 0.75 * 0.5 - 0.25 = 0.125 and the velocity is -1.5; the model answers x itself."""
    x0, noise = torch.full((2, 16, 2, 2), 0.5), torch.full((2, 16, 2, 2), -1.0)
    seen = []

    def model(x: torch.Tensor, timestep: torch.Tensor, *_: torch.Tensor, **__: object):
        seen.append(timestep)
        return x

    nothing = torch.zeros(2, 1)
    losses = flow_losses(model, x0, noise, torch.tensor([0.25, 0.25]), nothing, nothing)  # pyright: ignore[reportArgumentType]
    assert losses.tolist() == pytest.approx(2 * [(0.125 + 1.5) ** 2])
    assert seen[0].tolist() == [250.0, 250.0]


def test_timesteps_are_logit_normal() -> None:
    """The Kolmogorov-Smirnov distance is below its 1 % point."""
    count = 20_000
    t = draw_timesteps(count, torch.Generator().manual_seed(1)).double().sort().values
    expected = 0.5 * (1 + torch.erf(torch.logit(t) / math.sqrt(2)))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((steps[1:] - expected).abs().max(), (expected - steps[:-1]).abs().max())
    assert distance < 1.63 / math.sqrt(count)


def test_a_new_model_predicts_no_velocity_and_its_blocks_are_idle(config: TrainingConfig) -> None:
    model = Trained(config)
    model.initialise()
    tokens = torch.full((1, 77), 49407)
    context, y = model.encode(tokens, tokens)
    x = torch.randn(1, 16, 4, 4)
    assert not model.diffusion_model(x, torch.tensor([500.0]), context, y).any()
    block = model.diffusion_model.joint_blocks[0]
    tokens_in, text_in = torch.randn(1, 4, 128), torch.randn(1, 77, 128)
    text, image = block(text_in, tokens_in, torch.randn(1, 128))
    assert torch.equal(text, text_in) and torch.equal(image, tokens_in)


def test_positions_tell_every_row_and_column_apart() -> None:
    table = grid_positions(torch.arange(6), torch.arange(6), 64)[0].reshape(6, 6, 64)
    assert torch.equal(table[0, :, :32], table[5, :, :32])
    assert torch.equal(table[:, 0, 32:], table[:, 5, 32:])
    tokens = table.flatten(0, 1)
    apart = torch.cdist(tokens, tokens) + 9 * torch.eye(36)
    assert apart.min() > 0.5


def test_a_dropped_encoder_leaves_zeros(config: TrainingConfig) -> None:
    torch.manual_seed(0)
    model = Trained(config)
    model.initialise()
    tokens = torch.full((2, 77), 49407)
    kept = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    context, y = model.encode(tokens, tokens, kept)
    assert context[0, :, :16].any() and not context[1, :, :16].any()
    assert not y[1, :16].any() and y[:, 16:].any(dim=1).all()


def test_a_dropped_caption_is_the_encoding_of_no_words(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(config, caption_dropout=1.0))
    seen = []
    encode = run.model.encode

    def spy(*tokens: torch.Tensor, **named: Any):
        seen.extend(tokens)
        return encode(*tokens, **named)

    monkeypatch.setattr(run.model, "encode", spy)
    run.batch_loss(torch.Generator().manual_seed(0))
    for tokens, name in zip(seen, ("tokens_l_empty", "tokens_g_empty")):
        assert (tokens == run.groups[0][name]).all()


def test_the_rate_warms_up_and_falls_as_a_cosine(config: TrainingConfig) -> None:
    run = Run(config)
    rates = []
    for run.step in (0, 9, 19, 100, 200):
        rates.append(run.rate() / config.rate)
    assert rates[0] == pytest.approx(0.05, rel=0.01)
    assert rates[1] == pytest.approx(0.5, rel=0.01)
    assert rates[3] == pytest.approx(0.525, rel=0.01)
    assert rates[4] == pytest.approx(0.05, rel=0.01)
    assert max(rates) == rates[2]


def test_the_average_follows_slowly(config: TrainingConfig) -> None:
    run = Run(config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.advance()
    after = dict(run.model.named_parameters())
    for name, average in run.average.items():
        expected = before[name] + (after[name].detach() - before[name]) * 9 / 11
        assert torch.allclose(average, expected, atol=1e-6)


def test_accumulated_batches_count_as_one_step(config: TrainingConfig) -> None:
    run = Run(replace(config, accumulate=3))
    losses: list[float] = []
    batch_loss = run.batch_loss

    def counted(generator: torch.Generator) -> torch.Tensor:
        loss = batch_loss(generator)
        losses.append(loss.item())
        return loss

    run.batch_loss = counted  # pyright: ignore[reportAttributeAccessIssue]
    total = run.advance()
    assert run.step == 1 and len(set(losses)) == 3
    assert total == pytest.approx(sum(losses) / 3, rel=1e-5)


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Everything that decides how a run goes on."""
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.items()}
    for name, optimiser in run.optimiser_of.items():
        for key, value in optimiser.state[run.learning[name]].items():
            tensors[f"{key}.{name}"] = value
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_run_halves_its_loss_and_resumes_bit_for_bit(
    config: TrainingConfig, tmp_path: Path, optimiser: str
) -> None:
    config = replace(config, optimiser=optimiser, output=str(tmp_path))
    run = Run(config)
    losses = [run.advance() for _ in range(100)]
    run.save()
    resumed = Run(config)
    resumed.resume()
    assert resumed.step == 100
    losses += [run.advance() for _ in range(100)]
    again = [resumed.advance() for _ in range(100)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert again == losses[100:]
    expected, found = tensors_of(run), tensors_of(resumed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("examples = 'e'\noutput = 'o'\nlearning_rate = 1\n", "unknown key 'learning_rate'"),
        ("output = 'o'\n", "needs either 'images' or 'examples'"),
        ("output = 'o'\nimages = 'i'\nexamples = 'e'\n", "needs either 'images' or 'examples'"),
        ("examples = 'e'\n", "lacks the key 'output'"),
        ("output = 'o'\nimages = 'i'\n", "'images' needs the key 'vae' too"),
        ("output = 'o'\nexamples = 'e'\nsizes = [[100, 64]]\n", r"sizes has \(100, 64\)"),
        ("output = 'o'\nexamples = 'e'\nsteps = 'many'\n", "steps is 'many', but should be a who"),
        ("output = 'o'\nexamples = 'e'\nsteps = true\n", "steps is True, but should be a whole"),
        ("output = 'o'\nexamples = 'e'\noptimiser = 'sgd'\n", "'sgd'; known are adamw, muon"),
        ("examples = \n", "can't be read as TOML"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=words):
        read_config(file)
    assert main([str(file)]) == 1


def test_a_torch_without_muon_is_named(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_training, "Muon", None)
    with pytest.raises(SettingError, match=r"optimiser is muon.*Update torch"):
        Run(replace(config, optimiser="muon"))


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("examples = 'e.safetensors'\noutput = 'out'\n", encoding="utf-8")
    config = read_config(file)
    assert config.examples == (str((tmp_path / "e.safetensors").resolve()),)
    assert Path(config.output) == (tmp_path / "out").resolve()


def test_random_crops_move_a_share_of_the_examples() -> None:
    table = torch.arange(8 * 8.0).view(8, 8, 1)
    found = crops(table, (2, 4), 400, 0.5, torch.Generator().manual_seed(0))[..., 0].view(-1, 2, 4)
    centre = table[3:5, 2:6, 0]
    share = (found == centre).all(dim=(1, 2)).float().mean().item()
    assert 0.45 < share < 0.6
    steps = found - found[:, :1, :1]
    assert torch.equal(steps, steps[:1].expand_as(steps)), "a crop is one piece of the table"
    assert len(found[:, 0, 0].unique()) == 7 * 5
    none = crops(table, (2, 4), 3, 0.0, torch.Generator().manual_seed(0))[..., 0].view(-1, 2, 4)
    assert torch.equal(none, centre.expand_as(none))


def test_ready_text_encoders_stay_as_they_are(config: TrainingConfig, tmp_path: Path) -> None:
    teacher = Run(config)
    teacher.write_model(tmp_path / "teacher.safetensors")
    ready = replace(config, text_encoders=str(tmp_path / "teacher.safetensors"), clip_l=(8, 1, 1))
    run = Run(ready)
    assert run.config.clip_l == (16, 2, 2), "the file decides"
    before = {name: p.clone() for name, p in run.model.named_parameters() if "clip_" in name}
    network = run.model.diffusion_model.context_embedder.weight.detach().clone()
    for _ in range(3):
        run.advance()
    after = dict(run.model.named_parameters())
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(network, run.model.diffusion_model.context_embedder.weight)


def test_training_can_start_from_a_checkpoint(config: TrainingConfig, tmp_path: Path) -> None:
    first = Run(config)
    for _ in range(3):
        first.advance()
    file = tmp_path / "first.safetensors"
    first.write_model(file)
    second = Run(replace(config, start=str(file)))
    with first.averaged() as model:
        expected = {k: t.clone() for k, t in model.diffusion_model.state_dict().items()}
    for name, tensor in second.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
    with pytest.raises(CheckpointError, match=r"first.safetensors' does not fit .* to be trained"):
        Run(replace(config, start=str(file), depth=3))


def test_a_state_that_does_not_fit_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    run = Run(replace(config, output=str(tmp_path)))
    run.save()
    other = Run(replace(config, output=str(tmp_path), depth=3))
    with pytest.raises(CheckpointError, match=r"state.safetensors' does not fit"):
        other.resume()
    run.advance()
    run.save()
    tensors, metadata = read_file(run.state_file)
    del tensors[next(key for key in tensors if key.startswith("exp_avg_sq."))]
    save_file(tensors, run.state_file, metadata)
    with pytest.raises(CheckpointError, match=r"does not fit .*it has exp_avg alone"):
        Run(run.config).resume()


@pytest.mark.parametrize(
    "name",
    [
        "state.safetensors",
        "model.safetensors",
        "best.safetensors",
        "loss.png",
        "samples/000100.png",
    ],
)
def test_a_run_replaces_nothing_that_no_training_wrote(
    config: TrainingConfig, tmp_path: Path, name: str
) -> None:
    config = replace(config, output=str(tmp_path / "out"))
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    if name.endswith("png"):
        file.write_bytes(b"mine")
    else:
        save_file({"mine": torch.ones(1)}, file, metadata={"title": "mine"})
    mine = file.read_bytes()
    with pytest.raises(SettingError, match=f"{file.name}' was not written by a training.*Choose"):
        Run(config)
    assert file.read_bytes() == mine
    file.rename(tmp_path / file.name)
    Run(config).save()
    (tmp_path / "out" / "samples").mkdir(exist_ok=True)
    (tmp_path / "out" / "samples" / "000100.png").write_bytes(b"of the run")
    run = Run(config)
    run.write_model(tmp_path / "out" / "model.safetensors")
    run.state_file.unlink()
    Run(config)


def test_a_broken_state_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    run = Run(replace(config, output=str(tmp_path)))
    run.save()
    content = run.state_file.read_bytes()
    run.state_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"state.safetensors"):
        run.resume()


def test_a_file_without_examples_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SettingError, match="has no examples to train on: it lacks latents"):
        Run(replace(config, examples=(str(tmp_path / "other.safetensors"),)))
    with pytest.raises(CheckpointError, match="nowhere"):
        Run(replace(config, examples=(str(tmp_path / "nowhere.safetensors"),)))


def test_a_picture_beyond_the_position_table_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(SettingError, match=r"32 pixels wide or high, but .* 1 allows 16"):
        Run(replace(config, pos_embed_max_size=1))
