"""Run several make targets one after the other, whatever happens to each, and show what each took."""

import argparse
import subprocess
import sys
import time


def main() -> str | None:
    """Run the parts that the command line names; return the complaint, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", metavar="PART", help="a target of the Makefile")
    parser.add_argument("--make", default="make", help="the make to call")
    parser.add_argument("--budget-minutes", type=float, default=25)
    options = parser.parse_args()

    rows = []
    for part in options.parts:
        print(f"\n=== {part}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([options.make, "--no-print-directory", part]).returncode
        rows.append((part, time.perf_counter() - start, "FAILED" if code else "passed"))

    total = sum(seconds for _, seconds, _ in rows)
    print(f"\n{'part':<12} {'seconds':>8}")
    for part, seconds, verdict in rows:
        print(f"{part:<12} {seconds:8.1f}  {verdict}")
    print(f"{'sum':<12} {total:8.1f}  of {60 * options.budget_minutes:.0f} ({options.budget_minutes:g} minutes)")
    sys.stdout.flush()

    failed = [part for part, _, verdict in rows if verdict == "FAILED"]
    return f"Failed: {', '.join(failed)}. Each can be run alone: make {failed[0]}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
