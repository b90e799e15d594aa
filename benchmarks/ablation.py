"""What each of RNODE's penalties does to a flow of images at a small budget: neither, each alone, and both.

python benchmarks/ablation.py [--config mnist-rnode] [--steps 1000] [--minutes 9] [--output runs/ablation]

Each of the four is a run of ``python -m cnfkit train`` in a folder of its own. Said again, the command goes on where
the time was up. When all have ended it prints a table, and writes ablation.json beside the runs.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import page
import torch
from measure import machine

import cnfkit as ck
from cnfkit import commands
from cnfkit.config import find_config
from cnfkit.settings import set_precision

PENALTIES = ("kinetic_energy", "jacobian_energy")
VARIANTS = {"neither": (), "kinetic": PENALTIES[:1], "jacobian": PENALTIES[1:], "both": PENALTIES}
ROWS = 500  # test images of which the energies are measured


def variants(sections: dict[str, dict], steps: int) -> dict[str, str]:
    """The four configurations, whose learning rate warms up in a tenth of the steps at most."""
    training, weights = sections["training"], sections["loss"]["penalties"]
    training |= {"steps": steps, "warmup": min(training.get("warmup", 0), steps // 10), "records": 20}
    found = {}
    for name, kept in VARIANTS.items():
        sections["loss"]["penalties"] = {penalty: weights[penalty] for penalty in kept}
        found[name] = toml(sections)
    return found


def toml(sections: dict[str, dict]) -> str:
    """A configuration's sections as a TOML text."""
    lines = []
    for name, entries in sections.items():
        lines += [f"[{name}]", *(f"{entry} = {literal(value)}" for entry, value in entries.items()), ""]
    return "\n".join(lines)


def literal(value: object) -> str:
    """A value in TOML, which writes it as JSON does, but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {literal(entry)}" for name, entry in value.items()) + " }"
    return json.dumps(value)


def measured(name: str, folder: Path) -> dict:
    """What became of a run: the likelihood as its training saw it and within a tolerance, evaluations and energies."""
    model, settings, facts, _ = commands.restored(str(folder), None)
    test = settings.points().test[:ROWS].to(next(model.parameters()).device)
    loss, generator = settings.loss_of(model).train(), torch.Generator()
    solve = replace(settings.solve(), reduction="mean", energies=PENALTIES, generator=generator.manual_seed(0))
    with torch.no_grad():
        _, result = model.log_prob_and_result(test, solve=solve)
        terms = loss(test, generator=generator.manual_seed(0))[1]
        error = loss.solver_error(test[:32], generator=generator.manual_seed(0))
    row = {"penalties": name, "test": facts["test"], "seconds": facts["seconds"], "reported": float(terms["nll"])}
    row |= {"solver_error": error, "evaluations": result.evaluations}
    return row | {energy: result.penalties[energy].mean().item() for energy in PENALTIES}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="mnist-rnode", help="one with penalties")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="end after so many; the same command goes on")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args(arguments)
    set_precision()
    name, text = find_config(options.config)
    sections = tomllib.loads(text)
    weights = sections.get("loss", {}).get("penalties", {})
    if not set(PENALTIES) <= set(weights):
        parser.error(f"--config {options.config} has the penalties {list(weights)}; wanted {', '.join(PENALTIES)}")
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    rows = []
    for variant, content in variants(sections, options.steps).items():
        folder = options.output / variant
        config, stored = folder / f"{variant}.toml", folder / "row.json"
        if not stored.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            config.write_text(content, encoding="utf-8")
            left = None if end is None else max((end - time.monotonic()) / 60, 0.0)
            status = commands.train(str(config), str(folder), resume=True, minutes=left)
            if status or "test" not in ck.inspect(folder / commands.WEIGHTS).facts:
                raise SystemExit(status)  # it has said how far it came; the same command goes on
            page.write_json(stored, measured(variant, folder))
        rows.append(json.loads(stored.read_text(encoding="utf-8")))
    device = ck.device().type
    found = {"config": name, "steps": options.steps, "machine": machine(("cnfkit", "torch"), device), "rows": rows}
    page.write_json(options.output / "ablation.json", found)
    print(f"likelihoods in {rows[0]['test']['unit']}")
    print(f"{'penalties':<10}{'test':>9}{'±':>7}{'reported':>9}{'solver':>9}{'evals':>6}{'E_K':>7}{'E_J':>7}")
    for row in rows:
        test = row["test"]
        numbers = f"{test['nll']:>9.3f}{test['standard_error']:>7.3f}{row['reported']:>9.3f}{row['solver_error']:>9.1e}"
        energies = "".join(f"{row[energy]:>7.3f}" for energy in PENALTIES)
        print(f"{row['penalties']:<10}{numbers}{row['evaluations']:>6.0f}{energies}")


if __name__ == "__main__":
    main()
