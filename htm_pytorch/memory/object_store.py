"""`Objects`: a folder of an object store, whose objects can be replaced on a condition."""

import contextlib
import datetime
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

SCHEMES = ("s3", "gs", "az", "abfss")
"""Stores that replace an object on a condition, and that the engine of the table knows."""
PROBE = "journal-probe"
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
"""Names of `storage_options` that obstore takes apart from the others."""
_OF_THE_TABLE = re.compile(r"lance_|download_retry_count$")
"""Names of `storage_options` that say nothing about the log."""
_process: int | None = None
"""The one in which obstore has begun to work."""
_inherited: list[Any] = []


class Found(NamedTuple):
    """An object, as it was at one moment."""

    body: bytes
    tag: dict[str, str]
    """What the store calls it, as long as it is not replaced."""


class Replaced(Exception):
    """An object is not the one that was to be replaced."""


class Objects:
    """What is in a folder of an object store.

    Whatever the store or the network refuses is an OSError of one sentence.
    """

    def __init__(self, uri: str, options: Mapping[str, str] | None):
        check_uri(uri)
        self.uri = uri
        scheme, _, rest = uri.partition("://")
        bucket, _, self._folder = rest.partition("/")
        self._bucket = f"{scheme}://{bucket}"
        self._options = dict(options or {})
        self._store: Any = None

    def get(self, name: str, known: Mapping[str, str] | None = None) -> Found | None:
        """Return an object; None: it is still the one of the tag `known`.

        Raises:
            FileNotFoundError: there is none.
        """
        from obstore.exceptions import NotModifiedError

        tag = (known or {}).get("e_tag")
        condition = {"if_none_match": tag} if tag else None
        try:
            with self._errors(name, "read"):
                found = self._open().get(self._path(name), options=condition)
                return Found(bytes(found.bytes()), _tag(found.meta))
        except NotModifiedError:
            return None

    def put(self, name: str, body: bytes, known: Mapping[str, str] | None) -> dict[str, str]:
        """Replace the object of the tag `known`, or, None, make one; return its new tag.

        Raises:
            Replaced: there is another one, or none.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if known is None else dict(known)
        try:
            with self._errors(name, "written"):
                done = self._open().put(self._path(name), body, mode=mode, use_multipart=False)
                return _tag(done)
        except (AlreadyExistsError, PreconditionError) as error:
            raise Replaced(_first_line(error)) from error

    def check_conditions(self) -> None:
        """Raise a ValueError where the store replaces objects whatever the condition."""
        try:
            self.put(PROBE, b"", {"e_tag": '"1"', "version": "1"})
        except (Replaced, FileNotFoundError):
            return
        self.delete([PROBE])
        raise ValueError(
            f"uri: the store of {self._bucket!r} replaces an object even where it is another one "
            "than expected (If-Match), so nothing would keep a second writer from undoing what a "
            "first one stored; use one that heeds conditions, or a folder"
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the names of all objects in a folder, and their bytes."""
        start = len(self._path(""))
        with self._errors(folder, "listed"):
            listed = self._open().list(self._path(folder))
            return {found["path"][start:]: found["size"] for some in listed for found in some}

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        with self._errors(name, "read"):
            return int(self._open().head(self._path(name))["size"])

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        paths = [self._path(name) for name in names]
        if paths:
            with self._errors("", "deleted"):
                self._open().delete(paths)

    def reopen(self) -> None:
        """Make another connection, when one is needed."""
        self._store = None

    def inherit(self) -> None:
        """Leave the connection to the process of which this is a fork."""
        _inherited.append(self._store)
        self._store = None

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _open(self) -> Any:
        global _process
        if _process not in (None, os.getpid()):
            raise OSError(
                f"{self.uri!r} cannot be reached from a process that was forked from one that has "
                "used an object store: start it with the method 'spawn' or 'forkserver'"
            )
        # Another thread may let go of it meanwhile.
        store = self._store
        if store is None:
            from obstore.store import from_url

            _process = os.getpid()
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
    def _errors(self, name: str, done: str) -> Iterator[None]:
        from obstore import exceptions

        where = f"{self.uri}/{name}"
        try:
            yield
        except (
            exceptions.AlreadyExistsError,
            exceptions.NotModifiedError,
            exceptions.PreconditionError,
        ):
            raise
        except (exceptions.NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise OSError(
                    f"uri: there is no bucket {self._bucket!r}, so {where} cannot be {done}; make "
                    "the bucket first, or correct `uri` or `storage_options`"
                ) from error
            raise FileNotFoundError(f"{where} is not there") from error
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
                f"uri, storage_options: {where} cannot be {done} ({why}); try again, or see to "
                "credentials, region and endpoint, which come from `storage_options` or the "
                "environment, as aws_access_key_id or AWS_ACCESS_KEY_ID"
            ) from error


def check_uri(uri: str) -> None:
    """Raise a ValueError unless obstore and the engine of the table will mean the same place."""
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        expected = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"uri: expected a folder or one of {expected}, got {uri!r}")
    # The engine takes these for parts of an address.
    odd = sorted(set(re.findall(r"[?#%\\]", rest)))
    if odd or {"", ".", ".."} & set(rest.split("/")):
        wrong = " ".join(odd) or "an empty part, '.' or '..'"
        raise ValueError(f"uri: expected a place without {wrong}, got {uri!r}")


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
    """Return the credentials of the user's profile, as the engine of the table finds them, too.

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
