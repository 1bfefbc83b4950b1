"""Every backend against CVXPY and against each other; what they say where there is no answer."""

from __future__ import annotations

import cvxpy
import jax
import numpy as np
import pytest

from steersman.control import ADMM, OSQP, PIQP, STATUSES, Affine, ConicProgram, ParametricQP
from steersman.errors import InputError

BACKENDS = {
    "osqp": (OSQP(), 1e-5),
    "piqp": (PIQP(), 1e-5),
    "piqp-dense": (PIQP(sparse=False), 1e-5),
    "admm": (ADMM(tolerance=1e-4, max_iterations=5_000), 3e-3),
}


@pytest.fixture(scope="module")
def program() -> ParametricQP:
    """Twelve variables, three equations that move with the parameters, seventeen bounded rows."""
    rng = np.random.default_rng(0)
    size, rows, count = 12, 20, 4
    root = rng.normal(size=(size, size))
    moving = np.zeros((rows, count))
    moving[:3] = rng.normal(size=(3, count))
    low, high = -np.ones(rows), np.ones(rows)
    low[:3] = high[:3] = 0.0
    low[-1] = -np.inf
    return ParametricQP(
        root @ root.T / size + 0.1 * np.eye(size),
        rng.normal(size=(rows, size)),
        Affine(rng.normal(size=size), rng.normal(size=(size, count))),
        Affine(low, moving),
        Affine(high, moving),
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_agree_with_cvxpy_and_satisfy_the_optimality_conditions(program: ParametricQP, name: str) -> None:
    solver, tolerance = BACKENDS[name]
    prepared = solver.prepare(program)
    for seed in range(3):
        parameters = 0.3 * np.random.default_rng(seed).normal(size=4)
        q, low, high = program.data(parameters)
        z = cvxpy.Variable(12)
        objective = 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(program.P.toarray())) + q @ z
        bounded = np.isfinite(low)
        rows = program.A.toarray()
        reference = cvxpy.Problem(
            cvxpy.Minimize(objective), [rows[bounded] @ z >= low[bounded], rows @ z <= high]
        ).solve(solver="CLARABEL")
        found = prepared.solve(parameters)
        assert STATUSES[int(found.status)] == "solved"
        assert float(found.objective) == pytest.approx(reference, abs=tolerance)
        np.testing.assert_allclose(found.z, z.value, atol=tolerance)
        stationary = program.P @ np.asarray(found.z) + q + program.A.T @ np.asarray(found.dual)
        np.testing.assert_allclose(stationary, 0.0, atol=10 * tolerance)
        image, dual = program.A @ np.asarray(found.z), np.asarray(found.dual)
        # A multiplier is positive only at its upper bound, and negative only at its lower one.
        gap = np.maximum(dual, 0.0) * (high - image) + np.minimum(dual, 0.0) * np.where(bounded, low - image, 0.0)
        np.testing.assert_allclose(gap, 0.0, atol=10 * tolerance)


def test_admm_solves_many_programs_at_once(program: ParametricQP) -> None:
    prepared = ADMM(tolerance=1e-4, max_iterations=5_000).prepare(program)
    many = 0.3 * jax.random.normal(jax.random.key(0), (6, 4))
    found = jax.jit(jax.vmap(prepared.solve))(many)
    exact = PIQP().prepare(program)
    for row, parameters in enumerate(np.asarray(many)):
        np.testing.assert_allclose(found.z[row], exact.solve(parameters).z, atol=3e-3)
    # A warm start at the solution is recognized at the first look.
    again = prepared.solve(many[0], found.z[0], found.dual[0])
    assert int(again.iterations) < int(found.iterations[0])


@pytest.mark.parametrize("solver", [OSQP(), PIQP(), ADMM()])
def test_infeasible_programs_say_which_rows(solver: OSQP | PIQP | ADMM) -> None:
    program = ParametricQP(
        np.eye(2),
        np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        Affine(np.zeros(2), np.zeros((2, 1))),
        Affine(np.array([0.0, -np.inf, -1.0]), np.array([[1.0], [0.0], [0.0]])),
        Affine(np.array([np.inf, 0.5, 1.0]), np.zeros((3, 1))),
        ["floor", "ceiling", "side"],
    )
    prepared = solver.prepare(program)
    good = prepared.solve(np.array([0.25]))
    assert bool(good.solved)
    np.testing.assert_allclose(good.z, [0.25, 0.0], atol=1e-4)
    bad = prepared.solve(np.array([1.0]))
    assert not bool(bad.solved)
    assert set(program.blame(bad.dual)) == {"floor", "ceiling"}
    # Afterwards the same solver still answers.
    assert bool(prepared.solve(np.array([0.25])).solved)


