"""Small random models in SD3.5's layout, made alike everywhere, for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd35_core.network.config import MMDiTXConfig
from sd35_core.network.mmditx import MMDiTX
from tools.parity import weight

TINY = MMDiTXConfig(
    depth=4,
    hidden=128,
    context_dim=96,
    pooled_dim=40,
    pos_embed_max_size=16,
    qk_norm=True,
    dual_blocks=(0, 1),
)


def random_weights(config: MMDiTXConfig = TINY, seed: int = 5) -> dict[str, Tensor]:
    model = MMDiTX(config, device="meta")
    return {key: weight(seed, key, tuple(t.shape)) for key, t in model.state_dict().items()}


def random_model(config: MMDiTXConfig = TINY, seed: int = 5) -> MMDiTX:
    model = MMDiTX(config)
    model.load_state_dict(random_weights(config, seed))
    return model.requires_grad_(False).eval()


def random_inputs(
    config: MMDiTXConfig = TINY, batch: int = 2, size: tuple[int, int] = (8, 12), seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, timestep, context and y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    timestep = torch.rand(batch, generator=generator) * 1000
    x = normal(batch, config.in_channels, *size)
    return x, timestep, normal(batch, 7, config.context_dim), normal(batch, config.pooled_dim)


def words_as_tokens(caption: str) -> list[int]:
    """A tokenizer of one id per word."""
    return [1000 + len(word) for word in caption.split()]


def finish_gguf(writer: Any, tensors: dict[str, Tensor]) -> None:
    """Have gguf's GGUFWriter write its file, with these tensors."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
