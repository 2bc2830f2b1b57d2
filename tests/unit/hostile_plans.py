"""Workflows that were made to keep whoever reads them busy."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampler(**changed: Any) -> dict[str, Any]:
    values = {"steps": 20, "cfg": 5.0, "shift": 3.0, "schedule": "normal", "denoise": 1.0}
    return node("SD35Sampler", **{**values, "sampler": "dpmpp_2m", **changed})


def chain(kind: str, link: str, count: int, **inputs: Any) -> Graph:
    """`count` nodes, each before the one of the next lower number."""
    return {str(i): node(kind, **{link: [str(i + 1), 0]}, **inputs) for i in range(count)}


SKIP = {"scale": 1.0, "start": 0.0, "end": 1.0}
CONTROL = {"control_net": ["x", 0], "strength": 1.0, "start": 0.0, "end": 1.0}
HOSTILE: dict[str, Graph] = {
    **{
        f"denoise {value}": {"1": sampler(denoise=value)}
        for value in (1e-300, 5e-324, -1.0, 0.0, float("nan"), float("inf"), 10**400, [], "x", True)
    },
    **{
        f"shift {value}, {schedule}": {"1": sampler(shift=value, schedule=schedule)}
        for value in (1e-300, 1e300, -5.0, -999.0, -1000.0)
        for schedule in ("normal", "karras", "exponential", "beta", "linear_quadratic")
    },
    "ten thousand steps of a long schedule": {"1": sampler(steps=10_000, denoise=0.01)},
    "layers without end": {"1": node("SkipLayerGuidance", layers="0-9999," * 20_000, **SKIP)},
    "twenty thousand samplers": {
        str(i): sampler(latent=[str(i + 1), 0]) for i in range(20_000)
    },
    "samplers and decoders": {
        **{str(i): sampler(latent=[str(i + 1), 0]) for i in range(3_000)},
        **{f"d{i}": node("VAEDecode", samples=[str(i), 0]) for i in range(3_000)},
    },
    "skips in a row": {
        **chain("SkipLayerGuidance", "model", 1_500, layers="1-3", **SKIP),
        "s": sampler(model=["0", 0], steps=1_000),
    },
    "reroutes before each": {
        **chain("Reroute", "", 3_000),
        **{f"s{i}": sampler(model=["0", 0]) for i in range(2_000)},
    },
    "ControlNets in a row": {
        **chain("SD35ControlNetApply", "positive", 3_000, **CONTROL),
        "s": sampler(positive=["0", 0], steps=10_000),
    },
    "a hundred ControlNets on ten thousand steps": {
        **chain("SD35ControlNetApply", "positive", 100, **CONTROL),
        "s": sampler(positive=["0", 0], steps=10_000),
    },
    "a prompt of megabytes": {
        "1": sampler(positive=["2", 0]), "2": node("CLIPTextEncode", text="!" * 1_900_000),
    },
    "names that end a line": {"1": sampler(schedule="\ud800\n\x1b[31m", sampler="\u202e")},
    "a loop": {"1": sampler(model=["2", 0]), "2": node("Reroute", x=["2", 0])},
}  # fmt: skip
