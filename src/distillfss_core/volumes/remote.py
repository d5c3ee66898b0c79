"""OME-Zarr at an address (https://, s3://): read piece by piece, again after a dropped connection."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from distillfss_core.errors import InputFileError, SettingsError
from distillfss_core.volumes.source import reason

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

log: logging.Logger = logging.getLogger(__name__)

SCHEMES = ("https", "http", "s3", "gs")
PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a request that failed is repeated; after the last one it is an error."""

_TIMEOUT = {"connect": 20, "read": 60}  # seconds
_NEEDED = {"https": ("fsspec", "aiohttp"), "s3": ("fsspec", "s3fs"), "gs": ("fsspec", "gcsfs")}
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "s3fs")
_PASSING = (408, 425, 429)  # HTTP states that may be others a moment later


class Address(str):
    """Where a zarr lies, e.g. https://host/image.ome.zarr; "/" appends a part."""

    __slots__ = ()

    def __truediv__(self, part: str) -> Address:
        return Address(f"{self}/{part}")


def address_of(source: str | Path) -> Address | None:
    """The address that a path or text stands for; None of a file.

    A `Path` has lost a slash of it ("https:/host/..."), which is put back.

    Raises
    ------
    SettingsError
        If it begins as an address does, but is none that can be read.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}", text)
    if match is None or (Path(text).exists() and "://" not in text):
        return None
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        advice = "give the path without it" if scheme == "file" else "give https:// or s3://, or a copy on disk"
        raise SettingsError(f"{text}: cannot read {scheme}://; {advice}")
    return Address(f"{scheme}://{text[match.end() :].rstrip('/')}")


def remote_store(address: Address, *, anonymous: bool = True) -> RemoteStore:
    """The store at an address, as zarr takes it; nothing is requested yet.

    Parameters
    ----------
    address : Address
    anonymous : bool
        Whether to read without credentials, as public archives are. Otherwise those of the user's environment or
        settings files are used.

    Raises
    ------
    SettingsError
        If a package that this needs is not installed.
    """
    scheme = address.partition(":")[0].replace("http", "https").replace("httpss", "https")
    try:
        for module in _NEEDED[scheme]:
            import_module(module)
    except ModuleNotFoundError as error:
        package = "gcsfs" if scheme == "gs" else "'napari-distillfss[remote]'"
        raise SettingsError(f"{address}: reading it needs {error.name}: pip install {package}") from error
    from zarr.storage import FsspecStore

    system = _file_system(scheme, anonymous, os.getpid())
    return RemoteStore(FsspecStore(system, read_only=True, path=system._strip_protocol(address)), address)


@cache
def _file_system(scheme: str, anonymous: bool, process: int) -> Any:
    """The client of a kind of address; one a process, closed when that ends."""
    options: dict[str, Any] = {"asynchronous": True, "skip_instance_cache": True}
    if scheme == "https":
        timeout = import_module("aiohttp").ClientTimeout(
            total=None, sock_connect=_TIMEOUT["connect"], sock_read=_TIMEOUT["read"]
        )
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    elif scheme == "s3":
        times = {f"{name}_timeout": seconds for name, seconds in _TIMEOUT.items()}
        options |= {"anon": anonymous, "config_kwargs": {**times, "retries": {"max_attempts": 1}}}
    else:
        options["token"] = "anon" if anonymous else None
    system = import_module("fsspec").filesystem(scheme, **options)
    atexit.register(_close, system, process)
    return system


def _close(system: Any, process: int) -> None:
    """End what is still requested, and close the connections of a client."""
    if process != os.getpid():
        return
    with suppress(Exception):
        sync(_cancel_requests())
    for name in ("_session", "_s3"):  # of HTTP; of S3
        client = getattr(system, name, None)
        if client is not None:
            with suppress(Exception):
                sync(client.close())


async def _cancel_requests() -> None:
    """Cancel the requests that nobody waits for, as another one failed; Python would name each at its end."""
    requests = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in requests:
        task.cancel()
    await asyncio.gather(*requests, return_exceptions=True)


class RemoteStore(WrapperStore[Any]):
    """A store at an address that repeats requests, and remembers what is not there.

    Parameters
    ----------
    store : FsspecStore
    address : str
        For messages.
    """

    def __init__(self, store: Any, address: str = "") -> None:
        super().__init__(store)
        self.address = address
        self.absent: set[str] = set()
        """Keys that were requested and are not there."""
        self.denied: set[str] = set()
        """Those of them to which access was denied; some servers do so for whatever is not there."""

    def _with_store(self, store: Any) -> RemoteStore:
        return type(self)(store, self.address)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of a key, or None if it is not there.

        Raises
        ------
        InputFileError
            If the server cannot be reached or does not answer, also when repeated.
        """
        value = await self._repeated(key, partial(self._store.get, key, prototype, byte_range))
        (self.absent.add if value is None else self.absent.discard)(key)
        return _cut(value, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The bytes of parts of keys, in their order; None for a key that is not there. Errors are those of `get`."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether a key is there. Errors are those of `get`."""
        return bool(await self._repeated(key, partial(self._store.exists, key)))

    async def _repeated(self, key: str, request: Callable[[], Awaitable[Any]]) -> Any:
        for pause in (*PAUSES, None):
            try:
                return await request()
            except Exception as error:  # of many libraries; what is no matter of the network is raised
                if _is_denied(error):
                    self.denied.add(key)
                    return None
                if not _is_of_network(error):
                    raise
                if pause is None:
                    raise InputFileError(
                        f"{self.address}/{key}: cannot be read, {len(PAUSES) + 1} requests failed "
                        f"({type(error).__name__}: {reason(error)}); check the connection and the address"
                    ) from error
                log.info("%s/%s: %s; requested again", self.address, key, reason(error))
                await asyncio.sleep(pause)
        raise AssertionError


def _cut(value: Buffer | None, part: ByteRequest | None) -> Buffer | None:
    """The part that was requested: a server that knows no ranges sends the whole."""
    if value is None:
        return None
    if isinstance(part, RangeByteRequest) and len(value) > part.end - part.start:
        return value[part.start : part.end]
    if isinstance(part, SuffixByteRequest) and len(value) > part.suffix:
        return value[len(value) - part.suffix :]
    return value


def _is_denied(error: Exception) -> bool:
    no_credentials = "Credentials" in type(error).__name__
    return no_credentials or isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)


def _is_of_network(error: Exception) -> bool:
    """Whether a request that failed so may succeed when it is repeated."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status in _PASSING or status >= 500
    library = type(error).__module__.partition(".")[0] in _LIBRARIES
    return library or isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError))
