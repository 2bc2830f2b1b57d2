"""What can go wrong with a server or a workflow, in sentences for the person who automates."""

from sd35_core.words import printable


class AutomationError(Exception):
    """Anything this package refuses to do, with a sentence that says why: a line or several.

    What a server or a table put into a line can't begin another one.
    """

    def __init__(self, *lines: str):
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class WorkflowError(AutomationError):
    """A workflow that can't be queued, or an override that fits nothing in it."""


class ServerError(AutomationError):
    """A server that is not there, or does not answer as ComfyUI does."""


class RefusedError(AutomationError):
    """A workflow that the server does not take, with its reasons."""


class RunError(AutomationError):
    """A prompt that ended without its results: it failed or was cancelled."""


class LostError(RunError):
    """A prompt whose server ended, or a file that it no longer has."""
