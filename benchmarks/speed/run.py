# SPDX-License-Identifier: Apache-2.0
"""
Time SVF against the frozen base, LoRA, TinyLoRA, IA3 and the dense form, side by side in one process.

    python benchmarks/speed/run.py                    # all cases, about a quarter of an hour on two free cores
    python benchmarks/speed/run.py --quick            # about two minutes; for trying, not for quoting
    python benchmarks/speed/run.py --cases B2,B6      # some of them: the cases are in cases.py

Writes results/speed-<time>.json, anew after every race, and from that file the page results/speed-<time>.md with its
figures (report.py).
"""

import argparse
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark; returns the result file."""
    from cases import CASES, Bench, Settings, peak_of, settings_record
    from race import Run
    from report import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cells and repetitions")
    parser.add_argument("--tiny", action="store_true", help="a random model of a few thousand numbers")
    parser.add_argument("--threads", type=int, default=1, help="1 counts CPU time, more the wall clock (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # how B8 starts its fresh processes
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT, about names that transformers renames
    if options.peak_of:
        print(peak_of(options.peak_of))
        return Path()
    chosen = [name.strip().upper() for name in options.cases.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(CASES)):
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    settings = Settings(options.quick, options.tiny, options.seed, options.threads)
    run = Run(options.out, settings_record(settings) | {"cases": chosen})
    bench = Bench(run, settings)
    for name in chosen:
        CASES[name](bench)
    run.finish()
    print(f"Wrote {run.path.name} and {write(run.path).name} in {options.out}")
    return run.path


if __name__ == "__main__":
    main()
