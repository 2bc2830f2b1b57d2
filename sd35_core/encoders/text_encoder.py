"""CLIP text encoders of any size (Radford et al. 2021), as SD3.5 uses them: two side by side.

The hidden states are those before the last layer; the summary ("pooled") is taken at the first
end token, after the final norm, and for CLIP-G projected. Keys are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError

START, END = 49406, 49407
VOCABULARY = 49408
LENGTH = 77


@dataclass(frozen=True)
class ClipConfig:
    """Field names are those of Hugging Face's config.json."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    hidden_act: str
    projected: bool
    pad: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, heads and layers: what clip_l and clip_g below make a configuration of."""
        return self.hidden_size, self.num_attention_heads, self.num_hidden_layers

    def described(self) -> dict[str, int | str]:
        """What a host's CLIP class needs to build the same encoder."""
        return {k: v for k, v in asdict(self).items() if k not in ("projected", "pad")}


def clip_l(width: int, heads: int, layers: int) -> ClipConfig:
    return ClipConfig(width, heads, layers, 4 * width, "quick_gelu", projected=False, pad=END)


def clip_g(width: int, heads: int, layers: int) -> ClipConfig:
    return ClipConfig(width, heads, layers, 4 * width, "gelu", projected=True, pad=0)


KINDS: dict[str, Callable[[int, int, int], ClipConfig]] = {"clip_l": clip_l, "clip_g": clip_g}
"""SD3.5's two, in the order in which their outputs are joined: (width, heads, layers) -> config."""

Tokenize = Callable[[str], list[int]]
"""Words -> token ids, without start, end and padding."""


def tokenizer(folder: Path) -> Tokenize:
    """CLIP's byte-pair encoding, from a folder with its vocab.json and merges.txt.

    ComfyUI brings one, comfy/sd1_tokenizer. Raises SettingError for a folder without them.
    """
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise SettingError(
            f"'{folder}' is no CLIP tokenizer: it lacks {' and '.join(missing)}. ComfyUI has one, "
            "the folder comfy/sd1_tokenizer."
        )
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(folder)
    return lambda caption: clip(caption)["input_ids"][1:-1]


def padded_tokens(ids: list[int], config: ClipConfig) -> list[int]:
    """Start, the prompt's token ids, end, then padding: 77 in all; a longer prompt is cut."""
    ids = [START, *ids[: LENGTH - 2], END]
    return ids + [config.pad] * (LENGTH - len(ids))


def columns_used(tokens: Tensor, least: int) -> int:
    """How many columns of ids (B, L) hold more than padding, which is 0 for CLIP-G and T5; or
    `least`, where that is more."""
    used = tokens.any(dim=0).nonzero()
    return max(least, int(used.max()) + 1 if len(used) else 0)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        future = torch.full(scores.shape[-2:], -torch.inf, device=x.device).triu_(1)
        attended = torch.softmax(scores + future, dim=-1).to(v.dtype) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = _Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(LENGTH, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _TextModel(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.embeddings = _Embeddings(config.hidden_size)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States before the last layer, and after it and the final norm; (B, 77, width) each."""
        hidden = x = self.embeddings(tokens)
        for layer in self.encoder.layers:
            hidden, x = x, layer(x)
        return hidden, self.final_layer_norm(x)


class ClipTextModel(nn.Module):
    """Token ids (B, L <= 77) -> hidden states (B, L, width) and pooled (B, width)."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.text_model = _TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def initialise(self) -> None:
        """Words that are far apart and places that are near, for training."""
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden, last = self.text_model(tokens)
        pooled = last[torch.arange(len(last)), (tokens == END).int().argmax(dim=1)]
        return hidden, self.text_projection(pooled) if self.config.projected else pooled


def joined_encodings(
    encoded: list[tuple[Tensor, Tensor]], context_width: int
) -> tuple[Tensor, Tensor]:
    """CLIP-L and CLIP-G side by side: context (B, 77, context_width), zero-padded; pooled."""
    context = torch.cat([hidden for hidden, _ in encoded], dim=-1)
    pooled = torch.cat([pooled for _, pooled in encoded], dim=-1)
    return F.pad(context, (0, context_width - context.shape[-1])), pooled
