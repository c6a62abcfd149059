# SPDX-License-Identifier: Apache-2.0
"""
All measurements of adaptation within a budget of minutes, then their page.

    python benchmarks/adaptation/run_all.py --minutes 20    # again: goes on with what is missing

The minutes are wall clock. Each script gets its share of what the ones before it have left over, and no cell begins
after that; the last one of a script may run past it. With other experts in examples/ all cells are run anew, into a
folder of their own.
"""

import argparse
import subprocess
import sys
import time

from common import HERE

SHARES = {"mixed_batch.py": 0.1, "dispatch.py": 0.2, "transfer.py": 0.45, "few_shot.py": 1.0}  # of what is left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    failed = []
    for script, share in SHARES.items():
        left = max(0.0, end - time.monotonic()) / 60
        print(f"{script}: {left:.1f} min are left", flush=True)
        command = [sys.executable, str(HERE / script), "--minutes", f"{share * left:.2f}"]
        if subprocess.run(command).returncode:
            failed.append(script)  # the others still run
    if subprocess.run([sys.executable, str(HERE / "report.py")]).returncode or failed:
        raise SystemExit(f"Failed: {', '.join(failed) or 'report.py'}.")


if __name__ == "__main__":
    main()
