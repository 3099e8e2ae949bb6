"""What a client sees of a stream while it runs."""

import time
from concurrent.futures import ThreadPoolExecutor

from support.api_client import BASE, Api, oracle

TOKENS = 700


def test_no_stream_is_held_back(api: Api) -> None:
    """Steps take some milliseconds, and every one of them has its chunk: no client waits for a
    large part of the whole. vLLM's own waiting held answers back for half of it and more on two
    cores that did nothing else."""
    prompt = oracle("base")["prompts"][0]["prompt_token_ids"]

    def longest_gap(start: float) -> float:
        last, longest = start, 0.0
        for _ in api.complete(BASE, prompt, TOKENS, stream=True):
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        return longest

    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        gaps = list(pool.map(longest_gap, [start] * 2))
    assert max(gaps) < (time.monotonic() - start) / 5
