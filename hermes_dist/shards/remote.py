"""Object stores and web servers behind the `Storage` protocol, through obstore; and `open_storage`, the door for every URL.

Credentials come from the usual environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`) or the machine's role, never from a URL or a config;
URLs that carry some are refused, so none can reach a log. Ranges of one object are fetched concurrently, near ones in one
request. obstore's own short retries smooth over single hiccups; what remains is classified here and
retried by whoever knows the plan.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as obstore_errors
from obstore.store import HTTPStore, from_url

from hermes_dist.errors import CorruptShardError, StorageAccessError, StoreError, TransientStorageError
from hermes_dist.shards.storage import LocalStorage, Storage, check_path, coalesce, split_url

RETRIES = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}
TIMEOUTS = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=10)}
MAX_GAP_BYTES = 1 << 20
"""Ranges closer than this are fetched by one request (as long a transfer as a request's latency) …"""
MAX_JOINED_BYTES = 16 << 20
"""… up to this size; more is fetched concurrently."""
CONCURRENT_REQUESTS = 8
REFUSED_STATUS = re.compile(r"status(?: code)?:? (?:4(?!08|10|25|29)\d\d|301)\b", re.IGNORECASE)
"""Answers that will not change: 4xx apart from 408 Timeout, 410 Gone, 425 Too Early, 429 Too Many Requests; a wrong region."""
PASSING_CODE = re.compile(r"\b(?:ExpiredToken\w*|TokenRefreshRequired|RequestTimeout)\b")
"""S3 says these with status 400 or 403: credentials that are renewed meanwhile, a connection that was too slow."""


def open_storage(url: str) -> Storage:
    """The storage behind a path or URL (file, s3, gs, az, http, https). Nothing is contacted yet.

    Raises:
        StoreError: unknown scheme, or a URL that carries credentials.
    """
    scheme, where = split_url(url)
    return LocalStorage(where) if scheme == "file" else RemoteStorage(where)


class RemoteStorage:
    """Objects below a URL. Can be pickled; every process (also after a fork) opens its own client."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise StoreError(
                f"store {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: credentials and queries do not "
                "belong into a URL; set them in the environment (AWS_*, GOOGLE_*, AZURE_*)"
            )
        self._url = url.rstrip("/")
        self._client: tuple[int, Any] | None = None
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> str:
        return self._url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # the client is opened anew by whoever unpickles

    @property
    def url(self) -> str:
        """The URL."""
        return self._url

    @property
    def _store(self) -> Any:
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                self._client = (os.getpid(), _connect(self._url))
            return self._client[1]

    @contextmanager
    def _errors(self, path: str) -> Generator[None]:
        name = f"{self._url}/{path}"
        try:
            yield
        except FileNotFoundError:
            raise StoreError(f"{name} does not exist; check the URL, or convert again") from None
        except (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError, PermissionError) as error:
            raise _refused(name, _short(error)) from None
        except obstore_errors.NotSupportedError as error:
            raise StoreError(f"{name}: {_short(error)}; this kind of storage cannot do that") from None
        except (obstore_errors.BaseError, OSError) as error:
            text = _short(error)
            if "range" in text.lower() and ("416" in text or "larger than" in text or "beyond" in text):
                raise CorruptShardError(f"{name} is shorter than expected ({text}); convert this case again") from None
            if re.search(r"status(?: code)?:? 410\b", text, re.IGNORECASE):
                raise StoreError(f"{name} does not exist any more ({text}); convert again") from None
            raise _refused(name, text) if REFUSED_STATUS.search(text) else TransientStorageError(f"{name}: {text}") from None

    def read(self, path: str, limit_bytes: int = 1 << 33) -> bytes:
        """See `Storage.read`."""
        check_path(path)
        with self._errors(path):
            answer = obstore.get(self._store, path)
            n_bytes = answer.meta["size"]
            data = b"" if n_bytes > limit_bytes else bytes(answer.bytes())
        if n_bytes > limit_bytes:
            raise StoreError(f"{self._url}/{path} has {n_bytes} bytes, more than {limit_bytes}; this is no file of a store")
        return data

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """See `Storage.read_ranges`."""
        check_path(path)
        if not ranges:
            return
        groups = coalesce(ranges, MAX_GAP_BYTES, MAX_JOINED_BYTES)
        if len(groups) == 1:
            parts = iter([self._get_range(path, groups[0][0], groups[0][1])])
        else:
            parts = self._threads().map(self._get_range, repeat(path), [g[0] for g in groups], [g[1] for g in groups])
        for part, (_, _, members) in zip(parts, groups, strict=True):
            for offset, length in members:
                yield part[offset : offset + length]

    def _get_range(self, path: str, start: int, length: int) -> memoryview:
        # Not `get_ranges`: it ends in a Rust panic (a BaseException) where an object is shorter than a joined range.
        with self._errors(path):
            part = memoryview(obstore.get_range(self._store, path, start=start, length=length))
        if len(part) != length:
            raise CorruptShardError(
                f"{self._url}/{path} ends at byte {start + len(part)}, expected {start + length}; convert this case again"
            )
        return part

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = (os.getpid(), ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="obstore"))
            return self._pool[1]

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        check_path(path)
        try:
            with self._errors(path):
                return int(obstore.head(self._store, path)["size"])
        except StoreError as error:
            if "does not exist" in str(error):
                return None
            raise

    def write(self, path: str, data: bytes | memoryview) -> None:
        """See `Storage.write` (object stores publish an object when its upload is complete)."""
        check_path(path)
        with self._errors(path):
            obstore.put(self._store, path, data)

    def list(self, prefix: str) -> Iterator[str]:
        """See `Storage.list`."""
        with self._errors(prefix):
            for batch in obstore.list(self._store, prefix or None):
                yield from (item["path"] for item in batch)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        check_path(path)
        try:
            with self._errors(path):
                obstore.delete(self._store, path)
        except StoreError as error:
            if "does not exist" not in str(error):
                raise

    def sweep(self) -> None:
        """Nothing: unfinished uploads are not objects (a bucket's lifecycle rule removes their parts)."""


def _connect(url: str) -> Any:
    scheme = urlsplit(url).scheme
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
    options: dict[str, Any] = {**TIMEOUTS, "allow_http": scheme == "http" or endpoint.startswith("http://")}
    try:
        if scheme in ("http", "https"):
            return HTTPStore.from_url(url, client_options=options, retry_config=RETRIES)  # pyright: ignore[reportArgumentType]
        return from_url(url, client_options=options, retry_config=RETRIES)  # pyright: ignore[reportArgumentType,reportCallIssue]
    except (obstore_errors.BaseError, ValueError) as error:
        raise StoreError(f"store {url}: {_short(error)}; check the URL and the credentials in the environment") from None


def _refused(name: str, text: str) -> StorageAccessError | TransientStorageError:
    if PASSING_CODE.search(text):
        return TransientStorageError(f"{name}: {text}")
    return StorageAccessError(
        f"{name}: the storage refuses access ({text}); check the credentials in the environment (AWS_*, GOOGLE_*, AZURE_*) or of "
        "the machine's role, that they may read (and list: without that, a missing object looks like this too), and the region"
    )


def _short(error: BaseException) -> str:
    """First lines of obstore's message, without its debug dump, and without what an answer repeats of signatures and tokens."""
    text = re.sub(r"\s+", " ", str(error).split("\n\nDebug source")[0])
    text, markup, body = re.sub(r"\?[^\s)\"'<]+", "?…", text).partition("<")
    if markup:
        code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", body) for tag in ("Code", "Message"))
        text += f"{code[1] if code else '…'}" + (f": {message[1]}" if message else "")
    return text[:400]
