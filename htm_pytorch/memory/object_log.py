"""`ObjectLog`: the log of a memory in an object store, one object that is replaced as a whole.

It is replaced on the condition that it is still the one that was read. So it leaves no versions
behind, and of two writers the one who comes second learns of it.
"""

import contextlib
import datetime
import importlib.util
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from htm_pytorch.memory.files import MemoryFileError
from htm_pytorch.memory.log import (
    REPAIR,
    Contents,
    Head,
    Record,
    check_records,
    sealed,
    unknown,
    unsealed,
)
from htm_pytorch.memory.place import Place

MAGIC = b"HTMLOG02"
NAME = "journal"
SCHEMES = ("s3", "gs", "az", "abfss")
"""Of stores that replace an object on a condition, and that the engine of the table knows."""
EARLIER = "journal.lance"
"""The name that the log of format 1 had, which was a table."""
_NUMBER_BYTES = 16
_SIZE = struct.Struct("<Q")
_PROBE = f"{NAME}-probe"
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "timeout",
        "user_agent",
    }
)
"""Those of `storage_options` that obstore takes apart from the others."""
_OF_THE_TABLE = re.compile(r"lance_|download_retry_count$")
"""Those that say nothing about the log."""
_threads_of: int | None = None
"""The process in which obstore has begun to work."""
_inherited: list[Any] = []


class _Object(NamedTuple):
    """The object, as it was at one moment."""

    number: bytes
    """Another one for each that was ever written: so a writer knows its own again."""
    tag: dict[str, str]
    """What the store calls it."""
    head: Head
    records: list[bytes]


