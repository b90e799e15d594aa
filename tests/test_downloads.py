"""Downloads: from servers of every kind, a file comes whole, verified, or not at all."""

import errno
import hashlib
import os
import tempfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cnfkit.data import download
from cnfkit.data.download import check_md5, fetch

CONTENT = bytes(range(256)) * 1000
VERIFY = partial(check_md5, md5=hashlib.md5(CONTENT).hexdigest())


class Handler(BaseHTTPRequestHandler):
    """``/good`` serves CONTENT, with ranges; other paths misbehave, each in its own way."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        kind, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.asked.append((kind, asked))
        content, begin = CONTENT, 0
        if kind in ("missing", "busy"):
            return self.send_error({"missing": 404, "busy": 503}[kind])
        if kind == "hangs":
            return self.server.released.wait(10)
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            return self.end_headers()
        if kind == "wrong":
            content = CONTENT[:-1] + b"\0"
        elif kind == "longer":
            content = CONTENT + b"more"
        if asked and kind != "plain":
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if kind != "lengthless":
            self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if kind == "cut":
            content = content[: begin + len(content) // 4]
        elif kind == "slow":
            for byte in content[:300]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.01)
            return None
        elif kind == "waits":
            self.server.released.wait(10)
        self.wfile.write(content[begin:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.released = [], threading.Event()
        server.url = lambda kind: f"http://127.0.0.1:{server.server_port}/{kind}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "sets" / "file.bin"


def beside(path: Path) -> list[str]:
    """What lies in the folder."""
    return sorted(file.name for file in path.parent.iterdir())


@pytest.mark.parametrize("kind", ["good", "plain", "lengthless", "moved"])
def test_a_file_comes_whole_and_alone(server, path, kind):
    fetch(path, [server.url(kind)], VERIFY)
    assert path.read_bytes() == CONTENT and beside(path) == ["file.bin"]


def test_a_file_that_is_there_is_not_asked_for(server, path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    fetch(path, [server.url("good")], VERIFY)
    assert path.read_bytes() == b"mine" and not server.asked


def test_mirrors_are_tried_one_after_the_other(server, path):
    fetch(path, [server.url(kind) for kind in ("missing", "wrong", "busy", "good", "plain")], VERIFY)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("missing", None), ("wrong", None), ("busy", None), ("good", None)]


@pytest.mark.parametrize("then", ["good", "plain"])
def test_what_was_cut_off_is_resumed(server, path, then):
    """From where it ended, by another mirror or a later call; from the beginning where a server knows no ranges."""
    with pytest.raises(ConnectionError, match=r"cut: cut off after 64000 of 256000 bytes"):
        fetch(path, [server.url("cut")], VERIFY)
    assert beside(path) == ["file.bin.part"]
    fetch(path, [server.url("cut"), server.url(then)], VERIFY)
    assert server.asked == [("cut", None), ("cut", "bytes=64000-"), (then, "bytes=128000-")]
    assert path.read_bytes() == CONTENT and beside(path) == ["file.bin"]


@pytest.mark.parametrize("part", [b"foreign", CONTENT + b"foreign", b"x" * len(CONTENT)])
def test_a_damaged_part_begins_anew_once(server, path, part):
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(part)
    fetch(path, [server.url("good")], VERIFY)
    assert server.asked == [("good", f"bytes={len(part)}-"), ("good", None)] and path.read_bytes() == CONTENT


def test_a_part_that_was_complete_is_moved_in_place(server, path):
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(CONTENT)
    fetch(path, [server.url("good")], VERIFY)
    assert len(server.asked) == 1 and path.read_bytes() == CONTENT and beside(path) == ["file.bin"]


@pytest.mark.parametrize("kind", ["wrong", "longer"])
def test_wrong_bytes_are_refused_and_not_kept(server, path, kind):
    with pytest.raises(ConnectionError, match=rf"{kind}: its md5 is \w+, wanted {VERIFY.keywords['md5']}"):
        fetch(path, [server.url(kind)], VERIFY)
    assert beside(path) == [] and server.asked == [(kind, None)]


def test_the_error_says_what_was_tried_and_what_to_do(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    urls = [server.url("missing"), server.url("hangs"), "http://127.0.0.1:9/nobody", "https://mirror.invalid/file.bin"]
    with pytest.raises(ConnectionError) as raised:
        fetch(path, urls, VERIFY)
    first, *reasons, last = str(raised.value).splitlines()
    assert first == "file.bin could not be downloaded:"
    assert [reason.split(": ")[0].strip() for reason in reasons] == urls
    assert "HTTP 404" in reasons[0] and "timed out" in reasons[1] and "refused" in reasons[2]
    assert len(reasons[3]) > len(f"  {urls[3]}: "), "whatever the resolver says"
    assert f"put the file into {path.parent} yourself; CNFKIT_DATA" in last and beside(path) == []


def test_a_mirror_that_only_drips_is_given_up(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    with pytest.raises(ConnectionError, match=r"slow: too slow: \d+ bytes in 1 seconds"):
        fetch(path, [server.url("slow")], VERIFY)


# Two at the same time


def test_two_at_the_same_time_do_not_disturb_each_other(server, path):
    """While the first has the part, the second brings a file of its own; then the first finds it in place."""
    first = threading.Thread(target=fetch, args=(path, [server.url("waits")], VERIFY))
    first.start()
    while not server.asked:
        time.sleep(0.01)
    fetch(path, [server.url("good")], VERIFY)
    assert path.read_bytes() == CONTENT and beside(path) == ["file.bin", "file.bin.part"]
    server.released.set()
    first.join()
    assert path.read_bytes() == CONTENT and beside(path) == ["file.bin"]


def test_many_at_the_same_time(server, path):
    """Whatever the order, everybody finds the file, and nothing else stays."""
    start, failed = threading.Barrier(6), []

    def bring():
        start.wait()
        try:
            fetch(path, [server.url("good")], VERIFY)
            assert path.read_bytes() == CONTENT
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=bring) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_bytes() == CONTENT and beside(path) == ["file.bin"]


def test_a_part_that_others_moved_in_place_is_let_go(server, path, monkeypatch):
    """Opened before they moved it, locked after: what is written then must not land in the finished file."""
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(b"theirs, and complete")
    lock = download.fcntl.flock

    def late(file, how):
        os.replace(path.with_name("file.bin.part"), path)
        lock(file, how)

    monkeypatch.setattr(download.fcntl, "flock", late)
    fetch(path, [server.url("good")], VERIFY)
    assert path.read_bytes() == b"theirs, and complete" and beside(path) == ["file.bin"] and not server.asked


def test_a_part_that_others_began_anew_is_theirs(server, path, monkeypatch):
    """Opened before they gave it up, locked after: what has its name now is not what was opened."""
    part, lock = path.with_name("file.bin.part"), download.fcntl.flock
    path.parent.mkdir()
    part.write_bytes(b"given up")

    def late(file, how):
        part.unlink()
        part.write_bytes(b"begun anew")
        lock(file, how)

    monkeypatch.setattr(download.fcntl, "flock", late)
    fetch(path, [server.url("good")], VERIFY)
    assert path.read_bytes() == CONTENT and part.read_bytes() == b"begun anew"


# Disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_said_to_be_one(server, path):
    path.parent.mkdir()
    (path.parent / "other.bin").write_bytes(b"other")
    path.with_name("file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device; make room, or set CNFKIT_DATA .*file\.bin") as raised:
        fetch(path, [server.url("good"), server.url("plain")], VERIFY)
    assert raised.value.errno == errno.ENOSPC and len(server.asked) == 1, "another mirror would not help"
    assert (path.parent / "other.bin").read_bytes() == b"other" and not path.exists()


@pytest.mark.parametrize(
    "trouble, raised",
    [
        (lambda: download._DiskError(), OSError),
        (KeyboardInterrupt, KeyboardInterrupt),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_what_came_before_an_interruption_is_kept(server, path, monkeypatch, trouble, raised):
    done = []

    def write(file, block, sync=False):
        if sum(map(len, done)) > 100_000:
            raise trouble() from OSError(errno.ENOSPC, "No space left on device")
        done.append(block)
        file.write(block)

    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(download, "_write", write)
        fetch(path, [server.url("good")], VERIFY)
    kept = path.with_name("file.bin.part").read_bytes()
    assert kept == b"".join(done) and CONTENT.startswith(kept)
    fetch(path, [server.url("good")], VERIFY)
    assert server.asked == [("good", None), ("good", f"bytes={len(kept)}-")] and path.read_bytes() == CONTENT


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="other rights than those of POSIX")
def test_a_read_only_folder(server):
    """Also for the superuser, who may write everywhere, and is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "there.bin").write_bytes(b"there")
        os.chmod(folder, 0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            with pytest.raises(PermissionError, match="set CNFKIT_DATA to a folder that can be written"):
                fetch(Path(folder, "file.bin"), [server.url("good")], VERIFY)
            fetch(Path(folder, "there.bin"), [server.url("good")], VERIFY)
        finally:
            os.seteuid(user)
        assert not server.asked and os.listdir(folder) == ["there.bin"]


def test_a_folder_that_cannot_be_made(server, path):
    path.parent.write_bytes(b"a file")
    with pytest.raises(OSError, match=r"set CNFKIT_DATA to a folder that can be written.*file\.bin"):
        fetch(path, [server.url("good")], VERIFY)
    assert not server.asked and path.parent.read_bytes() == b"a file"
