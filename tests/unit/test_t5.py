"""The T5 encoder against Hugging Face's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd35_core.encoders.t5 import END, PAD, SHORTEST, T5Config, T5Encoder, buckets, padded_t5

CONFIG = T5Config(d_model=24, num_heads=3, num_layers=3)


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    torch.manual_seed(5)
    made = T5Encoder(CONFIG)
    made.initialise()
    for name, parameter in made.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0)
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("length", [1, 9, 77, 300])
def test_it_computes_what_transformers_does(encoder: T5Encoder, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32128, **CONFIG.described(), feed_forward_proj="gated-gelu"
    )
    theirs = transformers.T5EncoderModel(config).eval()
    missing = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert missing.missing_keys in ([], ["encoder.embed_tokens.weight"])
    assert not missing.unexpected_keys
    tokens = torch.randint(32000, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    assert (encoder(tokens) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_distances_fall_into_t5s_buckets() -> None:
    table = buckets(200)
    assert table[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert table[:9, 0].tolist() == list(range(9))
    assert table[0, 127] == table[0, 199] == 31 and table[199, 0] == 15


def test_prompts_are_padded_to_77_and_never_cut() -> None:
    assert padded_t5([7, 8]) == [7, 8, END] + [PAD] * (SHORTEST - 3)
    assert padded_t5([7] * 90) == [7] * 90 + [END]