class ObjectLog:
    """The log of the memory at a place."""

    def __init__(self, place: Place):
        check_uri(place.uri)
        self.where = f"the log {place.uri}/{NAME}"
        scheme, _, rest = place.uri.partition("://")
        bucket, _, self._folder = rest.partition("/")
        self._bucket = f"{scheme}://{bucket}"
        self._options = place.storage_options or {}
        self._store: Any = None
        # As it was read or written last.
        self._seen: _Object | None = None
        # Numbers of those that were sent, and of which no answer came.
        self._sent: set[bytes] = set()
        self._is_writer = False
        # Whether what was seen is what this has written, and no call since then broke off.
        self._is_own = False
        self._is_fenced = False

    def read(self, known: Head | None = None) -> Contents | None:
        """Return the head and the records that are not known; see `Log.read`."""
        found = self._seen if self._is_own else self._follow()
        if found is None:
            return None
        head = found.head
        now = head.generation, head.sequence
        if known is not None and (known.generation, known.sequence) == now:
            return Contents(head, [])
        start = unknown(head, known)
        records = self._decoded(found)
        first = max((r.first_step for r in records if r.first_step <= start), default=0)
        records = [record for record in records if record.first_step >= first]
        return check_records(self.where, Contents(head, records), known if start else None)

    def create(self, contents: Contents) -> None:
        """Make the object, unless there is one already.

        Raises:
            ValueError: the store replaces objects whatever the condition.
        """
        self._check_conditions()
        records = [record.encode() for record in contents.records]
        self._put(contents.head, records, None)

    def write(
        self, head: Head, new: Sequence[Record], replace: bool, pin: bytes | None = None
    ) -> None:
        """Change to `head`; see `Log.write`."""
        seen = self._seen
        if seen is None:
            raise MemoryFileError(f"{self.where} is gone; {REPAIR}")
        # What is there may be newer than what the caller has read.
        self._is_fenced |= head.sequence != seen.head.sequence + 1
        if self._is_fenced:
            raise self._second()
        records = [record.encode() for record in new]
        self._put(head, records if replace else [*seen.records, *records], seen)

    def reopen(self) -> None:
        """Look again at what is there, since a call did not end."""
        self._store, self._is_own = None, False

    def purge(self) -> None:
        """Leave no byte of records that are no more: only an earlier format left any."""
        self.remove(EARLIER)

    def remove(self, folder: str) -> None:
        """Remove all objects of a folder beside the log."""
        with self._errors("removed"):
            store = self._open()
            for some in store.list(self._path(folder)):
                store.delete([found["path"] for found in some])

    def problems(self) -> list[str]:
        """Return what is wrong with the object."""
        try:
            found = self._get()
            if found is None:
                return [f"{self.where} is gone; {REPAIR}"]
            self._decoded(found)
        except MemoryFileError as error:
            return [str(error)]
        return []

    def inherit(self) -> None:
        """Go on in a forked child, which knows what was read so far."""
        _inherited.append(self._store)
        self._store = None

    def size(self) -> int:
        """Return the bytes of the object."""
        with self._errors("read"):
            return int(self._open().head(self._path(NAME))["size"])

    def close(self) -> None:
        """Let go of the connection."""
        self._store, self._is_own = None, False

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _follow(self) -> _Object | None:
        """Look at what is there, and remember it."""
        seen, found = self._seen, self._get(self._seen)
        if self._is_writer and seen is not None and found is not None:
            self._is_fenced |= found.number not in {seen.number, *self._sent}
        self._seen = found
        return found

    def _get(self, seen: _Object | None = None) -> _Object | None:
        """Return what is there; None: nothing; `seen`, if it still is that."""
        from obstore.exceptions import NotModifiedError

        condition = {"if_none_match": seen.tag["e_tag"]} if seen and "e_tag" in seen.tag else None
        try:
            with self._errors("read"):
                found = self._open().get(self._path(NAME), options=condition)
                body = bytes(found.bytes())
        except NotModifiedError:
            return seen
        except FileNotFoundError:
            return None
        return self._taken_apart(body, _tag(found.meta))

    def _put(self, head: Head, records: list[bytes], seen: _Object | None) -> None:
        """Replace what was seen, if it is still there; None: if there is nothing."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        self._is_writer, self._is_own = True, False
        number = uuid.uuid4().bytes
        body = _put_together(number, head, records)
        mode: Any = "create" if seen is None else seen.tag
        self._sent.add(number)
        try:
            with self._errors("written"):
                done = self._open().put(self._path(NAME), body, mode=mode, use_multipart=False)
            tag = _tag(done)
        except (AlreadyExistsError, PreconditionError) as error:
            found = self._get()
            if found is None and seen is not None:
                raise MemoryFileError(f"{self.where} is gone; {REPAIR}") from error
            if found is None or (found.number in self._sent and found.number != number):
                raise OSError(f"{self.where} could not be written; try again") from error
            if found.number != number:
                self._is_fenced = seen is not None
                if self._is_fenced:
                    raise self._second() from error
                return
            # It is this one, and the answer to it was lost.
            tag = found.tag
        self._seen, self._is_own = _Object(number, tag, head, records), True
        # None of those before can come true any more.
        self._sent = {number}

    def _check_conditions(self) -> None:
        """Raise a ValueError where the store would let a second writer replace what is new."""
        from obstore.exceptions import PreconditionError

        path = self._path(_PROBE)
        with contextlib.suppress(PreconditionError, FileNotFoundError), self._errors("written"):
            other: Any = {"e_tag": '"1"', "version": "1"}
            self._open().put(path, b"", mode=other, use_multipart=False)
            self._open().delete(path)
            raise ValueError(
                f"uri: the store of {self._bucket!r} replaces an object even where it is another "
                "one than expected (If-Match), so nothing would keep a second writer from undoing "
                "what a first one stored; use one that heeds conditions, or a folder"
            )

    def _open(self) -> Any:
        global _threads_of
        if _threads_of not in (None, os.getpid()):
            raise OSError(
                f"{self.where} cannot be reached from a process that was forked from one that has "
                "used an object store: start it with the method 'spawn' or 'forkserver'"
            )
        # Another thread may let go of it meanwhile.
        store = self._store
        if store is None:
            from obstore.store import from_url

            _threads_of = os.getpid()
            try:
                options = _sorted(self._options) | _profile(self._bucket, self._options)
                store = self._store = from_url(self._bucket, **options)
            except Exception as error:
                raise ValueError(
                    f"uri, storage_options: expected those of an object store, got "
                    f"{self._bucket!r} and {sorted(self._options)} ({_first_line(error)})"
                ) from error
        return store

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Say what is wrong in one sentence."""
        from obstore import exceptions

        try:
            yield
        except (
            exceptions.AlreadyExistsError,
            exceptions.NotModifiedError,
            exceptions.PreconditionError,
        ):
            raise
        except exceptions.NotFoundError as error:
            raise FileNotFoundError(str(error)) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise OSError(
                    f"uri: there is no bucket {self._bucket!r}, so {self.where} cannot be {done}; "
                    "make the bucket first, or correct `uri` or `storage_options`"
                ) from error
            raise
        except exceptions.BaseError as error:
            kind, why = OSError, _first_line(error)
            refused = exceptions.PermissionDeniedError, exceptions.UnauthenticatedError
            if isinstance(error, refused):
                kind = PermissionError
            elif "169.254.169.254" in why or "metadata" in why:
                kind, why = PermissionError, f"no credentials were found: {why}"
            elif "builder error" in why:
                why = f"an endpoint of http:// needs allow_http: {why}"
            raise kind(
                f"uri, storage_options: {self.where} cannot be {done} ({why}); credentials, region "
                "and endpoint come from `storage_options` or the environment, as aws_access_key_id "
                "or AWS_ACCESS_KEY_ID"
            ) from error

    def _second(self) -> BlockingIOError:
        return BlockingIOError(
            f"uri: {self.where} was changed by another writer since this one opened it; what was "
            "acknowledged to either is stored; close this memory, and open it again once the "
            "other one has ended"
        )

    def _taken_apart(self, body: bytes, tag: dict[str, str]) -> _Object:
        with self._damage():
            if body[: len(MAGIC)] != MAGIC:
                raise ValueError("it is of another format")
            parts, at = [], len(MAGIC)
            while at < len(body):
                (size,) = _SIZE.unpack_from(body, at)
                at += _SIZE.size + size
                parts.append(body[at - size : at])
            seal, head, *records = parts
            if at != len(body):
                raise ValueError("its end is missing")
            number, sums = unsealed(seal)[:_NUMBER_BYTES], unsealed(seal)[_NUMBER_BYTES:]
            if sums != b"".join(part[:4] for part in (head, *records)):
                raise ValueError("some of it is missing")
            return _Object(number, tag, Head.decode(head), records)

    def _decoded(self, found: _Object) -> list[Record]:
        with self._damage():
            return [Record.decode(record) for record in found.records]

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError, struct.error) as error:
            raise MemoryFileError(f"{self.where} is damaged ({error}); {REPAIR}") from error


