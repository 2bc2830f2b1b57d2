"""What the processor does faster than the host's defaults have it do, with the same result."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.ldm.modules.attention as attentions
import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...sd35_core.network.layers import linear_gelu


def chosen_attention() -> Any:
    """The host's attention; on a CPU torch's own where the host only fell back to the
    sub-quadratic one, which takes twice as long there.

    On other devices that is the host's choice: on a Mac it comes with the upcast that keeps
    pictures from going black.
    """
    chosen = attentions.optimized_attention
    asked = args.use_quad_cross_attention or not comfy.model_management.cpu_mode()
    fell_back = chosen is attentions.attention_sub_quad and not asked
    return attentions.attention_pytorch if fell_back else chosen


def faster(operations: Any) -> Any:
    """The host's layers; on a CPU a Linear and its GELU are one product, and RMSNorm takes fewer
    passes than torch's, which has no kernel for it there."""

    class RMSNorm(operations.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            if not _on_cpu(self, x):
                return super().forward(x)
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
            return (x * scale.to(x.dtype)).mul_(weights(self, x)[0])

    return type(
        "Operations",
        (operations,),
        {"linear_gelu": staticmethod(fused_linear_gelu), "RMSNorm": RMSNorm},
    )


def fused_linear_gelu(layer: Any, x: Tensor) -> Tensor:
    """GELU (tanh form) of a Linear's output."""
    if not (_on_cpu(layer, x) and _fuses(x.dtype)):
        return linear_gelu(layer, x)
    return torch.ops.mkldnn._linear_pointwise(x, *weights(layer, x), "gelu", [], "tanh")


def weights(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias as the host would use them for x: cast, patched, unpacked."""
    if isinstance(layer.weight, QuantizedTensor):
        weight, bias = comfy.ops.cast_bias_weight(layer, x, compute_dtype=x.dtype)
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias
    if layer.comfy_cast_weights or layer.weight_function or layer.bias_function:
        return comfy.ops.cast_bias_weight(layer, x)
    return layer.weight, layer.bias


def _on_cpu(layer: Any, x: Tensor) -> bool:
    """Whether a layer only infers, on the CPU, with nothing hung on it but weights; the host puts
    a forward of its own in the place of a layer's for LoRAs that bypass the weights."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__
    smoothed = getattr(layer, "pre_quant_scale", None) is not None
    busy = hooks or smoothed or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not busy


@cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has the fused product for a dtype, and it is right."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x, weight, bias = (torch.linspace(-2, 2, n).to(dtype) for n in (64, 1024, 16))
    x, weight = x.view(1, 64), weight.view(16, 64)
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    try:
        seen = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(seen.float(), expected, rtol=0.01, atol=0.01)
