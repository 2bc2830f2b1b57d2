"""A LoRA's captions that were encoded before: what the network hears of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_core.errors import SettingError
from sd35_core.training.config import TrainingConfig
from sd35_core.training.prompts import read_prompts
from sd35_core.training.run import Run


@pytest.fixture
def encoded_config(lora_config: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """The same examples, their captions encoded by the base's own text encoders."""
    run = Run(lora_config)
    examples = run.groups[0]
    rows = {
        name: torch.cat([examples[name], examples[f"{name}_empty"][None]]).long()
        for name in ("tokens_l", "tokens_g")
    }
    with torch.no_grad():
        context, pooled = run.model.encode(rows["tokens_l"], rows["tokens_g"])
    t5 = torch.randn(len(context), 3, context.shape[2], generator=torch.Generator().manual_seed(0))
    context = torch.cat([context, t5], dim=1)
    save_file(
        {"latents": examples["latents"], "context": context[:-1].contiguous(),
         "pooled": pooled[:-1].contiguous(), "context_empty": context[-1].contiguous(),
         "pooled_empty": pooled[-1].contiguous(), "clip": torch.tensor([77, 16])},
        tmp_path / "encoded.safetensors",
    )  # fmt: skip
    return replace(
        lora_config, examples=(str(tmp_path / "encoded.safetensors"),), text_encoders="",
        output=str(tmp_path / "encoded"),
    )  # fmt: skip


def test_encoded_captions_give_what_tokens_give(
    lora_config: TrainingConfig, encoded_config: TrainingConfig
) -> None:
    """Without T5, whose rows the other has not."""
    own = {"t5xxl": 1.0}
    losses = []
    for config in (lora_config, encoded_config):
        run = Run(replace(config, dropout_of=own, encoder_dropout=0.5, prompt_tokens=77))
        losses.append([run.advance() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5xxl"])
def test_each_encoder_can_be_left_out_alone(encoded_config: TrainingConfig, name: str) -> None:
    own = {other: float(other == name) for other in ("clip_l", "clip_g", "t5xxl")}
    run = Run(replace(encoded_config, dropout_of=own, caption_dropout=0.0))
    seen = []
    model = run.model.diffusion_model
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2:4]))
    run.advance()
    ((context, y),) = seen
    assert context.shape[1] == (77 if name == "t5xxl" else 80)
    gone = {"clip_l": slice(0, 16), "clip_g": slice(16, 32), "t5xxl": slice(0, 0)}[name]
    assert not context[:, :77, gone].any() and not y[:, gone].any()
    for other in {"clip_l", "clip_g"} - {name}:
        kept = {"clip_l": slice(0, 16), "clip_g": slice(16, 32)}[other]
        assert context[:, :77, kept].any() and y[:, kept].any()


def test_a_batch_is_as_long_as_its_longest_caption(encoded_config: TrainingConfig) -> None:
    """The CLIPs' rows and T5's are each cut to it; where a caption is left out, that is short."""
    generator = torch.Generator().manual_seed(0)
    pooled, context = torch.randn(3, 32, generator=generator), torch.randn(3, 9, 64)
    examples = {
        "context": context, "pooled": pooled, "clip": torch.tensor([6, 16]),
        "context_empty": context[0].clone(), "pooled_empty": pooled[0].clone(),
        "rows": torch.tensor([[2, 1], [6, 2], [4, 3]]), "rows_empty": torch.tensor([2, 1]),
    }  # fmt: skip
    model = Run(encoded_config).model
    kept = torch.ones(2, 3)

    def heard(chosen: list[int], left_out: list[bool], t5: bool = True) -> torch.Tensor:
        picked, out = torch.tensor(chosen), torch.tensor(left_out)
        return read_prompts(model, examples, picked, out, kept[:, : len(chosen)], t5, (77, 77))[0]

    short, long = heard([0], [False]), heard([0, 1, 2], [False] * 3)
    assert torch.equal(short[0], torch.cat([context[0, :2], context[0, 6:7]])), "alone as it is"
    assert torch.equal(long, context), "the longest of the CLIPs' and the longest of T5's"
    assert torch.equal(heard([2], [False])[0], context[2, [0, 1, 2, 3, 6, 7, 8]])
    assert torch.equal(heard([2], [True]), short)
    assert torch.equal(heard([1], [False], t5=False)[0], context[1, :6])
    assert examples["rows"].tolist() == [[2, 1], [6, 2], [4, 3]]


def test_captions_of_another_model_are_refused(
    encoded_config: TrainingConfig, tmp_path: Path
) -> None:
    tensors = load_file(encoded_config.examples[0])
    wide = {**tensors, "pooled": torch.zeros(8, 2048)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(SettingError, match="widths of 64 and 2048.*takes 64 and 32"):
        Run(replace(encoded_config, examples=(str(tmp_path / "wide.safetensors"),)))
    bad = {**tensors, "context": torch.full((8, 80, 64), float("nan"))}
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(SettingError, match="no numbers"):
        Run(replace(encoded_config, examples=(str(tmp_path / "bad.safetensors"),)))
    odd = {**tensors, "rows": torch.ones(8), "rows_empty": torch.ones(2)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(SettingError, match=r"shapes \(8,\) and \(2,\), expected \(8, 2\)"):
        Run(replace(encoded_config, examples=(str(tmp_path / "odd.safetensors"),)))
