"""Files of text wherever they are: a path of this machine, or an address that fsspec knows.

A file's *identity* is what tells that it is still the same: of a file here its size and the digest of its
first and last bytes (a Parquet file's last bytes hold its footer), of one elsewhere its size and what its
store says of its version.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast
from urllib.parse import parse_qsl, urlsplit

from toolmem.errors import ToolmemError

SUFFIXES = (".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".txt")
SECRET_WORDS = (
    "token",
    "secret",
    "password",
    "signature",
    "credential",
    "apikey",
    "api_key",
    "sig",
)
HASHED_BYTES = 4096  # at either end
# What stores call a file's version, the surest first.
VERSIONS = (
    "ETag",
    "etag",
    "md5",
    "sha256",
    "checksum",
    "blob_id",
    "mtime",
    "LastModified",
    "created",
)

WHERE_FROM = (
    "text comes as .txt, .jsonl or .parquet files: a file, a folder, a glob or a list of them, or "
    "hf://OWNER/DATASET. For a first try take Shakespeare (input.txt of karpathy/char-rnn on "
    "GitHub) or shards of HuggingFaceTB/smollm-corpus on the Hugging Face hub"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file that fsspec reads.

    Args:
        address: with its protocol, ``s3://bucket/shard.parquet``.
        size: in bytes.
        version: what its store says of it, "" for nothing.
    """

    address: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return posixpath.basename(self.address)

    @property
    def suffix(self) -> str:
        """The name's last ending, with its full stop."""
        return posixpath.splitext(self.address)[1]

    def __str__(self) -> str:
        return self.address


TextFile: TypeAlias = Path | RemoteFile


def is_address(path: str | Path) -> bool:
    """Is this an address with a protocol, and not a path of this machine?"""
    return isinstance(path, str) and "://" in path


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, fsspec's, and the address within it.

    Raises:
        ToolmemError: without fsspec, or the package that knows the protocol; for an address with a key in it.
    """
    protocol = address.partition("://")[0]
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ToolmemError(f"{address} is no address: {error}") from error
    asked = {key.lower() for key, _ in parse_qsl(parts.query)}
    if parts.password or any(word in key for key in asked for word in SECRET_WORDS):
        raise ToolmemError(
            f"{protocol}://{parts.hostname or ''}{parts.path}: this address holds a password or a key, which "
            "config.yaml would keep: give it to the store by its environment variables or configuration"
        )
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ToolmemError(
            f"{address}: addresses like this need the extra `remote`: pip install 'toolmem[remote]'"
        ) from error
    try:
        found: tuple[Any, str] = url_to_fs(address)
    except ImportError as error:
        raise ToolmemError(
            f"{address}: {protocol}:// needs a package that is not installed ({error}); s3:// is read by "
            "s3fs, gs:// by gcsfs, az:// by adlfs, hf:// by huggingface_hub"
        ) from error
    except ValueError as error:
        raise ToolmemError(
            f"{address}: nothing is known of {protocol}:// ({error}); give a protocol of fsspec's, or copy "
            "the files here"
        ) from error
    return found


@contextmanager
def explained(file: TextFile | str) -> Iterator[None]:
    """Tell what a store or a disk refuses as an error of the file."""
    try:
        yield
    except ToolmemError:
        raise
    except FileNotFoundError as error:
        raise ToolmemError(
            f"{file} was there when the files were listed, and is gone: put it back as it was, or start a "
            "new run without it"
        ) from error
    except EOFError as error:
        raise ToolmemError(f"{file} is truncated: {error}; fetch it again") from error
    except Exception as error:
        # stores' errors have no common kind; a fault of ours on a file of this machine is none of the file's
        if isinstance(file, Path) and not isinstance(error, OSError):
            raise
        raise ToolmemError(f"cannot read {file}: {error}") from error


def find_files(path: str | Path | Sequence[str | Path]) -> list[TextFile]:
    """The text files that ``path`` means, in a fixed order.

    Args:
        path: a file, a folder (searched through and through), a glob, or a list of these; of this machine,
            or addresses that fsspec knows.

    Raises:
        ToolmemError: when there are none, or one is of a kind that cannot be read.
    """
    found: list[TextFile] = []
    for entry in [path] if isinstance(path, (str, Path)) else path:
        found += _find_remote(str(entry)) if is_address(entry) else _find_here(entry)
    if not found:
        raise ToolmemError(f"no data given: {WHERE_FROM}")
    for file in found:
        if not _suffix(file.name):
            raise ToolmemError(
                f"{file} is of no kind that can be read ({', '.join(SUFFIXES)}); convert it"
            )
    return list(dict.fromkeys(found))


def _find_here(entry: str | Path) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        names = (
            Path(folder, name)
            for folder, _, files in os.walk(path, followlinks=False)
            for name in files
            if _suffix(name)
        )
        files = [file for file in names if file.is_file()]
        if not files:
            raise ToolmemError(f"no {', '.join(SUFFIXES)} file in the folder {entry}: {WHERE_FROM}")
    elif path.exists():
        files = [path]
    elif has_magic(str(entry)):
        base = Path(path.anchor)
        files = [p for p in base.glob(str(path.relative_to(base))) if p.is_file()]
        if not files:
            raise ToolmemError(f"no file matches {entry}: {WHERE_FROM}")
    else:
        raise ToolmemError(f"no such file or folder: {entry}. {WHERE_FROM}")
    return sorted(files)


def _find_remote(entry: str) -> list[RemoteFile]:
    fs, within = file_system(entry)
    try:
        if has_magic(within) and not within.startswith(("http://", "https://")):
            listed = fs.glob(within, detail=True)
        else:
            # a store's isfile() takes a network that is down for a file that is not there
            info = fs.info(within) if _suffix(within) else {"type": "directory"}
            of_folder = info["type"] == "directory"
            listed = fs.find(within, detail=True) if of_folder else {within: info}
    except FileNotFoundError as error:
        # so does HTTP's; what it met is behind it
        why = f" ({error.__cause__})" if error.__cause__ else ""
        raise ToolmemError(f"no such file, or out of reach: {entry}{why}. {WHERE_FROM}") from error
    except Exception as error:  # stores' errors have no common kind
        raise ToolmemError(f"cannot list {entry}: {error}; check address and network") from error
    files = []
    for name, info in sorted(listed.items()):
        if info.get("type") == "directory" or not _suffix(name):
            continue
        if info.get("size") is None:
            raise ToolmemError(f"{entry}: its store does not say how large {name} is; copy it here")
        files.append(RemoteFile(fs.unstrip_protocol(name), int(info["size"]), _version(info)))
    if not files:
        raise ToolmemError(f"no {', '.join(SUFFIXES)} file at {entry}: {WHERE_FROM}")
    return files


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def open_file(file: TextFile) -> BinaryIO:
    """The file's bytes, to be read from any place on."""
    if isinstance(file, Path):
        return open(file, "rb")
    fs, within = file_system(file.address)
    # the files of some stores know no readline(limit)
    return cast(BinaryIO, io.BufferedReader(fs.open(within, "rb"), 1 << 20))


