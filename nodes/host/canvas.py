"""The pack's three routes on the host's server, for what stands on the canvas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp import web
from server import PromptServer

from ...sd35_core.errors import SettingError, is_out_of_memory
from ...sd35_core.sampling.recipes import RECIPES
from ...sd35_core.workflow.graph import TooLargeError
from ...sd35_core.workflow.holdings import FindFile
from ...sd35_core.workflow.memory import warm_up
from ...sd35_core.workflow.migration import migration_answer
from ...sd35_core.workflow.panels import answer, recipe_values
from .facts import card_of, find_file

ROUTE = "/sd35"
LARGEST_BODY = 2_000_000
"""Bytes of a workflow; one of 300 nodes has a tenth of that."""
BODY_SECONDS = 10
SECONDS = 0.5
"""Of a processor, for one answer."""
TOO_LONG = (
    f"The workflow is too large to check: more than {LARGEST_BODY / 1e6:g} MB. It can be queued "
    "all the same."
)
Find = Callable[[bytes, FindFile, float], str]
"""(a workflow in JSON, its files, seconds) -> the answer in JSON; raises SettingError."""
WAITING = 32
"""Questions at once; those that come then are refused."""


def serve() -> None:
    """Put the answers on the host's server; without one, as in a test, nothing happens."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    recipes = {key: recipe_values(recipe) for key, recipe in RECIPES.items()}
    plans = Plans()

    async def answer_recipes(request: web.Request) -> web.Response:
        return web.json_response(recipes)

    server.routes.get(f"{ROUTE}/recipes")(answer_recipes)
    server.routes.post(f"{ROUTE}/plan")(partial(plans.answer, answer_here))
    server.routes.post(f"{ROUTE}/migrate")(partial(plans.answer, migration_answer))


class Plans:
    """Answers to workflows, one after the other in a thread of their own: the server goes on."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "sd35-plan")
        self.waiting = 0

    async def answer(self, find: Find, request: web.Request) -> web.Response:
        try:
            text = await self.text(find, await asyncio.wait_for(body_of(request), BODY_SECONDS))
        except asyncio.TimeoutError:
            return refused(f"The workflow did not arrive within {BODY_SECONDS} s.", 408)
        except TooLargeError as error:
            return refused(str(error), 413)
        except SettingError as error:
            return refused(str(error), 400)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return refused("There is no memory left to check the workflow with.", 503)
        return web.Response(text=text, content_type="application/json")

    async def text(self, find: Find, body: bytes) -> str:
        if self.waiting >= WAITING:
            raise TooLargeError("Too many workflows wait to be checked. Try again.")
        self.waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.thread, find, body, find_file, SECONDS)
        finally:
            self.waiting -= 1


def answer_here(body: bytes, files: FindFile, seconds: float) -> str:
    """The answer to a workflow on this machine; what has to be done once is not in its time."""
    warm_up()
    return answer(body, files, seconds, card_of())


async def body_of(request: web.Request) -> bytes:
    """Raises TooLargeError beyond LARGEST_BODY."""
    body = bytearray()
    if (request.content_length or 0) > LARGEST_BODY:
        raise TooLargeError(TOO_LONG)
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > LARGEST_BODY:
            raise TooLargeError(TOO_LONG)
    return bytes(body)


def refused(words: str, status: int) -> web.Response:
    return web.json_response({"error": words}, status=status)
