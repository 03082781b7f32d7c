"""A connection to the HTTP API: requests, answers, streams, and what is made of trouble."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import httpx
from pydantic import JsonValue, TypeAdapter, ValidationError

from ncfm_core.errors import NcfmError
from service.messages import MEDIA_TYPE, Message, parse
from service.replies import problems_of

CONNECT_TIMEOUT_S = 3.0
TIMEOUT_S = 30.0
POLL_S = 0.5
READ_S = 45.0
"""A stream that is silent for longer has lost its connection: the service pings more often."""
AGAIN = frozenset({429, 503})
"""Statuses that ask to come back."""

T = TypeVar("T")


class ClientError(NcfmError):
    """The service refuses what was asked."""

    code = "client_error"


class NotNow(ClientError):
    """The service cannot do it now, and asks to come back."""


class ServiceAway(ClientError):
    """No service answers at the address."""

    code: ClassVar[str] = "service_away"


class Connection:
    """The API at one address.

    Raises:
        ServiceAway: by every method, when nothing answers.
        ClientError: by every method, when the service refuses; it names field, value and way out.
    """

    def __init__(self, url: str, *, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        """Open nothing yet.

        Args:
            url: of the API, such as http://127.0.0.1:8000.
            key: of the API (`ncfm_...`), where it asks for one.
            transport: in place of the network.
        """
        self.url = url.rstrip("/")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise ClientError.of("NCFM_API_KEY", None, "not a key of the API", "`ncfm keys create` makes one.")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={} if key is None else {"Authorization": f"Bearer {key.strip()}"},
                timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                transport=transport,
                # A proxy cannot see this machine's loopback.
                trust_env=httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ClientError.of("url", url, f"not an address: {error}", "Try http://127.0.0.1:8000.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def _patiently(self, ask: Callable[[], T], patience_s: float) -> T:
        """An answer, asked for again while the service is away or not ready."""
        deadline, pause = time.monotonic() + patience_s, 0.1
        while True:
            try:
                return ask()
            except (ServiceAway, NotNow):
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2.0, 2 * pause)

    def _read(self, kind: type[T], data: str) -> T:
        try:
            return TypeAdapter(kind).validate_json(data)
        except ValidationError as error:
            raise self._stranger(f"{kind.__name__}: {error.errors()[0]['msg']}") from None

    def _get(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        response = self._ask(method, path, **options)
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._stranger(f"{kind.__name__}.{where}: {first['msg']}") from None

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._away(error) from error
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _messages(
        self, path: str, params: Mapping[str, str], *, patience_s: float, last_id: str = ""
    ) -> Iterator[Message]:
        """The messages of a stream to its end, with as many connections as that takes.

        Args:
            path: of the stream.
            params: of its query.
            patience_s: how long the service may be away.
            last_id: where to begin.
        """
        heard_at = [time.monotonic()]
        while True:
            headers = {"Accept": MEDIA_TYPE} | ({"Last-Event-ID": last_id} if last_id else {})
            timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=READ_S)
            trouble: ClientError | None = None
            try:
                with self._http.stream("GET", path, headers=headers, params=params, timeout=timeout) as response:
                    if not response.is_success:
                        response.read()
                        trouble = self._refusal(response)
                        if response.status_code not in AGAIN:
                            raise trouble
                    elif response.status_code == 204:
                        return
                    else:
                        for message in parse(_heard(response.iter_bytes(), heard_at)):
                            last_id = message.id or last_id
                            yield message
                            if message.event == "end":
                                return
            except httpx.HTTPError as error:
                trouble = self._away(error)
            if time.monotonic() - heard_at[0] > patience_s:
                raise trouble or self._stranger(f"{path} gives a stream without an end")
            time.sleep(POLL_S)

    def _away(self, error: Exception) -> ServiceAway:
        why = str(error) or type(error).__name__
        return ServiceAway.of("url", self.url, f"no service answers: {why}", "Is it running? See `ncfm status`.")

    def _stranger(self, what: str) -> ClientError:
        return ClientError.of("url", self.url, f"not the API of this service ({what})", "Check the address.")

    def _refusal(self, response: httpx.Response) -> ClientError:
        try:
            document = TypeAdapter(dict[str, JsonValue]).validate_json(response.content)
        except ValidationError:
            return self._stranger(f"{response.request.url.path} answers {response.status_code}")
        kind = NotNow if response.status_code in AGAIN else ClientError
        return kind(*problems_of(document))


def _heard(chunks: Iterable[bytes], heard_at: list[float]) -> Iterator[bytes]:
    """The chunks, noting when the last of them came."""
    for chunk in chunks:
        heard_at[0] = time.monotonic()
        yield chunk
