"""Execute the notebooks from their text twins and store the outputs so that a re-run changes nothing.

    python book/execute.py             all chapters
    python book/execute.py 01 06       these
    python book/execute.py --timings   writes how long they take into times.json, and leaves them as they are

The twin (`NN_name.md`) is what people edit, so its text always wins; cells that it left alone keep their
id. Cells tagged `volatile` (timings, device names) keep their stored output too, as long as their source
stays; `--refresh-volatile` renews it.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from difflib import SequenceMatcher
from pathlib import Path

# Outputs are made on one device with one thread, and hold no live widget and no progress bar.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CNFKIT_DEVICE": "cpu",
    "CNFKIT_LIVE": "0",
    "CNFKIT_PROGRESS": "0",
    "CNFKIT_FAST": "0",
    "PYTHONHASHSEED": "0",
}
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
TIMES = ROOT / "book" / "times.json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def tags(cell) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def synced(twin: Path, notebook: Path):
    """The twin as a notebook in which cells that did not change have the stored ids and outputs."""
    import jupytext
    import nbformat

    new = jupytext.read(twin)
    new.metadata = nbformat.from_dict(
        {
            "jupytext": {"default_lexer": "ipython3", "formats": "ipynb,md:myst"},
            "kernelspec": new.metadata.get("kernelspec", {}),
            "language_info": {"name": "python"},
        }
    )
    old = nbformat.read(notebook, as_version=4).cells if notebook.exists() else []
    keys = [[(cell.cell_type, cell.source) for cell in cells] for cells in (old, new.cells)]
    for block in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            before, after = old[block.a + i], new.cells[block.b + i]
            after.id = before.id
            if after.cell_type == "code":
                after.outputs = before.outputs
    return new


def normalise(notebook, stem: str):
    """Take out of an executed notebook what would differ from run to run."""
    import nbformat

    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if not any(WIDGET_VIEW in output.get("data", {}) for output in outputs):
        notebook.metadata.pop("widgets", None)
        return notebook
    # Widgets' ids are random: number them in the order in which they were made.
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    text = json.dumps(notebook)
    ids = dict.fromkeys([*state, *re.findall(r'"model_id": "([0-9a-f]{32})"', text)])
    names = {old: hashlib.md5(f"{stem}:{i}".encode()).hexdigest() for i, old in enumerate(ids)}
    return nbformat.from_dict(json.loads(re.sub("[0-9a-f]{32}", lambda m: names.get(m[0], m[0]), text)))


def execute(twin: Path, refresh_volatile: bool = False, store: bool = True) -> float:
    """Execute one chapter, replace its notebook if it is to be stored, and return the seconds that it took."""
    import nbclient
    import nbformat

    path = twin.with_suffix(".ipynb")
    notebook = synced(twin, path)
    keep = [
        None if refresh_volatile or "volatile" not in tags(cell) else cell.get("outputs") for cell in notebook.cells
    ]
    start = time.perf_counter()
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # a local kernel over TCP is no news
        resources={"metadata": {"path": str(twin.parent)}},
    ).execute()
    seconds = time.perf_counter() - start
    if not store:
        return seconds
    for cell, outputs in zip(notebook.cells, keep, strict=True):
        if outputs:
            cell.outputs = outputs
    text = nbformat.writes(normalise(notebook, twin.stem)) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        # Whole or not at all: an interrupted run leaves the old notebook.
        scratch = path.with_suffix(".ipynb.part")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    return seconds


def try_to_execute(twin: Path, refresh_volatile: bool) -> tuple[float | None, str]:
    """Execute one chapter in a worker: the seconds, or none and what went wrong, as text."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        return execute(twin, refresh_volatile), ""
    except CellExecutionError as error:  # its text is the cell's source and the traceback
        return None, str(error)
    except (CellTimeoutError, DeadKernelError) as error:
        return None, f"{type(error).__name__}: {error}"


def chosen(chapters: list[str]) -> list[Path]:
    """The twins of the chapters asked for, or of all; exits with a message if one is not there."""
    twins = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.md"))
    orphans = [p.name for p in sorted(NOTEBOOKS.glob("*.ipynb")) if not p.with_suffix(".md").exists()]
    if orphans:
        sys.exit(
            f"{', '.join(orphans)}: no text twin beside it. Make one with\n"
            f"    python -m jupytext --sync notebooks/{orphans[0]}"
        )
    unknown = set(chapters) - {twin.name[:2] for twin in twins}
    if unknown:
        there = ", ".join(twin.name[:2] for twin in twins) or "none"
        sys.exit(f"no such chapter: {', '.join(sorted(unknown))} (there are: {there})")
    if not twins:
        sys.exit(f"no chapter (NN_name.md) in {NOTEBOOKS}")
    return [twin for twin in twins if not chapters or twin.name[:2] in chapters]


def measure_times(twins: list[Path], path: Path = TIMES) -> int:
    """Execute chapters one after the other, and write how long each took; what the file says of others stays.

    The processor's time is that of the notebook's process, whatever else the machine has to do.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measure import machine

    here = machine(["torch"])
    about = {"device": ENVIRONMENT["CNFKIT_DEVICE"], "processor": here["processor"], "threads": 1}
    about |= {"torch": here["versions"]["torch"], "date": here["date"]}
    for twin in twins:
        before = processor_seconds()
        seconds = execute(twin, store=False)
        taken = {"seconds": round(seconds, 1), "processor_seconds": round(processor_seconds() - before, 1)}
        times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        times[twin.stem] = taken | about
        path.write_text(json.dumps(dict(sorted(times.items())), indent=1) + "\n", encoding="utf-8")
        print(f"{twin.stem:<40} {taken['processor_seconds']:7.1f} s, {seconds:.1f} by the clock", flush=True)
    return 0


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Execute what the command line asks for, two notebooks at a time at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", metavar="NN", help="chapter numbers; all if none is given")
    parser.add_argument("-j", "--jobs", type=int, default=1, choices=(1, 2), help="notebooks at a time")
    parser.add_argument("--refresh-volatile", action="store_true", help="renew timings and device names")
    parser.add_argument("--timings", action="store_true", help="only write the seconds of each into book/times.json")
    options = parser.parse_args()

    twins = chosen(options.chapters)
    os.environ.update(ENVIRONMENT)
    if options.timings:
        return measure_times(twins)
    failed = []
    start = time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(try_to_execute, twin, options.refresh_volatile): twin for twin in twins}
        for run in as_completed(runs):
            stem, (seconds, problem) = runs[run].stem, run.result()
            if problem:
                failed.append(stem)
                print(f"\n{stem}: FAILED, its notebook is left as it was\n{problem}", flush=True)
            else:
                print(f"{stem:<40} {seconds:7.1f} s", flush=True)
    print(f"{'together':<40} {time.perf_counter() - start:7.1f} s")
    if failed:
        print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
