"""Measure cnfkit beside its peers: a table on the terminal, results/bench.json, and the book's page.

python benchmarks/bench.py [--device cuda] [--quick] [--only CASE ...] [--output FILE]

It wants an environment that has the peers: see environment.sh. All libraries are in this one process, with the same
weights and the same points; they must agree before they are timed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import page
import torch
from cases import CASES, usual
from measure import QUICK, Scale, machine

PACKAGES = ("cnfkit", "torch", "torchdiffeq", "zuko", "torchdyn", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds; its numbers say nothing")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cpu", choices=page.FILES, help="where, the CPU unless given")
    parser.add_argument("--output", type=Path, help="the JSON file; unless --quick, the device's own, and the page")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")

    scale = replace(QUICK if options.quick else Scale(), device=options.device)
    if options.device != "cpu":
        scale = replace(scale, threads=(1,))
    torch.manual_seed(0)
    start = time.perf_counter()
    results: dict = {"machine": machine(PACKAGES, options.device), "threads": scale.threads[0], "quick": options.quick}
    for name in options.only or usual(options.device):
        began = time.perf_counter()
        torch.set_num_threads(scale.threads[0])
        results[name] = CASES[name](scale)
        print(f"\n{page.terminal(name, results)}\n[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    results["seconds"] = round(time.perf_counter() - start)
    print(f"\n{page.terminal('goals', results)}\n[in all: {results['seconds']} s]")

    own = page.FILES[options.device]
    output = options.output or (None if options.quick or options.only else own)
    if output:
        page.write_json(output, results)
        print(f"Written: {output.name}")
    if output == own:
        page.write()


if __name__ == "__main__":
    main()
