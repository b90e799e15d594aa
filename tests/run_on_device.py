"""Run the notebooks on a device, chapter by chapter, and say of each whether its checks hold.

nbval compares nothing here but cells tagged `nbval-check-output`: another device has other last digits,
and `check` judges the numbers. What came of each chapter is kept in book/on_device.json, whence the book shows it.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = "book/on_device.json"


def keep(device: str, chapter: str, row: dict) -> None:
    """Put a chapter's row in the place of the one that an earlier run on such a device left."""
    path = ROOT / REPORT
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows.setdefault(device, {})[chapter] = row
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    draft.replace(path)


def main() -> str | None:
    """Run what the command line asks for; return the complaint, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapters", nargs="*", metavar="NN", help="chapter numbers; all if none is given")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda", "mps"])
    options = parser.parse_args()

    missing = [name for name in ("torch", "nbval", "ipykernel") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}. Install them, or leave NO_SETUP out."
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[options.device]:
        return (
            f"PyTorch {torch.__version__} sees no {options.device} device on this machine. "
            "Install PyTorch's build for it (make setup TORCH_INDEX=...), or try make test-gpu DEVICE=cpu."
        )
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"PyTorch {torch.__version__} on {name}")

    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if options.chapters:
        unknown = set(options.chapters) - {path.name[:2] for path in notebooks}
        if unknown:
            return f"no such chapter: {', '.join(sorted(unknown))}"
        notebooks = [path for path in notebooks if path.name[:2] in options.chapters]
    if not notebooks:
        return "there are no notebooks to run"

    failed = []
    for path in notebooks:
        command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env"]
        # The environment may be of other versions than the lock's, so their warnings are not ours.
        command += ["-W", "ignore", "-p", "no:cacheprovider", str(path.relative_to(ROOT))]
        start = time.perf_counter()
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"CNFKIT_DEVICE": options.device},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        seconds = time.perf_counter() - start
        if run.returncode:
            failed.append(path.stem)
            print(run.stdout)
        print(f"{path.stem:<40} {'FAILED' if run.returncode else 'passed'} {seconds:8.1f} s", flush=True)
        facts = {"machine": name, "torch": torch.__version__, "python": platform.python_version()}
        facts |= {"date": time.strftime("%Y-%m-%d"), "seconds": round(seconds, 1)}
        keep(options.device, path.stem, {"passed": not run.returncode, **facts})
    return f"failed on {options.device}: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
