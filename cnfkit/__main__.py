"""``python -m cnfkit train|evaluate|sample CONFIG``: a run from a small file, without writing a program."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout

from cnfkit import commands
from cnfkit.config import known_configs
from cnfkit.distributed import joined, rank
from cnfkit.settings import set_precision

CONFIG_HELP = f"a TOML file, or one that comes with cnfkit: {known_configs()}"


def parser() -> argparse.ArgumentParser:
    """What the commands take."""
    top = argparse.ArgumentParser("python -m cnfkit", description=__doc__)
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, about in (
        ("train", "train a model; writes configuration, log, curves, checkpoint and weights into a folder"),
        ("evaluate", "print the likelihood of the test points, with its standard error and the solver's error"),
        ("sample", "write samples into a file, and a picture of them"),
    ):
        made[name] = subs.add_parser(name, help=about, description=about.capitalize() + ".")
        choice = CONFIG_HELP if name == "train" else f"that of a run, or its folder, or its weights; {CONFIG_HELP}"
        made[name].add_argument("config", metavar="CONFIG", help=choice)
        made[name].add_argument("--output", metavar="FOLDER", help="that of the run; runs/NAME unless given")
    made["train"].add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one"
    )
    made["train"].add_argument("--minutes", type=positive(float), help="end after so many; --resume goes on")
    made["train"].add_argument(
        "--deterministic", action="store_true", help="the same bits on CUDA too, for more time; it has them on the CPU"
    )
    made["evaluate"].add_argument(
        "--draws", type=positive(int), default=1, help="of discrete data, how many draws of the noise; 1 unless given"
    )
    made["evaluate"].add_argument(
        "--bin-centres", action="store_true", help="of discrete data, the density in the middle of the cells, too"
    )
    made["evaluate"].add_argument(
        "--tolerance", type=positive(float), nargs="+", help="solve within each of these in turn"
    )
    made["evaluate"].add_argument("--rows", type=positive(int), help="measure on the first so many test points only")
    made["sample"].add_argument("-n", type=positive(int), default=1000, help="how many; 1000 unless given")
    made["sample"].add_argument("--seed", type=int, default=0)
    made["sample"].add_argument("--to", metavar="FILE", help=".npy or .csv; samples.npy in the folder unless given")
    return top


def positive(kind: type):
    """The type of an argument that must be more than 0."""

    def read(text: str):
        if not (value := kind(text)) > 0:
            raise ValueError
        return value

    read.__name__ = f"number above 0 ({kind.__name__})"  # stands in argparse's message
    return read


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what the caller can mend is said in one line."""
    options = vars(parser().parse_args(arguments))
    set_precision(options.pop("deterministic", False))
    try:
        with joined(), open(os.devnull, "w") as nowhere:
            with redirect_stdout(sys.stdout if rank() == 0 else nowhere):  # the first process speaks for all
                return getattr(commands, options.pop("command"))(**options)
    except KeyboardInterrupt:
        print("interrupted; the last record is kept", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
