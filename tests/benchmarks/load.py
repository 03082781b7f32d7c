"""An open-loop generator: requests go out when they are due, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

LATE_LIMIT_S = 0.2
"""A generator that sent later than this (p99) has measured itself: its run does not count."""

Send = Callable[[httpx.AsyncClient, int], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run measured. Latencies count from when a request was due, so that waiting to be sent is not forgotten."""

    requests: int
    errors: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    late_p99_s: float

    @property
    def counts(self) -> bool:
        return self.late_p99_s <= LATE_LIMIT_S


def generate(url: str, send: Send, *, rate: float, seconds: float) -> Run:
    """Send at a rate, for a while.

    Args:
        url: of the API.
        send: sends request n and says whether it was answered as it should be.
        rate: requests a second.
        seconds: for how long.
    """
    return asyncio.run(_generate(url, send, rate=rate, count=int(rate * seconds)))


async def _generate(url: str, send: Send, *, rate: float, count: int) -> Run:
    latencies: list[float] = []
    late: list[float] = []
    errors = 0
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(client.get("/livez") for _ in range(8)))
        began = time.perf_counter() + 0.1

        async def one(n: int) -> None:
            nonlocal errors
            due = began + n / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late.append(time.perf_counter() - due)
            try:
                is_right = await send(client, n)
            except httpx.HTTPError:
                is_right = False
            errors += not is_right
            latencies.append(time.perf_counter() - due)

        await asyncio.gather(*(one(n) for n in range(count)))
    return Run(
        requests=count,
        errors=errors,
        p50_ms=1e3 * quantile(latencies, 0.5),
        p99_ms=1e3 * quantile(latencies, 0.99),
        max_ms=1e3 * max(latencies),
        late_p99_s=quantile(late, 0.99),
    )


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
