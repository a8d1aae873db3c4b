"""Eight concurrent streams whose texts are known to be the same every time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.process.group import Group

NUM_STREAMS = 8
MAX_TOKENS = 200
KINDS = ("greedy", "seeded")


def run_streams(
    group: Group, kind: str, on_chunk: Callable[[], object] = lambda: None
) -> list[str]:
    """The texts of eight concurrent streams, each of exactly MAX_TOKENS tokens."""
    client = group.client()
    sampling = {"temperature": 0} if kind == "greedy" else {"temperature": 1.2, "top_p": 0.95}

    def run(index: int) -> str:
        stream = client.completions.create(
            model="headrace-embedded",
            prompt=f"Tell me a story about a fox and {index} stars.",
            max_tokens=MAX_TOKENS,
            seed=index,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            **sampling,
        )
        text = ""
        usage = None
        for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            usage = chunk.usage or usage
            on_chunk()
        assert usage is not None and usage.completion_tokens == MAX_TOKENS
        return text

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(run, range(NUM_STREAMS)))
