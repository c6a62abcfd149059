# SPDX-License-Identifier: Apache-2.0
"""
The speed benchmark on one GPU with Llama-3-8B's shapes: about eight minutes, random weights, nothing to download.

    python benchmarks/gpu.py                         # exactness, training steps, decoding, generation, factorising
    python benchmarks/gpu.py --cases B2,B4           # some of the cases of speed.py
    python benchmarks/gpu.py --device cpu --tiny     # tries the program itself, in seconds

The result is written after every race to `results/gpu`, with its page beside it. It has not been run on a GPU yet.
"""

import sys

import speed
from harness import RESULTS

ORDER = "B8,B2,B4,B6,B7"  # what decides most comes first


def main(arguments: list[str] | None = None) -> object:
    """Run the cases of speed.py on a GPU; return the result file."""
    given = sys.argv[1:] if arguments is None else arguments
    defaults = {"--device": "cuda", "--cases": ORDER, "--out": str(RESULTS / "gpu")}
    missing = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    return speed.main([*given, *missing], prefix="gpu")


if __name__ == "__main__":
    main()
