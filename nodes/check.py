"""SD35Check: what will go wrong, or do nothing, said before it is sampled."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sd35_core.errors import SettingError
from ..sd35_core.workflow.check import about_files_and_memory, findings, report
from ..sd35_core.workflow.own_nodes import CHECK_OUTPUTS, NAMES
from .host import facts
from .host.files import hashed
from .host.report import told

REPORT, ERRORS, WARNINGS = "report", "stop at errors", "stop at warnings"
STOPS = {REPORT: (), ERRORS: ("error",), WARNINGS: ("error", "warning")}

OUTPUTS = {
    "model": io.Model.Output(tooltip="The model, unchanged."),
    "positive": io.Conditioning.Output(display_name="positive", tooltip="The prompt, unchanged."),
    "negative": io.Conditioning.Output(
        display_name="negative", tooltip="The negative prompt, unchanged."
    ),
    "latent": io.Latent.Output(tooltip="The latent, unchanged."),
}


class SD35Check(io.ComfyNode):
    """Looks at everything that leads to a sampler and says what it sees."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SD35Check",
            display_name=NAMES["SD35Check"],
            category="SD3.5",
            description="Put it before the sampler. It looks at the model, prompts, ControlNets, "
            "latent and the sampler's widgets, and says what will go wrong or do nothing, and "
            "what to do. What goes in comes out unchanged.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model, with whatever is attached to it."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent", tooltip="The latent for the sampler."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that will decode."),
                io.Combo.Input(
                    "strict",
                    options=list(STOPS),
                    tooltip="report: say it and go on. The others stop the run before sampling, "
                    "with the same words.",
                ),
            ],
            outputs=[OUTPUTS[name] for name in CHECK_OUTPUTS],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Changes with what the workflow after this node says, which is no input of it."""
        setups = facts.setups_after(facts.running_prompt(), cls.hidden.unique_id)
        return hashed("\n".join(report(findings(setup)) for setup in setups))

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: Any, strict: str, vae: Any = None
    ) -> io.NodeOutput:
        node_id, prompt = cls.hidden.unique_id, cls.hidden.prompt or {}
        seen = facts.setups_at(prompt, node_id, model, positive, negative, latent, vae)
        found = list(dict.fromkeys(finding for setup in seen for finding in findings(setup)))
        beside = [line for setup in seen for line in about_files_and_memory(setup)]
        text = report(found, list(dict.fromkeys(beside)))
        shown = told(text, node_id)
        if any(finding.severity in STOPS[strict] for finding in found):
            raise SettingError("Stopped before sampling, as 'strict' says.", *map(str, found))
        given = {"model": model, "positive": positive, "negative": negative, "latent": latent}
        return io.NodeOutput(
            *(given[name] for name in CHECK_OUTPUTS), ui={"text": (text,), **shown}
        )
