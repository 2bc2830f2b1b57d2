"""T5 v1.1's encoder of any size (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020,
arXiv:2002.05202), as SD3.5 uses it beside the two CLIPs. Keys are Hugging Face's.

It knows no places but distances: a bias of each head for how far two tokens are apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError

END, PAD = 1, 0
VOCABULARY = 32128
SHORTEST = 77
"""Shorter prompts are padded to so many tokens; longer ones stay as long as they are."""
BUCKETS, FARTHEST = 32, 128
"""Distances are told apart one by one up to 8, then more and more coarsely up to `FARTHEST`."""


@dataclass(frozen=True)
class T5Config:
    """Field names are those of Hugging Face's config.json."""

    d_model: int
    num_heads: int
    num_layers: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, heads and layers."""
        return self.d_model, self.num_heads, self.num_layers

    @property
    def d_kv(self) -> int:
        return self.d_model // self.num_heads

    @property
    def d_ff(self) -> int:
        return self.d_model * 5 // 2

    def described(self) -> dict[str, int]:
        """What a host's T5 class needs to build the same encoder."""
        names = ("d_model", "num_heads", "num_layers", "d_kv", "d_ff")
        return {name: getattr(self, name) for name in names}


def t5_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """T5's pieces of words, from a folder with its tokenizer.json: words -> ids, without the end.

    ComfyUI brings one, comfy/text_encoders/t5_tokenizer. Raises SettingError without it.
    """
    if not (folder / "tokenizer.json").is_file():
        raise SettingError(
            f"'{folder}' is no T5 tokenizer: it lacks tokenizer.json. ComfyUI has one, the folder "
            "comfy/text_encoders/t5_tokenizer."
        )
    from transformers import PreTrainedTokenizerFast

    t5 = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return lambda caption: t5(caption)["input_ids"][:-1]


def t5_rows(captions: Sequence[str], tokenize: Callable[[str], list[int]]) -> Tensor:
    """Captions -> token ids (B, L), all padded to the longest."""
    ids = [tokenize(caption) for caption in captions]
    longest = max(SHORTEST, 1 + max(map(len, ids)))
    return torch.tensor([padded_t5(row, longest) for row in ids])


def padded_t5(ids: list[int], length: int = SHORTEST) -> list[int]:
    """The prompt's token ids and the end, padded to at least so many."""
    ids = [*ids, END]
    return ids + [PAD] * (length - len(ids))


def with_t5(context: Tensor, states: Tensor) -> Tensor:
    """CLIP's context (B, L, C), and after it T5's states (B, M, width <= C)."""
    return torch.cat([context, F.pad(states, (0, context.shape[2] - states.shape[2]))], dim=1)


def buckets(length: int) -> Tensor:
    """Which bucket the distance from each token to each is in: (length, length), 0..31."""
    places = torch.arange(length)
    ahead = places[None, :] - places[:, None]
    near = BUCKETS // 4
    far = ahead.abs().clamp(min=1).float().div(near).log() / math.log(FARTHEST / near)
    coarse = (near + (far * near).long()).clamp(max=BUCKETS // 2 - 1)
    return torch.where(ahead.abs() < near, ahead.abs(), coarse) + (ahead > 0) * (BUCKETS // 2)


class _Norm(nn.Module):
    """RMS norm, computed in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class _Attention(nn.Module):
    """Without the usual scale of the scores: T5's weights are made for that."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (_linear(config.d_model, inner) for _ in range(3))
        self.o = _linear(inner, config.d_model)
        if first:
            self.relative_attention_bias = nn.Embedding(BUCKETS, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() + bias, dim=-1)
        return self.o((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.SelfAttention = _Attention(config, first)
        self.layer_norm = _Norm(config.d_model)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _Gated(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = _linear(config.d_model, config.d_ff)
        self.wi_1 = _linear(config.d_model, config.d_ff)
        self.wo = _linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = _Gated(config)
        self.layer_norm = _Norm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nn.Module):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttention(config, first), _FeedForward(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(_Block(config, i == 0) for i in range(config.num_layers))
        self.final_layer_norm = _Norm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        table = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        bias = table(buckets(x.shape[1]).to(x.device)).permute(2, 0, 1).float()
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids (B, L) -> states (B, L, width)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(VOCABULARY, config.d_model)
        self.encoder = _Stack(config)

    def initialise(self) -> None:
        """As T5 begins: scores have no scale, so the queries' weights are small."""
        width = self.config.d_model
        for name, parameter in self.named_parameters():
            if name.endswith(("q.weight", "relative_attention_bias.weight")):
                scale = (width * self.config.d_kv) ** -0.5 if "q." in name else width**-0.5
                nn.init.normal_(parameter, std=scale)
            elif name == "shared.weight":
                nn.init.normal_(parameter, std=1.0)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.shared(tokens))
