"""Downloads: resumed after an interruption, verified, and put in place whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from cnfkit.settings import data_folder, progress

try:
    import fcntl
except ImportError:  # not on Windows: nothing is resumed there
    fcntl = None

TIMEOUT = 30.0  # seconds in which at least a byte comes
SLOWEST = 1000.0  # bytes a second on average, after that time
BLOCK = 1 << 16

# What a damaged archive raises while it is read
DAMAGE = (EOFError, KeyError, ValueError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error)


class _MirrorError(Exception):
    """Why a mirror does not give a file."""


class _DiskError(Exception):
    """Why a file cannot be written: an ``OSError`` apart from those of the network."""


def home(name: str, folder: str | Path | None) -> Path:
    """The folder of a data set: the one given, else its own in ``CNFKIT_DATA``."""
    return Path(folder) if folder is not None else data_folder() / name


def fetch(path: Path, mirrors: Sequence[str], verify: Callable[[Path], None]) -> None:
    """Bring a file from the first mirror that gives it, unless it is there.

    What comes is written to ``<name>.part`` beside it, from where the next mirror, or the next call, goes on.

    Args:
        path: where the file belongs; its folder is made if missing.
        mirrors: its addresses.
        verify: raises a ``ValueError`` for a file that is not the wanted one.

    Raises:
        ConnectionError: if no mirror gives it; the message says why each did not.
        OSError: if it cannot be written.
    """
    if path.is_file():
        return
    reasons = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path) as part:
            if path.is_file():  # others brought it meanwhile
                return
            for url in mirrors:
                try:
                    _download(url, part, path.name, verify)
                except _MirrorError as reason:
                    reasons.append(f"  {url}: {reason}")
                else:
                    os.replace(part.name, path)
                    return
    except (OSError, _DiskError) as problem:
        error = problem.__cause__ or problem
        raise OSError(
            error.errno,
            f"{error.strerror}; make room, or set CNFKIT_DATA to a folder that can be written. Not written",
            str(path),
        ) from None
    raise ConnectionError(
        f"{path.name} could not be downloaded:\n" + "\n".join(reasons) + f"\nTry again later, which goes on where this "
        f"ended, or put the file into {path.parent} yourself; CNFKIT_DATA names another folder"
    )


@contextmanager
def _part(path: Path) -> Iterator[BinaryIO]:
    """The file that a download is appended to: the one to resume, or one of its own while others are at that."""
    file = open(f"{path}.part", "ab")
    if not (resumable := _locked(file)):
        file.close()
        file = open(f"{path}.{os.getpid()}-{threading.get_ident()}.part", "ab")
    with file:
        try:
            yield file
        finally:
            if _in_place(file) and not (resumable and file.seek(0, os.SEEK_END)):
                os.unlink(file.name)


def _locked(file: BinaryIO) -> bool:
    """Lock a file for this process alone; the system unlocks it when it is closed, or the process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # others have it, or the file system or the platform knows no locks
        return False
    return _in_place(file)


def _in_place(file: BinaryIO) -> bool:
    """Whether a file still has its name: who had the lock before may have moved it to where it belongs."""
    return os.path.exists(file.name) and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))


def _download(url: str, file: BinaryIO, name: str, verify: Callable[[Path], None]) -> None:
    """Append from a mirror until the file is complete and right; what was resumed and is wrong begins anew, once."""
    resumed = _append(url, file, name)
    try:
        verify(Path(file.name))
    except ValueError as error:
        file.truncate(0)
        if not resumed:
            raise _MirrorError(str(error)) from None
        _download(url, file, name, verify)


def _append(url: str, file: BinaryIO, name: str) -> bool:
    """Append what is missing of a file; whether it was begun before."""
    offset = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "cnfkit"} | ({"Range": f"bytes={offset}-"} if offset else {})
    began = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            if offset and response.headers.get("Content-Range", "").split("-")[0] != f"bytes {offset}":
                file.truncate(0)  # a server that knows no ranges begins at the beginning
                offset = 0
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length else None
            done = offset
            with progress_bar(name, total=total, initial=offset, unit="B", unit_scale=True) as bar:
                while block := response.read1(BLOCK):
                    _write(file, block)
                    done += len(block)
                    bar.update(len(block))
                    if done - offset < SLOWEST * (time.monotonic() - began - TIMEOUT):
                        raise _MirrorError(f"too slow: {done - offset} bytes in {time.monotonic() - began:.0f} seconds")
        if total is not None and done < total:
            raise _MirrorError(f"cut off after {done} of {total} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if not (error.code == 416 and offset):  # nothing is missing: it ended between the last byte and the check
            raise _MirrorError(f"HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _MirrorError(getattr(error, "reason", None) or str(error) or type(error).__name__) from None
    _write(file, b"", sync=True)
    return offset > 0


def _write(file: BinaryIO, block: bytes, sync: bool = False) -> None:
    try:
        file.write(block)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _DiskError from error


def check_md5(path: Path, md5: str) -> None:
    """Raise a ``ValueError`` unless the file has this checksum."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise ValueError(f"its md5 is {digest.hexdigest()}, wanted {md5}")


def damaged(path: Path, error: Exception) -> ValueError:
    """What to raise for a file that is there and cannot be used."""
    return ValueError(f"{path} is damaged: {error}; delete it, to have it downloaded again")


@contextmanager
def member(path: Path, name: str) -> Iterator[BinaryIO]:
    """A file to read, or the one of that name in a zip or tar archive, or what a gzip file holds.

    Nothing is unpacked to the disk, so it does not matter what else an archive holds, or where it wants it.
    """
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            yield file
    elif path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            entry = next((entry for entry in archive if entry.name == name and entry.isfile()), None)
            if entry is None:
                raise KeyError(f"it holds no {name}")
            yield archive.extractfile(entry)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file


def progress_bar(name: str, **options) -> tqdm:
    """A bar for what takes long."""
    return tqdm(desc=name, disable=not progress(), leave=False, **options)
