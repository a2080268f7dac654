"""A server of the image: start, health, requests on the container's own loopback."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

from builder import sglang_args
from builder.agent.log_watch import Watch
from builder.agent.pass_context import PassContext, model_argv
from builder.agent.process import Child, Failed

HOST = "127.0.0.1"
#: The other half of a pair of servers that is not there: with this address a prefill or decode server answers alone
#: (``FAKE_BOOTSTRAP_HOST`` of sglang 0.5.12 to 0.5.23, which uses it for its own warm-up).
_ALONE = "2.2.2.2"


class Client:
    """Sends requests to one port. port: 0 chooses a free one."""

    def __init__(self, port: int, api_key: str | None = None) -> None:
        self.port = port or _free_port()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # The environment may name a proxy; the server is local.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def request(
        self, child: Child, path: str, body: dict[str, Any] | None = None, *, seconds: float
    ) -> tuple[int, str]:
        """Return status and text of the answer; status 0 if there was none.

        Raises Failed (a crash line of the child) and Stopped (a signal) without waiting for the answer.
        """
        answers: list[tuple[int, str]] = []

        def exchange() -> None:
            answers.append(self._exchange(path, body, seconds))

        worker = threading.Thread(target=exchange, daemon=True)
        worker.start()
        child.wait(lambda: not worker.is_alive(), seconds + 5)
        worker.join(1.0 if child.ended else 0.1)
        return answers[0] if answers else (0, "")

    def _exchange(self, path: str, body: dict[str, Any] | None, seconds: float) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{HOST}:{self.port}{path}", data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            return 0, str(error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A running, healthy server: ``with Server(context, watch) as (child, client)``."""

    def __init__(self, context: PassContext, watch: Watch) -> None:
        argv = model_argv(context.task, "sglang.launch_server")
        port = sglang_args.number(argv, sglang_args.PORT, 0)
        self._client = Client(port, sglang_args.value(argv, sglang_args.API_KEY))
        if not port:
            argv += ["--port", str(self._client.port)]
        self._child = context.child(argv, watch, server=True)

    def __enter__(self) -> tuple[Child, Client]:
        self._child.__enter__()
        try:
            while True:
                status, _ = self._client.request(self._child, "/health_generate", seconds=30)
                if status == 200:
                    return self._child, self._client
                if not self._child.wait(lambda: False, 0.5) and self._child.ended:
                    raise Failed(f"the server ended before it was healthy: {self._child.describe_end()}")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *_: object) -> None:
        self._child.stop()


def generate_until_steady(context: PassContext, child: Child, client: Client, limit: int) -> None:
    """Send rounds of requests until a round adds no entry; after `limit` rounds without that raise Failed.

    Where other tasks may have added them, `limit` more rounds run while no other task compiles.
    """
    if _is_steady(context, child, client, range(limit)):
        return
    with context.compile_lock.exclusive():
        if context.compile_lock.active and _is_steady(context, child, client, range(limit, 2 * limit)):
            return
    raise Failed(f"requests still compile something after {limit} rounds of them")


def _is_steady(context: PassContext, child: Child, client: Client, rounds: range) -> bool:
    before = context.entries()
    for number in rounds:
        generate(context, child, client, number)
        now = context.entries()
        if now == before:
            return True
        before = now
    return False


def generate(context: PassContext, child: Child, client: Client, number: int) -> None:
    """Send one request of every length to every data-parallel rank. Raises Failed unless each returns tokens.

    number: of this round; rounds differ in their tokens, because the server would not compute a known prefix again.
    """
    ranks = sglang_args.ranks(context.task.argv)
    for index, (length, new) in enumerate(context.task.requests):
        prompts = [
            [5 + (7 * step + 13 * index + 31 * number + rank) % 90 for step in range(length)] for rank in range(ranks)
        ]
        body: dict[str, Any] = {
            "input_ids": prompts[0] if ranks == 1 else prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        }
        if sglang_args.value(context.task.argv, sglang_args.DISAGGREGATION) in ("prefill", "decode"):
            rooms = [rank * (2**63 // ranks) + rank for rank in range(ranks)]
            body |= {"bootstrap_host": _ALONE, "bootstrap_room": rooms[0]}
            if ranks > 1:
                body |= {"bootstrap_host": [_ALONE] * ranks, "bootstrap_room": rooms}
        status, answer = client.request(child, "/generate", body, seconds=600)
        if child.ended:
            raise Failed(f"the server ended during a request of {length} tokens: {child.describe_end()}")
        if status != 200:
            raise Failed(f"a request of {length} tokens was answered with {status or 'nothing'}: {answer[:200]!r}")
        if not _tokens(answer):
            raise Failed(f"a request of {length} tokens brought no token back: {answer[:200]!r}")


def _tokens(answer: str) -> bool:
    """Return whether every part of a /generate answer holds generated tokens."""
    try:
        parts = json.loads(answer)
        parts = parts if isinstance(parts, list) else [parts]
        return bool(parts) and all(part["meta_info"]["completion_tokens"] > 0 for part in parts)
    except (ValueError, TypeError, KeyError):
        return False
