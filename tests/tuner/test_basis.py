# SPDX-License-Identifier: Apache-2.0
"""Laws of a basis, as tensors only: its directions, rescaling with it, and the sketch that tells bases apart."""

import oracle
import pytest
import torch

from peft_svf.tuner.basis import deviation, factorize, rescale, side_of, tolerance
from peft_svf.tuner.fingerprint import ACCEPT, REFUSE, SKETCH_SIZE, distance, sketch

SHAPES = {"in": (11, 7), "out": (5, 13), "square": (9, 9)}
DTYPES = [torch.float32, torch.bfloat16]
REAL_SHAPES = [(24, 24), (12, 24), (40, 24), (96, 160), (192, 120)]


def matrix(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_is_that_of_an_svd_on_the_narrow_side_up_to_sign(shape, dtype):
    weight, r = matrix(shape, dtype), min(shape)
    basis, eye = factorize(weight), torch.eye(r, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert basis.side == side_of(*shape) == ("in" if shape[0] >= shape[1] else "out")
    assert (basis.Q.shape, basis.S.shape, basis.Q.dtype, basis.S.dtype) == ((r, r), (r,), torch.float64, torch.float64)
    torch.testing.assert_close(basis.Q.T @ basis.Q, eye, atol=1e-13, rtol=0)
    torch.testing.assert_close((basis.Q.T @ (Vh.T if basis.side == "in" else U)).abs(), eye, atol=1e-10, rtol=0)
    assert (basis.Q.gather(0, basis.Q.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert (basis.S.diff() <= 0).all()
    torch.testing.assert_close(basis.S, oracle.singular_values(weight), atol=1e-13, rtol=1e-12)


def test_small_singular_values_keep_their_digits():
    U, V = torch.linalg.qr(matrix((11, 7)).double())[0], torch.linalg.qr(matrix((7, 7), seed=1).double())[0]
    S = torch.logspace(0, -6, 7, dtype=torch.float64)
    torch.testing.assert_close(factorize(U @ torch.diag(S) @ V.T).S, S, rtol=1e-6, atol=0)


def test_batched_equals_single(shape):
    weights = torch.stack([matrix(shape, seed=seed) for seed in range(3)])
    batched = factorize(weights)
    for i, weight in enumerate(weights):
        single = factorize(weight)
        torch.testing.assert_close(batched.Q[i], single.Q, atol=1e-12, rtol=0)
        torch.testing.assert_close(batched.S[i], single.S, atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(shape, value):
    weight = matrix(shape)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        factorize(weight)


@pytest.mark.parametrize("stack", [(), (2,)], ids=["matrix", "stack"])
def test_only_the_top_directions_of_a_weight_deviate_by_rounding(shape, stack):
    weight = matrix((*stack, *shape))
    basis = factorize(weight)
    Q, S = basis.Q.float(), basis.S.float()
    for k in (1, 4, len(Q.mT)):
        assert deviation(weight, Q[..., :k], S[..., :k]) < tolerance(torch.float32)
    for others in ([1], [0, 2], [0, 1, 2, 4], [-2, -1]):  # directions of this weight, but not its first
        assert deviation(weight, Q[..., others], S[..., others]) > 1e-3


def z_vector(r, seed=3):
    """A z-vector with a zero, a negative entry and a one."""
    z = 1 + 0.5 * matrix((r,), seed=seed).double()
    z[:3] = torch.tensor([0.0, -1.5, 1.0])
    return z


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("k", [None, 4], ids=["all directions", "the top ones"])
def test_rescaled_weight_equals_the_oracle(shape, dtype, tolerance, k):
    weight, z = matrix(shape, dtype), z_vector(k or min(shape))
    rescaled = rescale(weight, factorize(weight).Q[:, :k], z - 1)
    assert rescaled.dtype == dtype
    torch.testing.assert_close(rescaled.double(), oracle.rescaled(weight, z), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_an_offset_of_zero_gives_back_the_weight_to_the_bit(shape, dtype):
    weight = matrix(shape, dtype)
    assert torch.equal(rescale(weight, factorize(weight).Q.float(), torch.zeros(min(shape))), weight)


def test_a_sketch_sees_another_basis_and_neither_signs_nor_the_global_random_state(shape):
    Q, state = factorize(matrix(shape)).Q, torch.random.get_rng_state()
    signs = torch.tensor([-1.0, 1.0, -1.0] * len(Q), dtype=torch.float64)[: len(Q)]
    assert sketch(Q).shape == (SKETCH_SIZE,) and sketch(Q).dtype == torch.float64
    assert distance(sketch(Q * signs), sketch(Q)) < 1e-15
    assert distance(sketch(factorize(matrix(shape, seed=1)).Q), sketch(Q)) > 20 * REFUSE
    assert torch.equal(torch.random.get_rng_state(), state)


def test_distance_estimates_the_distance_of_the_squared_directions():
    """The 32 projections against the full vector of r squared directions, which the sketch stands for."""
    ratios = []
    for seed in range(20):
        weight = matrix((96, 80), seed=seed)
        Q, rounded = factorize(weight).Q, factorize(weight.bfloat16()).Q
        c = torch.randn(80, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        p, p_rounded = ((q.T @ c).square() for q in (Q, rounded))
        ratios.append(distance(sketch(rounded), sketch(Q)) / float((p_rounded - p).norm() / p.norm()))
    assert 0.5 < sorted(ratios)[10] < 2


@pytest.mark.parametrize("size", REAL_SHAPES, ids=str)
def test_sketch_accepts_another_driver_and_tells_rounded_weights_from_their_originals(size):
    for seed in range(3):
        weight = 0.2 * matrix(size, seed=seed)
        original = sketch(factorize(weight).Q)
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)  # float32: other bits, the same directions
        driver = (Vh.T if side_of(*size) == "in" else U).double()
        assert distance(sketch(driver), original) < 0.5 * ACCEPT
        assert distance(sketch(factorize(weight.bfloat16()).Q), original) > ACCEPT
