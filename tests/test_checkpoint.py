"""Checkpoints: whole or not at all, and refused with a reason."""

import copy
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from builders import redrawn
from torch import nn

import cnfkit as ck
from cnfkit import CheckpointError, atomic, checkpoint, inspect, load, save, shards

FACTS = {"seed": 0, "command": "python -m …", "nll": 1.25, "history": [1.5, 0.1 + 0.2]}


def model(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return redrawn(nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width)), seed)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def parts(path: Path) -> list[str]:
    return sorted(part.name for part in shards.parts(path))


def started(call) -> int:
    """The number of a new process that makes a call and ends, with 0 if it returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes forks beside threads
        child = os.fork()
    if child:
        return child
    try:
        call()
        os._exit(0)
    finally:
        os._exit(1)


def in_child(call):
    """What a call returns in a process of its own; None if that was killed."""
    read, write = os.pipe()
    child = started(lambda: os.write(write, pickle.dumps(call())))
    os.close(write)
    with open(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(content) if content else None


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def test_round_trip(path):
    saved, loaded = model(), model(seed=1)
    save(path, saved, **FACTS)
    assert not equal(state(saved), state(loaded))
    assert load(path, loaded) == FACTS
    assert equal(state(saved), state(loaded))


def test_float64_and_integers_keep_their_bits(path):
    saved, loaded = model().double(), model(seed=1).double()
    saved[1].num_batches_tracked += 2**40 + 1
    save(str(path), saved)
    assert load(str(path), loaded) == {} and equal(state(saved), state(loaded))


def test_weights_that_are_not_finite_are_weights(path):
    saved, loaded = model(), model(1)
    torch.nn.init.constant_(saved[0].weight, float("nan"))
    torch.nn.init.constant_(saved[0].bias, float("-inf"))
    save(path, saved)
    load(path, loaded)
    assert loaded[0].weight.isnan().all() and loaded[0].bias.isneginf().all()


def test_other_programs_can_read_it(path):
    save(path, model(), seed=1)
    assert equal(safetensors.torch.load_file(path), state(model()))
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["cnfkit"])
    assert re.fullmatch("[0-9a-f]{64}", about.pop("sha256"))
    versions = {"cnfkit": ck.__version__, "torch": torch.__version__.split("+")[0]}
    assert about == {"facts": {"seed": 1}, "model": []} | versions


def test_files_without_a_version_and_a_digest_load_as_before(path):
    """As cnfkit wrote them once."""
    about = {"facts": FACTS, "model": []}
    safetensors.torch.save_file(state(model()), path, metadata={"cnfkit": json.dumps(about)})
    content, loaded = path.read_bytes(), model(seed=1)
    assert load(path, loaded) == FACTS and equal(state(loaded), state(model()))
    assert inspect(path).facts == FACTS and inspect(path).versions == {} and path.read_bytes() == content


def test_a_file_is_looked_into_without_its_module(path):
    config = {"model": {"name": "realnvp", "hidden": [64, 64]}, "lr": 0.1 + 0.2}
    save(path, ck.realnvp(2), config=config, bound=float("inf"))
    found = inspect(str(path))
    assert found.facts == {"config": config, "bound": float("inf")}
    assert found.versions == {"cnfkit": ck.__version__, "torch": torch.__version__.split("+")[0]}
    assert found.model == checkpoint.describe(ck.realnvp(2))
    expected = {name: (tuple(t.shape), str(t.dtype)[6:]) for name, t in ck.realnvp(2).state_dict().items()}
    assert found.tensors == expected and list(found.tensors) == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_tensors_of_all_kinds_keep_their_bits(path, dtype):
    rows = torch.tensor([[0.0, 1.0, 2.5], [3.0, 0.0, 1.0]])
    views = {"one": rows[0, 1], "none": rows[:0], "turned": rows.T, "apart": rows[:, ::2]}
    views |= {"repeated": rows[0, 1].expand(2, 2), "broad": rows[0, 1].expand(1)}
    tensors = {name: view.to(dtype) if name != "broad" else view for name, view in views.items()}
    checkpoint.write(path, tensors, {})
    assert equal(checkpoint.read(path)[0], tensors)


def test_same_weights_same_bytes(tmp_path):
    """So that a sha256 can stand beside a checkpoint."""
    for name in "ab":
        save(tmp_path / name, model(), **FACTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    save(tmp_path / "new" / "folder" / "flow.safetensors", model())
    save(tmp_path / "new" / "folder" / "flow.safetensors", model(seed=1))
    assert os.listdir(tmp_path / "new" / "folder") == ["flow.safetensors"]


def test_shared_and_transposed_weights_are_saved(path):
    """safetensors itself refuses tensors that share memory."""
    saved = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    saved[1].weight = saved[0].weight
    saved[0].register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    save(path, saved)
    loaded = copy.deepcopy(saved)
    with torch.no_grad():
        loaded[0].weight.zero_()
    load(path, loaded)
    assert equal(state(saved), state(loaded))


# What cannot be used


def refused(path, module: nn.Module, error: type[Exception], message: str) -> None:
    before = state(module)
    with pytest.raises(error, match=message):
        load(path, module)
    assert equal(state(module), before), "a module is filled wholly or not at all"


def test_missing(path):
    refused(path, model(), FileNotFoundError, "no checkpoint at .*flow.safetensors; train the model first")


def test_a_folder_in_its_place(path):
    path.mkdir()
    refused(path, model(), CheckpointError, "flow.safetensors is a folder; wanted a file")
    with pytest.raises(IsADirectoryError, match=r"this is a folder; wanted a file: '.*flow.safetensors'"):
        save(path, model())
    assert os.listdir(path.parent) == [path.name] and not os.listdir(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -100, -1])
def test_truncated(path, keep):
    save(path, model(), **FACTS)
    path.write_bytes(path.read_bytes()[:keep])
    refused(
        path, model(1), CheckpointError, "flow.safetensors is damaged or no safetensors file .*delete it to start anew"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 64,
        b"\xff" * 64,
        b'{"a": 1}' * 9,
        (8).to_bytes(8, "little") + b"not JSON",
        (4).to_bytes(8, "little") + b"[[]]",
        (9**5).to_bytes(8, "little") + b"[" * 9**5,
        (27).to_bytes(8, "little") + b'{"__metadata__": {"a": 1}}',
        (26).to_bytes(8, "little") + b'{"__metadata__":["cnfkit"]}',
    ],
    ids=[
        "zeros",
        "ones",
        "JSON",
        "a header that is none",
        "a list",
        "a deep one",
        "one too short",
        "metadata in a list",
    ],
)
def test_garbage(path, content):
    path.write_bytes(content)
    refused(path, model(), CheckpointError, "damaged or no safetensors file")


def test_foreign(path):
    safetensors.torch.save_file(state(model()), path)
    refused(path, model(1), CheckpointError, "was not written by cnfkit")
    safetensors.torch.save_file(state(model()), path, metadata={"cnfkit": "[]"})
    refused(path, model(1), CheckpointError, "was not written by cnfkit")
    safetensors.torch.save_file(state(model()), path, metadata={"cnfkit": "{"})
    refused(path, model(1), CheckpointError, "damaged")


def test_pickles_are_named_and_not_opened(path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path.with_name("sprung")),)

    torch.save(state(model()), path)
    refused(path, model(1), CheckpointError, "looks like a pickle, as torch.save writes them; cnfkit opens none")
    torch.save(state(model()), path, _use_new_zipfile_serialization=False)
    refused(path, model(1), CheckpointError, "looks like a pickle")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Trap(), protocol))
        refused(path, model(1), CheckpointError, "looks like a pickle")
    assert names(path.parent) == [path.name]


def test_a_damaged_file_is_not_taken_for_a_pickle(path):
    """The length of its header begins with the byte that pickles begin with."""
    for more in range(256):
        save(path, model(), more="x" * more)
        if path.read_bytes()[0] == 0x80:
            break
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, model(1), CheckpointError, "damaged or no safetensors file")


@pytest.mark.parametrize("size", [10**8 - 8, 10**9, 2**40, 2**64 - 1])
def test_a_header_that_announces_gigabytes_is_not_believed(path, size):
    with open(path, "wb") as file:
        file.write(size.to_bytes(8, "little") + b'{"__metadata__":{"cnfkit":"{}"}}')
    too_much(path, "damaged or no safetensors file")


def test_a_tensor_that_announces_gigabytes_is_not_believed(path):
    header = {"__metadata__": {"cnfkit": "{}"}}
    header["a"] = {"dtype": "F32", "shape": [2**18, 2**20], "data_offsets": [0, 2**40]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    too_much(path, "damaged or no safetensors file")


@pytest.mark.parametrize("header", [b"", b"{}", b" " * 1000])
def test_gigabytes_that_are_not_ours_are_not_read(path, header):
    with open(path, "wb") as file:  # with a hole: they take no room
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(3 * 10**9)
    too_much(path, "was not written by cnfkit" if header == b"{}" else "damaged")


def too_much(path, message: str) -> None:
    tracemalloc.start()
    refused(path, model(), CheckpointError, message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


# What one bit does


def damaged(content: bytes, generator: random.Random) -> bytes:
    """With a bit turned, a byte changed, a piece cut out or put twice, or the end cut off."""
    at, length = generator.randrange(len(content)), generator.randrange(1, 20)
    kind, at = generator.randrange(5), generator.choice([at, at % 400])  # the header more often than its share
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :]
    return content[:at] + [content[at + length :], content[at : at + length] + content[at:], b""][kind - 2]


@pytest.mark.parametrize("form", ["one file", "shards", "as once"])
def test_whatever_happens_to_the_bytes(path, monkeypatch, form):
    """Equal weights and facts, or a CheckpointError; of files without a digest, no other error."""
    monkeypatch.setattr(checkpoint, "SHARD", 1200 if form == "shards" else 16e6)
    save(path, model(), **FACTS)
    if form == "as once":
        about = json.dumps({"facts": FACTS, "model": []})
        safetensors.torch.save_file(state(model()), path, metadata={"cnfkit": about})
    expected, generator, refusals = state(model()), random.Random(0), 0
    files = shards.parts(path)
    assert len(files) == (1 if form != "shards" else 4)
    contents = {file: file.read_bytes() for file in files}
    for _ in range(250):
        file, into = generator.choice(files), model(1)
        before = state(into)
        file.write_bytes(damaged(contents[file], generator))
        try:
            facts = load(path, into)
        except CheckpointError:
            refusals += 1
            assert equal(state(into), before)
        else:
            assert form == "as once" or (facts == FACTS and equal(state(into), expected))
        file.write_bytes(contents[file])
    assert load(path, model(1)) == FACTS and refusals > 150


@pytest.mark.parametrize("what", ["the weights", "the facts", "the digest", "nothing but the digest"])
def test_a_change_that_leaves_the_form_is_noticed(path, what):
    save(path, model(), seed=12345)
    content = path.read_bytes()
    stamp = re.search(rb'sha256\\": \\"(\w+)', content)[1]
    changed = {
        "the weights": content[:-1] + bytes([content[-1] ^ 1]),
        "the facts": content.replace(b"12345", b"12346"),
        "the digest": content.replace(stamp, stamp[::-1]),
        "nothing but the digest": content.replace(b"sha256", b"sha255"),
    }
    assert changed[what] != content
    path.write_bytes(changed[what])
    refused(path, model(1), CheckpointError, "its content is not what was saved")
    with pytest.raises(CheckpointError, match="its content is not what was saved"):
        inspect(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: model(width=4), r"0.weight is \(3, 2\) float32, wanted \(4, 2\) float32; .*; and 3 more"),
        (lambda: model()[:1], "1.bias is not of this model; .*; and 2 more"),
        (lambda: nn.Sequential(*model(), nn.Linear(3, 1)), "2.weight is missing; 2.bias is missing$"),
    ],
    ids=["another width", "fewer layers", "more layers"],
)
def test_made_by_another_model(path, other, message):
    save(path, model())
    refused(path, other(), CheckpointError, f"was made by another model: .*{message}")


# Shards


@pytest.fixture
def small(monkeypatch):
    """A limit that the model needs three files for."""
    monkeypatch.setattr(checkpoint, "SHARD", 1200)


def index(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.index.json").read_text())


def test_shards_round_trip(path, small):
    save(path, model(), **FACTS)
    *files, listing = parts(path)
    stamp = json.loads(index(path)["metadata"]["cnfkit"])["sha256"][:8]
    assert files == [f"flow-{stamp}-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert listing == "flow.safetensors.index.json" and names(path.parent) == [*files, listing]
    assert all(path.with_name(file).stat().st_size <= 1200 for file in files)
    loaded = model(seed=1)
    assert load(path, loaded) == FACTS and equal(state(loaded), state(model()))
    assert inspect(path).facts == FACTS and inspect(path).versions["cnfkit"] == ck.__version__


def test_other_programs_find_the_tensors_by_the_index(path, small):
    """The convention of Hugging Face: where each tensor is, and the bytes of all."""
    save(path, model())
    found = {}
    for name, file in index(path)["weight_map"].items():
        with safetensors.safe_open(path.with_name(file), framework="pt") as shard:
            found[name] = shard.get_tensor(name)
    assert equal(found, state(model()))
    assert index(path)["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_same_weights_same_shards(tmp_path, small):
    for folder in "ab":
        save(tmp_path / folder / "flow.safetensors", model(), **FACTS)
    assert names(tmp_path / "a") == names(tmp_path / "b") and len(names(tmp_path / "a")) == 4
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_limit_is_16_megabytes(path):
    numbers = nn.ParameterList([torch.zeros(999_000), torch.ones(1_000_000), torch.ones(2_000_000)])
    save(path, numbers)
    assert names(path.parent) == [path.name] and 15_996_000 < path.stat().st_size <= 16e6
    numbers.append(torch.ones(1000))
    save(path, numbers)
    assert len(parts(path)) == 3 and names(path.parent) == parts(path)
    assert all(file.stat().st_size <= 16e6 for file in shards.parts(path))
    load(path, numbers)


def test_a_tensor_is_never_divided(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 1000)
    save(path, nn.Linear(2, 500))
    first, second, _ = parts(path)
    assert path.with_name(first).stat().st_size > 1000 and path.with_name(second).stat().st_size > 1000
    save(path, nn.Linear(2, 500, bias=False))
    assert names(path.parent) == [path.name], "nothing to divide"


def test_each_form_takes_the_place_of_the_other(path, monkeypatch):
    for seed, limit in enumerate([1200, 16e6, 900, 1200, 1200, 16e6, 16e6]):
        monkeypatch.setattr(checkpoint, "SHARD", limit)
        save(path, model(seed), seed=seed)
        loaded = model(99)
        assert load(path, loaded) == {"seed": seed} and equal(state(loaded), state(model(seed)))
        assert names(path.parent) == parts(path) and (path.name in names(path.parent)) == (limit > 1200)


def test_training_runs_are_never_divided(path, small):
    flow = ck.Flow(ck.Normal(2), ck.maf(2).bijection)
    ck.fit(ck.NegativeLogLikelihood(flow), torch.randn(20, 2), steps=2, checkpoint=path)
    assert names(path.parent) == [path.name] and path.stat().st_size > 1200


def test_a_missing_shard(path, small):
    save(path, model())
    os.remove(path.with_name(parts(path)[1]))
    refused(
        path, model(1), CheckpointError, "-00002-of-00003.safetensors is missing, which flow.safetensors.index.json"
    )


def test_a_shard_of_another_save(path, small):
    save(path, model(), seed=0)
    old = {file: file.read_bytes() for file in shards.parts(path)[1:]}
    save(path, model(1), seed=1)
    new = shards.parts(path)[1:]
    for file, content in zip(new, old.values(), strict=True):
        kept = file.read_bytes()
        file.write_bytes(content)
        refused(path, model(2), CheckpointError, f"{file.name} is not of the checkpoint that flow.safetensors.index")
        file.write_bytes(kept)
    assert load(path, model(2)) == {"seed": 1}


def test_a_shard_alone(path, small):
    save(path, model())
    shard = path.with_name(parts(path)[0])
    refused(shard, model(1), CheckpointError, "is a part of a checkpoint; load flow.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff", "damaged"),
        (b"[]", "damaged"),
        (b"[" * 9**5, "damaged"),
        (b'{"weight_map": {}, "metadata": {"cnfkit": "{"}}', "damaged"),
        (b'{"weight_map": {}, "metadata": {"cnfkit": "{}"}}', "damaged"),
        (b'{"weight_map": {"a": 1}, "metadata": {"cnfkit": "{}"}}', "damaged"),
        (b'{"weight_map": {"a": "../a"}, "metadata": {"cnfkit": "{\\"sha256\\": 1}"}}', "lists no shards beside it"),
        (b'{"weight_map": {"a": "b"}, "metadata": {}}', "was not written by cnfkit"),
        (b'{"weight_map": {"a": "b"}}', "damaged"),
    ],
)
def test_an_index_that_is_none(path, content, message):
    path.with_name(f"{path.name}.index.json").write_bytes(content)
    refused(path, model(), CheckpointError, f"flow.safetensors.index.json .*{message}")


# What must not happen while writing


def at_operation(k: int, folder: Path, happens, call) -> tuple[str, ...] | None:
    """Run a call, in a process of its own, that something happens to before its k-th operation on files of a folder.

    Reading is one too. Where it is the moment at which a file's content should have reached the disk, half of it has.
    Returns the operation (None if there are fewer), and what became of the call.
    """
    counted, struck = 0, []

    def watch(event, arguments):
        nonlocal counted
        ours = event == "fsync" or (event in OPERATIONS and str(arguments[0]).startswith(str(folder)))
        counted += ours
        if ours and counted == k and not struck:
            if event == "fsync":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            struck.append(event)
            happens()

    def child():
        sys.addaudithook(watch)
        os.fsync = lambda file: sys.audit("fsync", file)
        try:
            call()
        except (OSError, KeyboardInterrupt):
            return (*struck, "raised")
        return (*struck, "done")

    return in_child(child)


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("before", "after", "happens"),
    [(before, after, kill) for before in ("nothing", "one file", "shards") for after in ("one file", "shards")]
    + [("one file", "shards", no_space), ("shards", "one file", no_space), ("shards", "shards", no_space)]
    + [("shards", "one file", interrupt), ("shards", "shards", interrupt)]
    + [("shards", "the same shards", kill), ("shards", "the same shards", no_space)],
)
def test_whenever_a_save_stops_a_whole_checkpoint_is_there(tmp_path, monkeypatch, before, after, happens):
    def put(form, path, seed):
        monkeypatch.setattr(checkpoint, "SHARD", 16e6 if form == "one file" else 1200)
        save(path, model(seed), seed=seed)

    monkeypatch.setattr(os, "fsync", lambda file: None)  # no plug is pulled here, and disks are slow
    template = tmp_path / "template"
    template.mkdir()
    if before != "nothing":
        put(before, template / "flow.safetensors", 0)
    seed = 0 if after == "the same shards" else 1
    for k in range(1, 100):
        path = tmp_path / f"{k}" / "flow.safetensors"
        shutil.copytree(template, path.parent)
        found = names(path.parent)
        outcome = at_operation(k, path.parent, happens, lambda path=path: put(after, path, seed))
        if outcome == ("done",):
            break
        try:
            facts = load(path, loaded := model(99))
            assert equal(state(loaded), state(model(facts["seed"])))
        except FileNotFoundError:
            assert before == "nothing"
            facts = None
        if outcome is None:
            assert happens is kill
        elif outcome[1] == "done":
            assert facts == {"seed": seed}
        elif outcome[0] in ("fsync", "os.rename"):
            assert names(path.parent) == found, "what was written is gone"
        monkeypatch.setattr(checkpoint, "SHARD", 1200)
        save(path, model(2), seed=2)
        assert load(path, model(99)) == {"seed": 2} and names(path.parent) == parts(path), "and all else is gone"
    assert 4 <= k < 99


def test_random_kills_leave_a_whole_checkpoint(path, monkeypatch):
    """A process saves in turn to shards and to one file, and is killed twenty times."""

    def saving():
        for n in range(10**6):
            monkeypatch.setattr(checkpoint, "SHARD", (1200, 16e6, 900)[n % 3])
            save(path, model(n % 7), seed=n % 7)

    save(path, model(0), seed=0)
    generator, seen = random.Random(0), set()
    for _ in range(20):
        child = started(saving)
        time.sleep(generator.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        facts = load(path, loaded := model(99))
        assert equal(state(loaded), state(model(facts["seed"])))
        seen.add(facts["seed"])
    assert len(seen) > 1
    save(path, model(3))
    assert names(path.parent) == parts(path)


def test_two_writers_and_a_reader(path, small, monkeypatch):
    """Each removes the other's shards: whoever reads finds all of one."""
    monkeypatch.setattr(atomic, "PATIENCE", 100)

    def saving(seed):
        for _ in range(30):
            save(path, model(seed), seed=seed)

    save(path, model(0), seed=0)
    seen, running = set(), {started(lambda seed=seed: saving(seed)) for seed in (1, 2)}
    while running:
        facts = load(path, loaded := model(99))
        assert equal(state(loaded), state(model(facts["seed"])))
        seen.add(facts["seed"])
        for child in list(running):
            if (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
                assert ended == (child, 0)
                running.remove(child)
    assert seen & {1, 2} and names(path.parent) == parts(path)


def test_what_killed_writers_left_goes_with_the_next_save(path):
    """But not what only looks like it."""
    left = [".flow.safetensors.123", ".flow.safetensors.index.json.4", "flow-0123abcd-00001-of-00002.safetensors"]
    left.append(".flow-0123abcd-00002-of-00002.safetensors.99")
    others = [
        "flow.safetensors.123",
        ".flow.safetensors.bak",
        ".flow2.safetensors.123",
        "flow-00001-of-00002.safetensors",
    ]
    others += ["flow-0123abcd-00001-of-00002", "flow-x-0123abcd-00001-of-00002.safetensors", "flowXsafetensors"]
    others += [".flowXsafetensors.7", "flow.safetensors.index.json"]
    for name in left + others:
        path.with_name(name).write_text('{"weight_map": {"a": "b"}, "metadata": {}}')
    save(path, model())
    assert names(path.parent) == sorted([path.name, *others])
    assert load(path, model(1)) == {}, "the index of another program does not count"


def test_where_somebody_else_may_be_writing_nothing_is_removed(path, monkeypatch):
    """Nor waited for without end."""
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    path.with_name(".flow.safetensors.123").touch()
    start = time.monotonic()
    with atomic.alone(path.parent) as held:
        save(path, model(), seed=0)
        assert held and load(path, model(1)) == {"seed": 0}
    assert 0.2 <= time.monotonic() - start < 5
    assert names(path.parent) == [".flow.safetensors.123", path.name]
    for what in (None, "unlockable"):
        with monkeypatch.context() as patch:
            if what:
                patch.setattr(atomic.fcntl, "flock", lambda *_: os.open("/nowhere", 0))
            else:
                patch.setattr(atomic, "fcntl", None)
            save(path, model(), seed=1)
        assert len(names(path.parent)) == 2
    save(path, model(1))
    assert names(path.parent) == [path.name]


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("form", ["one file", "shards"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [NO_SPACE, REFUSED, KeyboardInterrupt()], ids=["full disk", "refused", "interrupt"])
def test_a_save_that_cannot_go_on_keeps_what_was_there(path, monkeypatch, form, call, error):
    monkeypatch.setattr(checkpoint, "SHARD", 1200 if form == "shards" else 16e6)
    save(path, model(), seed=0)
    contents = {name: path.with_name(name).read_bytes() for name in names(path.parent)}

    def stop(*_):
        raise error

    class Full:
        def __init__(self, *arguments):
            self.file = open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise error

    with monkeypatch.context() as patch:
        if call in ("open", "write"):
            patch.setattr(atomic, "open", {"open": stop, "write": Full}[call], raising=False)
        else:
            patch.setattr(os, call, stop)
        with pytest.raises(type(error)) as raised:
            save(path, model(1), seed=1)
    assert {name: path.with_name(name).read_bytes() for name in names(path.parent)} == contents
    assert load(path, model(1)) == {"seed": 0}
    if isinstance(error, OSError):
        assert raised.value.errno == error.errno and raised.value.__cause__ is error
        room = r" \([\d.]+ MB are free, 0.0 MB wanted\)" if error is NO_SPACE else ""
        left = "this was not written, and what was there before is as it was"
        message = rf"\[Errno {error.errno}\] {error.strerror}{room}; {left}: '{re.escape(str(path))}'"
        assert re.fullmatch(message, str(raised.value))


def tried(path: Path, seed: int) -> str:
    """How saving goes, and then loading."""
    try:
        save(path, model(seed), seed=seed)
    except OSError as error:
        return f"{type(error).__name__} {error.errno} {load(path, model(9))}"
    return f"saved {load(path, model(9))}"


def test_a_folder_that_is_read_only():
    """Nothing is simulated: root, who may write everywhere, becomes nobody."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flow.safetensors"
        save(path, model(), seed=0)
        os.chmod(folder, 0o555)
        os.chmod(path, 0o444)

        def as_nobody():
            if os.geteuid() == 0:
                os.setuid(65534)
            return tried(path, 1)

        assert in_child(as_nobody) == f"PermissionError {errno.EACCES} {{'seed': 0}}"
        os.chmod(folder, 0o755)
        assert names(folder) == [path.name]


@pytest.mark.parametrize("limit", [1, 300, 600])
def test_a_file_that_may_not_grow(path, small, limit):
    """As on a disk that is full, the system takes a part of the file."""
    save(path, model(), seed=0)
    before = names(path.parent)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return tried(path, 1)

    assert in_child(limited) == f"OSError {errno.EFBIG} {{'seed': 0}}" and names(path.parent) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="this was not written"):
        save(tmp_path / "file" / "folder" / "flow.safetensors", model())


def test_facts_that_json_cannot_hold_leave_the_old_file(path):
    save(path, model(), seed=0)
    circle = []
    circle.append(circle)
    for fact in (torch.zeros(2), {(1, 2): 3}, circle):
        with pytest.raises(TypeError, match=r"weights is .*; wanted a fact that JSON can hold"):
            save(path, model(1), weights=fact)
    assert os.listdir(path.parent) == [path.name] and load(path, model(1)) == {"seed": 0}


def test_settings_that_no_shape_shows_are_compared(path):
    """The same weights under another bound are another density."""

    def coupling(bound):
        return ck.AffineCoupling(ck.mask("even", 2), ck.MLP(2, 4), bound=bound)

    save(path, coupling(2.0))
    with pytest.raises(CheckpointError, match=r"bound=2.0\) where this one has AffineCoupling\(\(2,\), bound=5.0\)"):
        load(path, coupling(5.0))


def test_float64_weights_are_not_rounded_in_silence(path):
    save(path, model().double())
    with pytest.raises(CheckpointError, match=r"float64, wanted .* float32"):
        load(path, model())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, device="meta"), "a is torch.strided, torch.float32, on meta"),
        (torch.zeros(2).to_sparse(), "a is torch.sparse_coo, torch.float32, on cpu"),
        (nn.UninitializedBuffer(), "a is not initialised"),
        (torch.zeros(2, dtype=torch.complex128), "is torch.complex128; wanted a type that safetensors knows"),
        ({"b": 1}, "a is a dict; wanted a tensor"),
    ],
)
def test_what_is_no_dense_tensor_leaves_the_old_file(path, tensor, message):
    save(path, model(), seed=0)
    with pytest.raises(TypeError, match=message):
        checkpoint.write(path, {"a": tensor}, {})
    assert os.listdir(path.parent) == [path.name] and load(path, model(1)) == {"seed": 0}


def test_a_training_run_says_what_it_is(path):
    flow = ck.Flow(ck.Normal(1), ck.Diagonal(1))
    ck.fit(ck.NegativeLogLikelihood(flow), torch.randn(20, 1), steps=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="is a training run; resume it with fit"):
        load(path, flow)
    assert inspect(path).facts["step"] == 2 and inspect(path).facts.keys().isdisjoint({"facts", "model", "torch"})
