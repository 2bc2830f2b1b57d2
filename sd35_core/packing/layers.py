"""Layers that hold packed weights and unpack them at each use."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import INT8, check_packed, packed_under, unpack
from .vectors import Packed

INT8_ROWS = 32
"""The fewest rows of an int8 product: on CUDA it takes more than 16."""


class PackedLinear(nn.Module):
    """A Linear whose weight is packed, or plain, as the state dict that it loads has it.

    The weight is unpacked for each call. With `native` int8 weights meet inputs rounded to int8
    (a scale for each token) in the processor's own int8 product: faster, less exact.
    """

    native = False
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.form: str | None = None
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        empty = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_parameter("bias", empty)

    def _load_from_state_dict(
        self, state_dict: Packed, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        packed = packed_under(state_dict, prefix)
        if packed:
            shape = (self.out_features, self.in_features)
            self.form = check_packed(packed, shape, prefix[:-1])
            del self.weight
            for name, tensor in packed.items():
                self.register_buffer(name, torch.empty_like(tensor, device="meta"))
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        if self.form is None:
            return self.weight.to(dtype)
        return unpack(dict(self.named_buffers()), self.form, dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.native and self.form == INT8:
            scale = dict(self.named_buffers())["weight_scale"]
            product = int8_product(x.flatten(0, -2), self.weight, scale)
            product = product.view(*x.shape[:-1], -1)
            return product if bias is None else product + bias
        return F.linear(x, self.dense(x.dtype), bias)


class NativeLinear(PackedLinear):
    """The same with the processor's own int8 product."""

    native = True


class PackedOperations:
    """Layers for MMDiTX and ControlNetEmbedder that load packed files."""

    Linear, Conv2d, LayerNorm, RMSNorm = PackedLinear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm


class NativeOperations(PackedOperations):
    """The same with int8 products where weights are int8."""

    Linear = NativeLinear


def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (N, in) times codes (out, in)^T times scale (out, 1), with x rounded to int8: (N, out)."""
    per_token = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    rounded = (x / per_token).round().to(torch.int8)
    missing = max(INT8_ROWS - len(x), 0)
    rounded = F.pad(rounded, (0, 0, 0, missing)) if missing else rounded
    if adds_exactly(x.device.type):
        product = torch._int_mm(rounded, codes.T)  # pyright: ignore[reportPrivateImportUsage]
    else:
        product = rounded.float() @ codes.float().T
    return (product[: len(x)] * (per_token * scale.float().T)).to(x.dtype)


@cache
def adds_exactly(device: str) -> bool:
    """Whether torch's int8 product is right on a kind of device.

    On x86 processors without VNNI its sums of two products end at 32,767 (seen in torch 2.11 with
    oneDNN 3.10: products of large values lose nearly all).
    """
    x = torch.full((INT8_ROWS, 64), 127, dtype=torch.int8, device=device)
    seen = torch._int_mm(x, x.T)  # pyright: ignore[reportPrivateImportUsage]
    return bool((seen == 64 * 127 * 127).all())
