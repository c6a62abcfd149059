# SPDX-License-Identifier: Apache-2.0
"""
How far apart are the probes of bases that should count as the same, and of those that should not?

    python benchmarks/fingerprint/run.py            # SmolLM2-135M, 12 matrices of 4 shapes, about a minute

The cases: the same weight factorised another way; the basis itself rounded; the weight rounded to half precision, as a
narrower load does it. SmolLM2's own bits are bfloat16, so they get float32 noise below their last digit first: a
stand-in for a float32 checkpoint. `ACCEPT` and `REFUSE` in `peft_svf.tuner.fingerprint` rest on the
result, written beside this file.
"""

import json
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from smollm2 import NAME, load_smollm2  # noqa: E402

from peft_svf.tuner.basis import factorize  # noqa: E402
from peft_svf.tuner.fingerprint import ACCEPT, REFUSE, distance, sketch  # noqa: E402

LAYERS = (0, 14, 29)
MODULES = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")


def svd_basis(weight: torch.Tensor) -> torch.Tensor:
    """The same basis by a float32 SVD."""
    u, _, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return (vh.mT if weight.shape[0] >= weight.shape[1] else u).double()


def main() -> None:
    model, _ = load_smollm2()
    cases: dict[str, list[float]] = {}
    for layer in LAYERS:
        for name in MODULES:
            stored = model.get_submodule(f"model.layers.{layer}.{name}").weight.detach().float()
            torch.manual_seed(layer)
            weight = stored * (1 + 2**-9 * (torch.rand_like(stored) - 0.5))  # digits that bfloat16 cannot hold
            own = factorize(weight).Q
            reference = sketch(own)
            others = {
                "float32 SVD": svd_basis(weight),
                "basis stored in float32": own.float().double(),
                "basis stored in bfloat16": own.bfloat16().double(),
                "weight rounded to float16": factorize(weight.half()).Q,
                "weight rounded to bfloat16": factorize(weight.bfloat16()).Q,
                "another weight of the same shape": factorize(weight.flip(0).roll(1, 1) + weight).Q,
            }
            for case, Q in others.items():
                cases.setdefault(case, []).append(distance(sketch(Q), reference))
    rows = {case: {"min": min(x), "median": sorted(x)[len(x) // 2], "max": max(x)} for case, x in cases.items()}
    print(f"{'case':36}{'min':>10}{'median':>10}{'max':>10}   accept <= {ACCEPT:g}, refuse > {REFUSE:g}")
    for case, row in rows.items():
        print(f"{case:36}" + "".join(f"{row[key]:10.1e}" for key in ("min", "median", "max")))
    result = {
        "command": "python benchmarks/fingerprint/run.py",
        "base_model": NAME,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "matrices": [f"model.layers.{layer}.{name}" for layer in LAYERS for name in MODULES],
        "accept": ACCEPT,
        "refuse": REFUSE,
        "distance": rows,
    }
    path = HERE / f"result-{datetime.now().strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
