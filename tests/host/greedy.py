"""A node pack for test_faults: a model whose third step asks for more memory than there is.

A limit of the process, in place of it, also refuses the small pieces that torch can't do without,
which ends the process.
"""

from __future__ import annotations

from typing import Any

import torch

PETABYTE = 10**15


class Greedy:
    """MODEL -> MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patched"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def patched(self, model: Any) -> tuple[Any]:
        times, model = set[float](), model.clone()
        block = model.model.diffusion_model.joint_blocks[2]

        def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
            times.add(float(given["timestep"].max()))  # a step may take several calls
            hook = block.register_forward_pre_hook(ask) if len(times) == 3 else None
            try:
                return apply(given["input"], given["timestep"], **given["c"])
            finally:
                if hook is not None:
                    hook.remove()

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


def ask(*_: Any) -> None:
    torch.empty(PETABYTE, dtype=torch.uint8)


NODE_CLASS_MAPPINGS = {"Greedy": Greedy}
