"""An HTTP client for one server: hundreds of requests under way, from one event loop in a thread of its own.

Nothing that a server sends is believed: a body has a largest size, packed or not, an answer a deadline, and what
isn't HTTP is an error. Knows HTTP; nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import resource
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import yarl

LARGEST_BODY = 16 * 2**20  # bytes, unpacked; an answer of 100,000 tokens with its log-probabilities has 10 MB
CONNECT_SECONDS = 10.0
FIRST_CONCURRENCY = 32
LARGEST_CONCURRENCY = 1024
_GROWTH = 1.1  # that twice the requests must bring in throughput, for the number to stay doubled
_GROUP_SECONDS, _GROUP_ANSWERS = 1.0, 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoReply(Exception):
    """Why there was none, in words that end a message. `unreachable`: no connection could be made."""

    def __init__(self, why: str, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.unreachable = unreachable


class Concurrency:
    """How many requests are under way at a time: what was stated, or found by doubling while throughput grows.

    A number is judged by the seconds that as many answers take, after half as many have come since it was set. A
    server that refuses for being busy halves the number, and ends the search.
    """

    def __init__(self, stated: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = LARGEST_CONCURRENCY if files == resource.RLIM_INFINITY else max(1, files // 2)
        self._clock = clock
        self.limit = stated or min(FIRST_CONCURRENCY, most)
        self._most = min(LARGEST_CONCURRENCY, most)
        self._searching = stated is None
        self._before = 0.0  # answers per second at half the number
        self._since = self._began = self._clock()
        self._answers = 0  # since the number was set

    def answered(self) -> None:
        """A request has its answer."""
        if not self._searching:
            return
        self._answers += 1
        if self._answers == max(1, self.limit // 2):
            self._began = self._clock()
        elif self._answers == max(1, self.limit // 2) + self.limit:
            rate = self.limit / max(self._clock() - self._began, 1e-9)
            if rate < _GROWTH * self._before:
                self._set(self.limit // 2, search=False)
            else:
                self._before = rate
                self._set(min(2 * self.limit, self._most), search=2 * self.limit <= self._most)

    def refused(self, sent: float) -> None:
        """The server said that it is busy, to a request that was sent at `sent`, of the clock."""
        if sent >= self._since and self.limit > 1:
            self._set(self.limit // 2, search=False)

    def _set(self, limit: int, *, search: bool) -> None:
        self.limit, self._searching = limit, search
        self._since = self._began = self._clock()
        self._answers = 0


class Client:
    """Requests to one server. Its methods may be called from any thread; closing ends what is under way.

    Args:
        url: what paths are put behind.
        seconds: the longest that a whole answer may take.
        proxies: whether the environment's proxies are used.
    """

    def __init__(self, url: str, seconds: float, *, proxies: bool) -> None:
        self._urls = _Urls(url)
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        self._seconds = seconds
        self._proxies = proxies
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="messcli-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop the connections. Waits a second for the thread at most: it dies with the process."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._session is not None:
                await self._session.close()

        with contextlib.suppress(TimeoutError, asyncio.TimeoutError, Exception):  # a server may not let go
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=1.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():
            self._loop.close()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` in the client's loop and wait for it. Raises what it raises."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stream(
        self,
        count: int,
        ask: Callable[[int], Awaitable[T]],
        concurrency: Concurrency,
        draining: Callable[[], bool] = lambda: False,
    ) -> Iterator[Sequence[tuple[int, T]]]:
        """Await `ask` of 0 to `count` - 1, as many at a time as `concurrency` says; results as they come.

        Groups come once a second, be they empty, or every 64 results. What `ask` raises ends it, after the
        results before. Closing the iterator cancels what is under way. Once `draining` says so, nothing more is asked.
        """
        ready: queue.SimpleQueue[Sequence[tuple[int, T]] | BaseException | None] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(
            _all(count, ask, concurrency, draining, ready.put), self._loop
        )
        try:
            while True:
                try:
                    group = ready.get(timeout=_GROUP_SECONDS)
                except queue.Empty:
                    yield ()  # so that the caller may read a meter, or close
                    continue
                if group is None:
                    return
                if isinstance(group, BaseException):
                    raise group
                yield group
        finally:
            future.cancel()

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Reply:
        """One request. A redirect isn't followed: it could carry a key to another host. Raises NoReply."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # `Concurrency` is the limit
                auto_decompress=False,  # a few kB can unpack to any size
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
                trust_env=self._proxies,
            )
        try:
            async with self._session.request(
                method, self._urls[path], data=body, headers=headers, allow_redirects=False
            ) as answer:
                packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
                return Reply(answer.status, answer.headers, _unpacked(await _whole(answer.content), packed))
        except (aiohttp.ServerTimeoutError, aiohttp.ConnectionTimeoutError) as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise NoReply(f"no connection within {CONNECT_SECONDS:g} s", unreachable=True) from None
            raise NoReply(f"no whole answer within {self._seconds:g} s") from None
        except (TimeoutError, asyncio.TimeoutError):
            raise NoReply(f"no whole answer within {self._seconds:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise NoReply(type(error.os_error).__name__, unreachable=True) from None
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise NoReply(f"the connection failed ({type(error).__name__})") from None


async def _all(
    count: int,
    ask: Callable[[int], Awaitable[T]],
    concurrency: Concurrency,
    draining: Callable[[], bool],
    put: Callable[[Sequence[tuple[int, T]] | BaseException | None], None],
) -> None:
    """`ask` of each number, and `put` of the results in groups; then of None, or of what was raised."""
    loop = asyncio.get_running_loop()
    waiting = deque(range(count))
    running: set[asyncio.Task[None]] = set()
    group: list[tuple[int, T]] = []
    over = loop.create_future()

    def flush() -> None:
        if group:
            put(tuple(group))
            group.clear()

    async def one(index: int) -> None:
        group.append((index, await ask(index)))
        if len(group) == 1:
            timer[0] = loop.call_later(_GROUP_SECONDS, flush)
        elif len(group) >= _GROUP_ANSWERS:
            timer[0].cancel()
            flush()

    timer = [loop.call_later(0.0, flush)]  # the one that ends the group

    def start() -> None:
        if draining():
            waiting.clear()
        while waiting and len(running) < concurrency.limit:
            task = loop.create_task(one(waiting.popleft()))
            running.add(task)
            task.add_done_callback(ended)
        if not running and not over.done():
            over.set_result(None)

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            waiting.clear()
            if not over.done():
                over.set_exception(error)
            return
        start()

    start()
    try:
        await over
    except Exception as error:
        flush()
        put(error)
    else:
        flush()
        put(None)
    finally:
        timer[0].cancel()
        waiting.clear()
        for task in running:
            task.cancel()


class _Urls(dict[str, yarl.URL]):
    """Path -> URL, read once: that takes as long as sending a request."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self._base = base

    def __missing__(self, path: str) -> yarl.URL:
        self[path] = made = yarl.URL(self._base + path)
        return made


async def _whole(content: aiohttp.StreamReader) -> bytes:
    """A body to its end. Raises NoReply where it is too large."""
    parts, read = [], 0
    while part := await content.readany():
        parts.append(part)
        read += len(part)
        if read > LARGEST_BODY:
            raise NoReply(f"the answer has more than {LARGEST_BODY // 2**20} MiB")
    return b"".join(parts)


def _unpacked(body: bytes, encoding: str) -> bytes:
    """Raises NoReply where the body is too large unpacked, broken, or packed in a way that wasn't asked for."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise NoReply("the answer is packed in a way that wasn't asked for")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # tells gzip and zlib apart by itself
    try:
        whole = unpack.decompress(body, LARGEST_BODY + 1)
    except zlib.error:
        raise NoReply("the answer can't be unpacked") from None
    if len(whole) > LARGEST_BODY:
        raise NoReply(f"the answer has more than {LARGEST_BODY // 2**20} MiB")
    return whole
