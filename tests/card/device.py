"""A pretend card: tensors that say they are on `card:0`, whose numbers the CPU computes.

It has what a real card would trip over: operands on two devices raise, a cast to a dtype that it
was told to lack raises, and it counts what a real one would spend time on. There are no streams,
no pinned memory, no random generators, and `parameter.data = ` is not supported. torch calls the
interface experimental; without it the import of this file is an ImportError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend,  # pyright: ignore[reportAttributeAccessIssue]
)

_setup_privateuseone_for_python_backend("card")
_amp = {"get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16]}
vars(vars(torch)["card"]).update(_amp)  # what torch's checkpoints ask of every kind of device
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([1], device=CARD) is an upload as well

CARD, CPU = torch.device("card", 0), torch.device("cpu")

aten = torch.ops.aten
MOVES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put_, aten.index_put, aten._unsafe_index)
ANSWERS = (
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.bincount,
)
"""What gives the program a number, or a shape, that only the card knows."""
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "alias",
}
ONE_KERNEL = (F.scaled_dot_product_attention, F.rms_norm)
"""Functions that a card runs as one kernel and the CPU as several."""


@dataclass
class Counts:
    """Kernels launched, moments at which the program waits for the card, bytes carried to it."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploaded: int = 0

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()
        self.uploaded = 0


counts = Counts()
lacking: set[torch.dtype] = set()
"""dtypes that the card has not, as MPS and DirectML have no float64."""


class OnCard(Tensor):
    """A tensor on the card; `raw` is the CPU's tensor behind it."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnCard:
        if raw.dtype in lacking:
            raise TypeError(f"card:0 has no {raw.dtype}")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=CARD,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if func in ONE_KERNEL and all(isinstance(tensor, OnCard) for tensor in tensors):
            counts.launches[func.__name__] += 1
            return up(func(*down(args), **down(kwargs)))
        if func is Tensor.tolist:
            counts.waits["tolist"] += 1
            return func(*down(args))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = (Tensor, torch.nn.Parameter)
        if any(kind not in plain and not issubclass(kind, OnCard) for kind in types):
            return NotImplemented  # the host's quantized tensors take themselves apart first
        return run(func, args, dict(kwargs or {}))


class Card(TorchDispatchMode):
    """While it is active tensors are made and moved on the pretend card."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return OnCard.__torch_dispatch__(func, types, args, kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, as a card would run it or refuse it."""
    kind, name = func.overloadpacket, func._schema.name.removeprefix("aten::")
    tensors = tensors_in(args, kwargs)
    here = [isinstance(tensor, OnCard) for tensor in tensors]
    # a number on the CPU travels with the launch; a number on the card can't travel back
    mixed = any(here) and any(t.dim() and not on for t, on in zip(tensors, here))
    if mixed and kind not in (*MOVES, *INDEXING):
        seen = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{name} of tensors on two devices: {seen}")
    to_card = any(here[:1] if kind is aten.copy_ else here)
    if kwargs.get("device") is not None:
        to_card = torch.device(kwargs["device"]).type == CARD.type
        kwargs["device"] = CPU
    if to_card and kwargs.get("dtype") in lacking:
        raise TypeError(f"card:0 has no {kwargs['dtype']}")
    _count(kind, name, tensors, here, to_card, launched=not func.is_view)
    out = func(*down(args), **down(kwargs))
    if func._schema.is_mutable:
        return args[0] if name.endswith("_") else out
    return up(out) if to_card and kind is not aten._local_scalar_dense else out


def _count(
    kind: Any, name: str, tensors: list[Tensor], here: list[bool], to_card: bool, launched: bool
) -> None:
    source = here[-1:] if kind in MOVES else []
    carried = [t for t, on in zip(tensors, here) if not on and t.dim() and to_card]
    if kind in MOVES and source and source[0] != to_card:
        counts.waits[name] += 1
        counts.uploaded += sum(t.nbytes for t in tensors[-1:]) if to_card else 0
    elif kind in INDEXING and any(here):
        masks = any(t.dtype is torch.bool for t in tensors[1:])
        counts.waits.update([name] if carried or masks else [])
    elif kind in ANSWERS and any(here):
        counts.waits[name] += 1
    if any(here) and launched and name not in NO_KERNEL:
        counts.launches[name] += 1


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """An operation's arguments or results with every tensor changed; torch's own way of walking
    through a nest takes half the time of a test."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (list, tuple):
        return type(tree)(mapped(part, change) for part in tree)
    if type(tree) is dict:
        return {key: mapped(part, change) for key, part in tree.items()}
    return tree


def tensors_in(*trees: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(trees, found.append)
    return found


def down(tree: Any) -> Any:
    """The CPU's tensors behind the card's."""
    return mapped(tree, lambda tensor: tensor.raw if isinstance(tensor, OnCard) else tensor)


def up(tree: Any) -> Any:
    """The same on the card."""
    return mapped(tree, lambda t: t if isinstance(t, OnCard) else OnCard(t))
