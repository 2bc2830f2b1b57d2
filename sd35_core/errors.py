"""Errors worded for the person at the canvas: what happened, what was seen, what to do."""


class SD35Error(Exception):
    """Anything this package refuses to do, with a sentence that says why."""


class CheckpointError(SD35Error):
    """A file that is not what was asked for, or is damaged."""


class SettingError(SD35Error):
    """A widget value or an input that can't work."""