@pytest.mark.parametrize("solver", [OSQP(), PIQP(), ADMM()])
def test_bounds_that_cross_are_infeasible(solver: OSQP | PIQP | ADMM) -> None:
    none = np.zeros((1, 1))
    program = ParametricQP(
        np.eye(1), np.eye(1), Affine(np.zeros(1), none), Affine(np.ones(1), none), Affine(np.zeros(1), none), ["width"]
    )
    found = solver.prepare(program).solve(np.zeros(1))
    assert STATUSES[int(found.status)] == "infeasible"
    assert program.blame(np.ones(1)) == ["width"]


def none(count: int) -> Affine:
    return Affine(np.zeros(count), np.zeros((count, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParametricQP(np.eye(2)[:1], np.eye(2), none(2), none(2), none(2)), "P.shape"),
        (lambda: ParametricQP(np.eye(2), np.eye(3), none(2), none(3), none(3)), "A.shape"),
        (lambda: ParametricQP(-np.eye(2), np.eye(2), none(2), none(2), none(2)), "positive semidefinite"),
        (lambda: ParametricQP(np.array([[1.0, 1.0], [0.0, 1.0]]), np.eye(2), none(2), none(2), none(2)), "symmetric"),
        (lambda: ParametricQP(np.eye(2), np.eye(2), none(3), none(2), none(2)), "q.constant.shape"),
        (lambda: ParametricQP(np.eye(2), np.eye(2), none(2), none(2), none(1)), "high.constant.shape"),
        (
            lambda: ParametricQP(np.eye(2), np.eye(2), Affine(np.full(2, np.nan), np.zeros((2, 1))), none(2), none(2)),
            "q has entries that are not numbers",
        ),
        (lambda: ParametricQP(np.eye(2), np.eye(2), none(2), none(2), none(2), ["one"]), "row_names"),
        (lambda: OSQP(tolerance=0.0), "tolerance"),
        (lambda: PIQP(tolerance=-1.0), "tolerance"),
        (lambda: ADMM(relaxation=2.0), "relaxation"),
        (lambda: ADMM(max_iterations=0), "max_iterations"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def cone(right: float = 1.0) -> ConicProgram:
    """The point of a disc of radius `right` that is farthest along a direction: its projection, in closed form."""
    z = cvxpy.Variable(2, name="z")
    direction = cvxpy.Parameter(2, name="direction")
    inside = cvxpy.norm(z) <= right
    return ConicProgram(cvxpy.Problem(cvxpy.Minimize(-direction @ z), [inside]), {"inside": inside})


def test_conic_programs_are_solved_for_many_parameters() -> None:
    program = cone(2.0)
    for direction in (np.array([3.0, 4.0]), np.array([-1.0, 0.0])):
        found = program.solve(direction=direction)
        assert found.word == "solved"
        np.testing.assert_allclose(found.variables["z"], 2.0 * direction / np.linalg.norm(direction), atol=1e-6)
        assert found.objective == pytest.approx(-2.0 * np.linalg.norm(direction), abs=1e-6)
        # The multiplier is the price of a larger radius.
        assert found.duals["inside"] == pytest.approx(np.linalg.norm(direction), abs=1e-5)


def test_conic_programs_without_an_answer_say_so() -> None:
    found = cone(-1.0).solve(direction=np.ones(2))
    assert found.word == "infeasible"
    assert not found.solved
    assert found.variables == {}


def test_bad_conic_input_is_named() -> None:
    with pytest.raises(InputError, match=r"missing are \['direction'\]"):
        cone().solve()
    with pytest.raises(InputError, match="elsewhere"):
        cone().solve(direction=np.ones(2), elsewhere=1.0)
    with pytest.raises(InputError, match=r"direction.shape"):
        cone().solve(direction=np.ones(3))
    with pytest.raises(InputError, match="direction"):
        cone().solve(direction=np.array([np.nan, 1.0]))
    z, weight = cvxpy.Variable(2, name="z"), cvxpy.Parameter((2, 2), PSD=True, name="weight")
    with pytest.raises(InputError, match="DPP"):
        ConicProgram(cvxpy.Problem(cvxpy.Minimize(cvxpy.quad_form(z, weight))))
    with pytest.raises(InputError, match="not convex"):
        ConicProgram(cvxpy.Problem(cvxpy.Minimize(cvxpy.sqrt(z[0]))))