def check_uri(uri: str) -> None:
    """Raise a ValueError unless log and table will be in one place."""
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        expected = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"uri: expected a folder or one of {expected}, got {uri!r}")
    # The engine of the table takes these for parts of an address.
    odd = sorted(set(re.findall(r"[?#%\\]", rest)))
    if odd or {"", ".", ".."} & set(rest.split("/")):
        wrong = " ".join(odd) or "an empty part, '.' or '..'"
        raise ValueError(f"uri: expected a place without {wrong}, got {uri!r}")


def _put_together(number: bytes, head: Head, records: Sequence[bytes]) -> bytes:
    parts = [head.encode(), *records]
    # The checksums of all parts behind one of their own, so that none can be missing.
    seal = sealed(number + b"".join(part[:4] for part in parts))
    body = [MAGIC]
    for part in (seal, *parts):
        body += [_SIZE.pack(len(part)), part]
    return b"".join(body)


def _tag(meta: Any) -> dict[str, str]:
    """Return what tells this object from others; not all stores give both."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _sorted(options: Mapping[str, str]) -> dict[str, Any]:
    """Return options of the store, of its connections and of another try, as obstore takes them."""
    config: dict[str, Any] = {}
    client: dict[str, Any] = {}
    retry: dict[str, Any] = {}
    for name, value in options.items():
        key = name.lower()
        bare = key.removeprefix("aws_").removeprefix("azure_").removeprefix("google_")
        if bare in _CLIENT_OPTIONS:
            client[bare] = value
        elif key == "client_max_retries":
            retry["max_retries"] = int(value)
        elif key == "client_retry_timeout":
            retry["retry_timeout"] = datetime.timedelta(seconds=float(value))
        elif not _OF_THE_TABLE.match(key):
            config[key] = value
    found = {"config": config, "client_options": client, "retry_config": retry}
    return {name: some for name, some in found.items() if some}


def _profile(bucket: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the credentials of the user's profile, as the table's engine finds them, too.

    Only where none are given, and if boto3 is installed, which reads them.
    """
    given = {name.lower().removeprefix("aws_") for name in options}
    if given & {"access_key_id", "skip_signature"} or "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    if not bucket.startswith("s3:") or importlib.util.find_spec("boto3") is None:
        return {}
    from obstore.auth.boto3 import Boto3CredentialProvider

    with contextlib.suppress(ValueError):
        return {"credential_provider": Boto3CredentialProvider()}
    return {}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip()