def size_of(file: TextFile) -> int:
    """Bytes of the file."""
    return file.stat().st_size if isinstance(file, Path) else file.size


@dataclass(frozen=True)
class Identity:
    """By what a file is known again.

    Args:
        size: in bytes.
        digest: of its first and last bytes, or of its version in a store.
        changed_ns: when it was written last, as the file system says; not part of what it is.
    """

    size: int
    digest: str
    changed_ns: int = 0

    def same(self, other: Identity) -> bool:
        """Is this the same content, whenever it was written?"""
        return self.size == other.size and self.digest == other.digest


def identity_of(file: TextFile) -> Identity:
    """What the file is now.

    Raises:
        ToolmemError: when it is gone or cannot be read.
    """
    with explained(file):
        if isinstance(file, RemoteFile):
            fs, within = file_system(file.address)
            fs.invalidate_cache()
            info = fs.info(within)
            return Identity(int(info["size"]), _digest(_version(info).encode()))
        with open(file, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            ends = stream.read(HASHED_BYTES)
            if status.st_size > HASHED_BYTES:
                stream.seek(max(HASHED_BYTES, status.st_size - HASHED_BYTES))
                ends += stream.read(HASHED_BYTES)
        return Identity(status.st_size, _digest(ends), status.st_mtime_ns)
    raise AssertionError  # `explained` lets nothing through


def listed_identity(file: TextFile) -> Identity:
    """What the file is, without asking a store again that has just listed it."""
    if isinstance(file, RemoteFile):
        return Identity(file.size, _digest(file.version.encode()))
    return identity_of(file)


def check_unchanged(file: TextFile, before: Identity) -> None:
    """Refuse to read a file that is not any more what it was.

    Args:
        file: which.
        before: what it was when it was listed.

    Raises:
        ToolmemError: when it changed or is gone.
    """
    if isinstance(file, Path):
        with explained(file):
            status = file.stat()
        if (status.st_size, status.st_mtime_ns) == (before.size, before.changed_ns):
            return
    now = identity_of(file)
    if not now.same(before):
        raise ToolmemError(
            f"{file} has changed since its run listed it ({before.size:,} bytes then, {now.size:,} now): "
            "training would go on with other data; put it back as it was, or start a new run"
        )


def _version(info: dict[str, Any]) -> str:
    """What a store says of a file's version; a time is the same by listing and by asking."""
    found = next((info[key] for key in VERSIONS if info.get(key) is not None), "")
    return str(found.timestamp() if hasattr(found, "timestamp") else found)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def names_within(files: Sequence[TextFile]) -> list[str]:
    """The files' paths from the folder that holds them all, which is the same wherever it is moved."""
    texts = [str(file) if isinstance(file, RemoteFile) else file.as_posix() for file in files]
    if len(texts) == 1:
        return [files[0].name]
    common = posixpath.commonpath(texts)
    return [posixpath.relpath(text, common) for text in texts]
