"""`headrace eval-embedded`: asks the embedded model through the API and prints its accuracy.

It is the quality gate of every optimization, so it goes the whole way that a client goes.
"""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import msgspec

from stages.errors import ConfigError, HeadraceError, StageStartError
from stages.launch import load

CONCURRENCY = 32
ANSWER_TOKENS = 128
TIMEOUT_S = 120.0

ChatMessages = Sequence[dict[str, str]]


def eval_embedded(
    num_questions: int, url: str | None, json_path: str | None, flags: Sequence[str] = ()
) -> int:
    """Print accuracy by category; exit code 1 when it misses its bar.

    `flags`: of `headrace serve`, for the server that is started where there is no `url`.
    """
    if url is not None and flags:
        raise ConfigError(f"{flags[0]} is for the server that is started here: not with --url")
    evaluate = load("executor_svc.embedded.evaluate:evaluate")
    if url is not None:
        report = evaluate(Asker(url), n=num_questions)
    else:
        with serving(*flags) as own_url:
            report = evaluate(Asker(own_url), n=num_questions)
    print(report.table())
    if json_path is not None:
        Path(json_path).write_bytes(msgspec.json.encode(report))
    return 0 if report.passed else 1


class Asker:
    """Sends each conversation to the chat endpoint, greedy; answers come in the order asked."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc
        self._model = self._call("GET", "/v1/models")["data"][0]["id"]

    def __call__(self, conversations: Sequence[ChatMessages]) -> list[str]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self._ask, conversations))

    def _ask(self, messages: ChatMessages) -> str:
        answer = self._call(
            "POST",
            "/v1/chat/completions",
            {
                "model": self._model,
                "messages": messages,
                "temperature": 0,
                "max_tokens": ANSWER_TOKENS,
            },
        )
        return str(answer["choices"][0]["message"]["content"])

    def _call(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        content = None if body is None else msgspec.json.encode(body)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise HeadraceError(f"the server answered {response.status}: {data[:300]!r}")
        return msgspec.json.decode(data)


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """Serve the embedded model on a free port while the `with` lasts; gives its URL."""
    with TemporaryDirectory(prefix="headrace-") as run_dir:
        command = [sys.executable, "-m", "stages.cli", "serve", "--port", "0"]
        with subprocess.Popen(
            [*command, "--run-dir", run_dir, *flags], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                yield _url_of(server)
            finally:
                server.send_signal(signal.SIGTERM)


def _url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r" on (http://\S+) \(ready", line):
            return found.group(1)
    raise StageStartError("the server ended before it was ready; see its log above")
