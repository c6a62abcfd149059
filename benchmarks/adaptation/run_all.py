# SPDX-License-Identifier: Apache-2.0
"""
All measurements of adaptation within a budget of minutes, then their page.

    python benchmarks/adaptation/run_all.py --minutes 20    # again: goes on with what is missing

The minutes are wall clock: no cell begins after them. Cells run in the order of importance: first passes and mixed
batches, the tasks that no expert was trained on, what a few examples can choose, the searches of the first draw,
transfer, the other draws. Most take at most three minutes of one core. With other experts in examples/ all cells are
run anew, into a folder of their own.
"""

import subprocess
import sys

import dispatch
import few_shot
import mixed_batch
import selection
import transfer
from common import HERE, Cell, parse, run_cells


def main() -> None:
    args = parse(transfer.parser(__doc__))
    cells: list[Cell] = [
        *dispatch.cells(args),
        *mixed_batch.cells(args),
        *few_shot.static_cells(args),
        *selection.cells(args),
        *few_shot.search_cells(args, [0]),
        *transfer.cells(args),
        *few_shot.search_cells(args, range(1, few_shot.DRAWS)),
    ]
    failed = run_cells(cells, args, keep_going=True)
    if subprocess.run([sys.executable, str(HERE / "report.py"), str(args.out)]).returncode or failed:
        raise SystemExit(f"Failed: {', '.join(failed) or 'report.py'}.")


if __name__ == "__main__":
    main()
