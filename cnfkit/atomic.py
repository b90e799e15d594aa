"""Files that appear whole or not at all, by one writer at a time."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 10.0  # seconds that one writer waits for another


def put(path: Path, data: bytes) -> None:
    """Write a file: whoever looks, at any time and after any crash, finds what was there before, or all of the new."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def remove_drafts(path: Path) -> None:
    """Remove what writers of ``path`` left that were killed; nobody else may be writing it."""
    for draft in path.parent.glob(f".{path.name}.*"):
        if draft.suffix[1:].isdigit():
            draft.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Wait until nobody else is here in this folder; yields whether that is so.

    It may not be, after a while or where folders cannot be locked: then go on, and take nothing for left behind. The
    lock is the system's: it leaves no file, and ends with the process that holds it.
    """
    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle is not None and _locked(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _locked(handle: int) -> bool:
    end = time.monotonic() + PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        except OSError:  # some network file systems
            return False
    return False


@contextmanager
def explained(path: Path, size: int) -> Iterator[None]:
    """Let an ``OSError`` say what could not be written, and what is left."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                room = f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free, {size / 1e6:.1f} MB wanted)"
        message = f"{error.strerror}{room}; this was not written, and what was there before is as it was"
        raise OSError(error.errno, message, str(path)) from error  # of the same class: that is the number's
