# SPDX-License-Identifier: Apache-2.0
"""
How far apart are the sketches of bases that should count as the same, and of those that should not?

    python benchmarks/fingerprint.py            # SmolLM2-135M, 12 matrices of 4 shapes, about a minute

Cases: the same weight factorised another way; the basis rounded; the weight rounded to half precision, as a narrower
load does it. SmolLM2's bits are bfloat16, so they get float32 noise below their last digit first: a stand-in for a
float32 checkpoint. `ACCEPT` and `REFUSE` in `peft_svf.tuner.fingerprint` rest on the result.
"""

import statistics

import torch
from harness import RESULTS, Cell, run_cells
from smollm2 import NAME, load_smollm2

from peft_svf.tuner.basis import factorize
from peft_svf.tuner.fingerprint import ACCEPT, REFUSE, distance, sketch

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 14, 29)
    for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")
]


def measure() -> dict[str, object]:
    """Measure the distances by case."""
    model, cases = load_smollm2()[0], {}
    for i, name in enumerate(NAMES):
        stored = model.get_submodule(name).weight.detach().float()
        torch.manual_seed(i)
        weight = stored * (1 + 2**-9 * (torch.rand_like(stored) - 0.5))  # digits that bfloat16 cannot hold
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        basis = factorize(weight).Q
        others = {
            "float32 SVD": (vh.mT if weight.shape[0] >= weight.shape[1] else u).double(),
            "basis stored in float32": basis.float().double(),
            "basis stored in bfloat16": basis.bfloat16().double(),
            "weight rounded to float16": factorize(weight.half()).Q,
            "weight rounded to bfloat16": factorize(weight.bfloat16()).Q,
            "another weight of the same shape": factorize(weight.flip(0).roll(1, 1) + weight).Q,
        }
        for case, Q in others.items():
            cases.setdefault(case, []).append(distance(sketch(Q), sketch(basis)))
    rows = {case: {"min": min(x), "median": statistics.median(x), "max": max(x)} for case, x in cases.items()}
    for case, row in rows.items():
        print(f"{case:36}" + "".join(f"{value:10.1e}" for value in row.values()))
    return {"base_model": NAME, "matrices": NAMES, "accept": ACCEPT, "refuse": REFUSE, "distance": rows}


if __name__ == "__main__":
    count = len(list((RESULTS / "fingerprint").glob("*.json")))
    run_cells([Cell(f"distances-{count + 1}", measure)], RESULTS / "fingerprint")
