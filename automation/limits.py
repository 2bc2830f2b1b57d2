"""How long a server is waited for, and how much is taken from it."""

from __future__ import annotations

LOOK_SECONDS = 5.0
"""How long a prompt is followed by its events alone before the server is asked."""
ENDED_SECONDS = 0.02
"""The same once an event says that it has ended: its history is written just after that."""
QUICK_SECONDS = 2.0
"""How long that is believed."""
RESTARTS = 3
"""How often a prompt is queued when its server ends while it has it: it may be the cause."""
ANSWER_SECONDS, FILE_SECONDS = 60, 600
"""From the first to the last byte of an answer, and of a file."""
LARGEST_ANSWER = 2**24
"""Bytes of JSON."""
LARGEST_FILE = 2**28
"""Bytes of a file that a workflow saved, unless the caller says more."""
LARGEST_EVENT = 2**24
"""Bytes of a message of the websocket; a preview is one."""
REMEMBERED = 64
"""The last prompts of a server's history among which those of a driver that was killed are."""
AWAY = (429, 502, 503, 504)
"""What a proxy says while the server behind it is away."""
REDIRECTS = range(300, 400)
