"""Skip Layer Guidance in the host's sampling: one batched pass, the prefix shared.

Three hooks work together. A PREDICT_NOISE wrapper counts the step and, inside the window, lays
a record into the call's options. A CALC_COND_BATCH wrapper then has the positive conds run once
more with the layers skipped, in the same batch where they fit. A post-CFG function adds the
guidance. Several of them chain, each with its own record.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sd35_core.errors import SettingError
from ...sd35_core.sampling.guidance import SkipLayers, away_from_skipped, step_of
from .network import SKIPPED, TWINS, HostMMDiTX, TransformerOptions, network_in

RECORDS = "sd35_skip_layer_records"
"""In model_options: {key of the guidance: its record}, for the step under way."""

SKIPS = "sd35_skip_layers"
"""In model_options: every SkipLayers of the model."""

Cond = dict[str, Any]


@dataclass
class Record:
    """What one guidance asked for and got in one step."""

    skip: SkipLayers
    positive: list[Cond]
    keep_control: bool
    denoised: Tensor | None = None

    def conds(self) -> list[Cond]:
        """The positive conds as the skipped pass sees them."""
        if self.keep_control:
            return self.positive
        return [{k: v for k, v in cond.items() if k != "control"} for cond in self.positive]


def depth_of(model: Any) -> int:
    """The number of layers of a MODEL from our loader. Raises SettingError for another."""
    network = network_in(model.model)
    if not isinstance(network, HostMMDiTX):
        raise SettingError(
            f"This node needs a model from SD35Loader; it got a {type(network).__name__}. Load "
            "the model with SD35Loader, or use the host's SkipLayerGuidanceDiT for this one."
        )
    return network.config.depth


def with_skip_layers(model: Any, skip: SkipLayers, keep_control: bool = True) -> Any:
    """A clone of MODEL that samples with Skip Layer Guidance.

    Without `keep_control` the skipped pass runs without ControlNets, as in the reference.
    """
    key = f"sd35_skip_layers_{uuid.uuid4()}"
    guided = model.clone()

    def predict_noise(
        executor: Any,
        x: Tensor,
        sigma: Tensor,
        options: TransformerOptions | None = None,
        seed: Any = None,
    ) -> Tensor:
        options = dict(options or {})
        schedule = options.get("transformer_options", {}).get("sample_sigmas")
        if schedule is not None and len(schedule) > 1:
            step = step_of(sigma[0], schedule)
            if skip.active(step, len(schedule) - 1):
                conds = executor.class_obj.conds
                positive = conds.get("middle", conds.get("positive"))
                record = Record(skip, positive, keep_control)
                options[RECORDS] = {**options.get(RECORDS, {}), key: record}
        return executor(x, sigma, options, seed)

    def add_guidance(arguments: TransformerOptions) -> Tensor:
        record = arguments["model_options"].get(RECORDS, {}).get(key)
        if record is None:
            return arguments["denoised"]
        skipped = record.denoised
        if skipped is None or record.positive is not arguments["cond"]:
            skipped = run_skipped(
                lambda *call: comfy.samplers.calc_cond_batch(*call),
                arguments["model"],
                Record(skip, arguments["cond"], keep_control),
                arguments["input"],
                arguments["sigma"],
                arguments["model_options"],
            )
        return away_from_skipped(
            arguments["denoised"], arguments["cond_denoised"], skipped, skip.scale
        )

    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, predict_noise)
    guided.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, TWINS)
    guided.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, TWINS, run_twins)
    guided.set_model_sampler_post_cfg_function(add_guidance)
    guided.model_options[SKIPS] = [*guided.model_options.get(SKIPS, ()), skip]
    return guided


def run_twins(
    executor: Any,
    model: Any,
    conds: list[Any],
    x: Tensor,
    sigma: Tensor,
    options: TransformerOptions,
) -> list[Tensor]:
    """Run the conds, and beside them the positive ones again for every record that asks for it.

    Patches of other nodes may count on the rows of the batch, so with any of them present the
    skipped pass runs alone, as in the host's own node.
    """
    records = [
        record
        for record in options.get(RECORDS, {}).values()
        if any(cond is record.positive for cond in conds)
    ]
    if not records:
        return executor(model, conds, x, sigma, options)
    transformer = options.get("transformer_options", {})
    if transformer.get("patches") or transformer.get("patches_replace"):
        out = executor(model, conds, x, sigma, options)
        for record in records:
            record.denoised = run_skipped(executor, model, record, x, sigma, options)
        return out
    plan: dict[uuid.UUID, tuple[tuple[uuid.UUID, int], frozenset[int]]] = {}
    batch = [*conds]
    for number, record in enumerate(records):
        index = next(i for i, cond in enumerate(conds) if cond is record.positive)
        twins = [{**cond, "uuid": twin_uuid(cond["uuid"], number)} for cond in record.conds()]
        for twin, cond in zip(twins, record.positive):
            plan[twin["uuid"]] = ((cond["uuid"], index), record.skip.layers)
        batch.append(twins)
    planned = {**options, "transformer_options": {**transformer, TWINS: plan}}
    out = executor(model, batch, x, sigma, planned)
    for record, denoised in zip(records, out[len(conds) :]):
        record.denoised = denoised
    return out[: len(conds)]


def twin_uuid(source: uuid.UUID, number: int) -> uuid.UUID:
    """The same for a cond at every step, since caches of other nodes go by it."""
    return uuid.uuid5(source, f"skip layers {number}")


def run_skipped(
    run: Any, model: Any, record: Record, x: Tensor, sigma: Tensor, options: TransformerOptions
) -> Tensor:
    """The positive conds in a pass of their own with the layers skipped."""
    transformer = {**options.get("transformer_options", {}), SKIPPED: record.skip.layers}
    alone = {k: v for k, v in options.items() if k != RECORDS}
    options = {**alone, "transformer_options": transformer}
    (denoised,) = run(model, [record.conds()], x, sigma, options)
    return denoised
