"""A server of the image, from its start over its health to tokens."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from builder import sglang_args
from builder.agent.log_watch import Watch
from builder.agent.pass_context import Setting, model_argv
from builder.agent.process import Child, Failed

if TYPE_CHECKING:
    from builder.agent.client import Client


class Server:
    """A running, healthy server: ``with Server(setting, watch) as (child, client)``."""

    def __init__(self, setting: Setting, watch: Watch) -> None:
        # HTTP would be a quarter of what this program loads, and only a server needs it.
        from builder.agent.client import Client

        words = model_argv(setting.task, "sglang.launch_server")
        port = sglang_args.number(words, sglang_args.PORT, 0)
        self._client = Client(port, sglang_args.value(words, sglang_args.API_KEY))
        if not port:
            words += ["--port", str(self._client.port)]
        self._child = setting.child(words, watch, server=True)

    def __enter__(self) -> tuple[Child, Client]:
        self._child.__enter__()
        try:
            while True:
                status, _ = self._client.ask(self._child, "/health_generate", seconds=30)
                if status == 200:
                    return self._child, self._client
                if not self._child.wait(lambda: False, 0.5) and self._child.ended:
                    raise Failed(f"the server ended before it was healthy: {self._child.describe_end()}")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *_: object) -> None:
        self._child.stop()


def until_steady(setting: Setting, child: Child, client: Client, limit: int) -> None:
    """Asks until nothing is compiled any more; where neighbours may be what compiles, at last without them."""
    if _is_steady(setting, child, client, range(limit)):
        return
    with setting.beside.undisturbed():
        if setting.beside.active and _is_steady(setting, child, client, range(limit, 2 * limit)):
            return
    raise Failed(f"requests still compile something after {limit} rounds of them")


def _is_steady(setting: Setting, child: Child, client: Client, turns: range) -> bool:
    before = setting.entries()
    for turn in turns:
        ask_all(setting, child, client, turn)
        now = setting.entries()
        if now == before:
            return True
        before = now
    return False


def ask_all(setting: Setting, child: Child, client: Client, turn: int) -> None:
    """One request of every length, to every data-parallel rank. Tokens that come back are the evidence."""
    ranks = sglang_args.ranks(setting.task.argv)
    for at, (length, new) in enumerate(setting.task.requests):
        # Other tokens in every request: a prefix that the server remembers would not be computed again.
        prompts = [
            [5 + (7 * step + 13 * at + 31 * turn + rank) % 90 for step in range(length)] for rank in range(ranks)
        ]
        body = {
            "input_ids": prompts[0] if ranks == 1 else prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        }
        status, answer = client.ask(child, "/generate", body, seconds=600)
        if child.ended:
            raise Failed(f"the server ended during a request of {length} tokens: {child.describe_end()}")
        if status != 200:
            raise Failed(f"a request of {length} tokens was answered with {status or 'nothing'}: {answer[:200]!r}")
        if not _tokens(answer):
            raise Failed(f"a request of {length} tokens brought no token back: {answer[:200]!r}")


def _tokens(answer: str) -> bool:
    """Whether every part of a /generate answer holds generated tokens."""
    try:
        parts = json.loads(answer)
        parts = parts if isinstance(parts, list) else [parts]
        return bool(parts) and all(part["meta_info"]["completion_tokens"] > 0 for part in parts)
    except (ValueError, TypeError, KeyError):
        return False
