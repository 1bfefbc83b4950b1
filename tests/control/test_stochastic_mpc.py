"""Stochastic MPC against its two members written down separately, Monte Carlo, and its own feasibility argument."""

import itertools
from typing import Any

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.control.lqr import lqr
from steersman.control.stochastic_mpc import StochasticMPC
from steersman.control.tightening import BoundedNoise, ResetSchedule, Tightening
from steersman.errors import InputError, InputTypeError

A, B = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[0.5], [1.0]])
Q, R = np.diag([1.0, 0.1]), np.eye(1)
ROWS: Any = (np.array([[1.0, 0.0]]), np.zeros((1, 1)), np.array([1.0]))
TARGET, STEADY = np.array([2.0, 0.0]), np.diag([5.0, 0.0])
NOISE = BoundedNoise.truncated_normal(np.full(2, 0.05), 0.2)
with jax.enable_x64(True):
    _REGULATOR = lqr(A, B, Q, R)
    GAIN, VALUE = -np.asarray(_REGULATOR.gain), np.asarray(_REGULATOR.value)
LOOP = A + B @ GAIN
LIKELY = Tightening(LOOP, ROWS[0], 0.9, NOISE, samples=40_000)
HORIZON, TAIL = 5, 20


def make(**changes: Any) -> StochasticMPC:
    given: dict[str, Any] = {"rows": ROWS, "noise": NOISE, "target": TARGET, "steady_weight": STEADY,
                             "horizon": HORIZON, "tail": TAIL, "tightening": LIKELY, **changes}  # fmt: skip
    return StochasticMPC(A, B, Q, R, given.pop("rows"), given.pop("noise"), **given)


def separately(x: np.ndarray, z: np.ndarray, member: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Robust-stochastic MPC plans from the state; indirect-feedback MPC bounds `z` and charges the mean."""
    v, steady, held = cvxpy.Variable((HORIZON, 1)), cvxpy.Variable(2), cvxpy.Variable(1)
    cost: Any = 5.0 * cvxpy.square(steady[0] - 2.0)
    rows: list[Any] = [steady == A @ steady + B @ held]
    worst = max(LIKELY.quantiles[:, 0])
    if member == "robust-stochastic":
        worst = LIKELY.quantile(1)[0] + sum(NOISE.support(ROWS[0][0] @ np.linalg.matrix_power(LOOP, j))
                                            for j in range(1, 60))  # fmt: skip
    rows += [steady[0] <= 1.0 - worst]
    path = cvxpy.Variable((HORIZON + TAIL + 2, 2))
    start = x if member == "robust-stochastic" else z
    error = x - start
    rows += [path[0] == start]
    for i in range(HORIZON + TAIL + 1):
        nominal: Any = path[i]
        u: Any = v[i] if i < HORIZON else held + GAIN @ (nominal - steady)
        if i:
            shrunk = LIKELY.quantile(step + i)[0]
            if member == "robust-stochastic":
                shrunk = LIKELY.quantile(1)[0] + LIKELY.between(1, i)[0]
            rows += [nominal[0] <= 1.0 - shrunk]
        if i < HORIZON:
            cost += cvxpy.quad_form(nominal + error - TARGET, Q) + cvxpy.quad_form(u + GAIN @ error, R)
        if i == HORIZON:
            cost += cvxpy.quad_form(nominal + error - TARGET, cvxpy.psd_wrap(VALUE))
        rows += [path[i + 1] == A @ nominal + B @ u]
        error = LOOP @ error
    cvxpy.Problem(cvxpy.Minimize(cost), rows).solve(solver="CLARABEL")
    assert v.value is not None
    first = np.asarray(v.value[0])
    if member == "robust-stochastic":
        return first, x
    return first + GAIN @ (x - z), A @ z + B @ first


@pytest.mark.parametrize(("resets", "member"), [(1, "robust-stochastic"), (None, "indirect")])
def test_the_members_are_those_of_the_literature(resets: int | None, member: str) -> None:
    controller, drawn = make(reset_every=resets), NOISE.sample(np.random.default_rng(3), 5)
    x = z = np.array([0.6, 0.1])
    for step, w in enumerate(drawn):
        found = controller.solve(x, z, step)
        want, following = separately(x, z, member, step)
        np.testing.assert_allclose(found.control, want, atol=2e-5)
        x, z = A @ x + B @ found.control + w, found.nominal if resets == 1 else following


def test_tightenings_cover_what_they_say() -> None:
    generator, error = np.random.default_rng(7), np.zeros((100_000, 2))
    for step in range(1, 6):
        error = error @ LOOP.T + NOISE.sample(generator, len(error))
        pushed = error @ ROWS[0][0]
        share = np.mean(pushed <= LIKELY.quantile(step)[0])
        assert abs(share - 0.9) <= 3.0 * np.sqrt(0.09 * (1 / 40_000 + 1 / 100_000))
        assert pushed.max() <= LIKELY.between(0, step)[0]
    corners = np.array(list(itertools.product((-0.2, 0.2), repeat=2)))
    for direction in np.array([[1.0, 0.5], [-0.3, 2.0]]):
        assert NOISE.support(direction) == pytest.approx(float((corners @ direction).max()))


def test_nested_resets_tighten_no_more_where_they_are_rarer() -> None:
    for rare, often in ((2, 1), (4, 2), (8, 4), (6, 3)):
        one, two = (ResetSchedule(LIKELY, every).tightenings(rare, 30).max(axis=1) for every in (rare, often))
        assert np.all(one <= two + 3e-3)
    certain = Tightening(LOOP, ROWS[0], 1.0, NOISE)
    np.testing.assert_allclose(certain.quantile(4), certain.between(0, 4))
    first = [ResetSchedule(certain, every).tightenings(0, 1).max() for every in (1, 3, None)]
    np.testing.assert_allclose(first, 0.2)


def test_without_noise_resets_do_nothing_and_without_bounds_it_is_the_regulator() -> None:
    still = BoundedNoise.truncated_normal(np.zeros(2), 0.0)
    none = Tightening(LOOP, ROWS[0], 0.9, still, samples=10)
    paths = []
    for resets in (1, 3, None):
        controller, x = make(reset_every=resets, noise=still, tightening=none), np.zeros(2)
        z, path = x, []
        for step in range(6):
            found = controller.solve(x, z, step)
            x, z = A @ x + B @ found.control, found.nominal
            path.append(x)
        paths.append(path)
    np.testing.assert_allclose(paths[1], paths[0], atol=1e-5)
    np.testing.assert_allclose(paths[2], paths[0], atol=1e-5)
    assert abs(paths[0][-1][0] - 1.0) < 0.05
    target = np.array([-5.0, 0.0])
    free = make(reset_every=3, target=target, steady_weight=np.eye(2))
    x, z = np.array([-4.5, 0.2]), np.array([-4.6, 0.1])
    np.testing.assert_allclose(free.solve(x, z, 4).control, GAIN @ (x - target), atol=1e-5)


@pytest.mark.parametrize("resets", [1, 3, None])
def test_the_shifted_plan_satisfies_the_next_program_whatever_the_noise(resets: int | None) -> None:
    """With room of 2e-6 for the tail that is cut off and for the solver."""
    controller, generator = make(reset_every=resets, tail=40), np.random.default_rng(0)
    corners = np.array(list(itertools.product((-0.2, 0.2), repeat=2)))
    x = z = np.array([0.3, 0.2])
    for step in range(4):
        found = controller.solve(x, z, step)
        here = x if controller.schedule.last(step) == step else z
        ahead = here
        for v in found.inputs:
            ahead = A @ ahead + B @ v
        steady, held = found.steady[:2], found.steady[2:]
        last = held + GAIN @ (ahead - steady)
        kept = np.concatenate([found.inputs[1:], last[None]])
        noise = np.concatenate([corners, NOISE.sample(generator, 40)])
        for w in noise:
            following = A @ x + B @ found.control + w
            reset = controller.schedule.last(step + 1) == step + 1
            nominal, inputs, mean, ahead = following if reset else found.nominal, [], following, found.nominal
            for v in kept:
                # At a reset the new nominal trajectory is what was the mean's, under the mean's inputs.
                inputs.append(v + GAIN @ (mean - ahead) if reset else v)
                mean, ahead = A @ mean + B @ (v + GAIN @ (mean - ahead)), A @ ahead + B @ v
            shifted = np.concatenate([np.concatenate(inputs), found.steady])
            tightened = 1.0 - controller.schedule.tightenings(step + 1, HORIZON + 40)
            parameters = np.concatenate([following, nominal, np.where(np.isfinite(tightened), tightened, 1e4).ravel()])
            _, low, high = controller.program.data(parameters)
            image = controller.program.A @ shifted
            assert np.max(image - high) <= 2e-6
            assert np.max(low - image) <= 2e-6
        x, z = A @ x + B @ found.control + noise[step], found.nominal


def test_the_policy_plays_the_host_solutions() -> None:
    controller = make(reset_every=3)
    policy, drawn = controller.policy(), NOISE.sample(np.random.default_rng(1), 5)

    def step(running: tuple, w: jax.Array) -> tuple[tuple, tuple]:
        x, carry = running
        u, carry = policy(x, carry, jax.random.key(0))
        return (jnp.asarray(A) @ x + jnp.asarray(B) @ u + w, carry), (u, carry.report["status"])

    begin = jnp.zeros(2), policy.init(jax.random.key(0))
    controls, status = jax.jit(lambda begin, drawn: jax.lax.scan(step, begin, drawn)[1])(begin, jnp.asarray(drawn))
    np.testing.assert_array_equal(status, 0)
    x = z = np.zeros(2)
    for i, w in enumerate(drawn):
        found = controller.solve(x, z, i)
        np.testing.assert_allclose(controls[i], found.control, atol=1e-4)
        x, z = A @ x + B @ found.control + w, found.nominal


def test_a_fixed_steady_state_out_of_reach_is_infeasible_and_named() -> None:
    controller = make(reset_every=1, steady_state=(np.array([0.9, 0.0]), np.zeros(1)))
    found = controller.solve(np.zeros(2), np.zeros(2), 0)
    assert found.word == "infeasible"
    assert np.isnan(found.control).all()
    assert "the fixed steady state" in found.blame


ZERO = (np.zeros((1, 2)), np.zeros((1, 1)), np.ones(1))
BOTH = (np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros((2, 1)), np.array([0.1, 0.1]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Tightening(A, ROWS[0], 0.9, NOISE), "spectral radius"),
        (lambda: Tightening(LOOP, ROWS[0], 0.4, NOISE), "probability"),
        (lambda: Tightening(LOOP, ROWS[0], 0.9, BoundedNoise(NOISE.sample, lambda d: np.inf)), "bounded"),
        (lambda: Tightening(LOOP, ROWS[0], 0.9, BoundedNoise(NOISE.sample, lambda d: 0.01), 100), "noise.sample"),
        (lambda: make(rows=ZERO), "zero row"),
        (lambda: make(rows=(ROWS[0], ROWS[1], np.ones(2))), "E's shape"),
        (lambda: make(rows=BOTH, reset_every=1, tightening=None, probability=1.0), "noise takes"),
        (lambda: make(reset_every=0), "reset_every"),
        (lambda: make(reset_every=1.5), "reset_every"),
        (lambda: make(horizon=0), "horizon"),
        (lambda: make(target=np.zeros(3)), "target's shape"),
        (lambda: make(steady_weight=np.zeros(2)), "steady_weight's shape"),
        (lambda: make(steady_state=(np.zeros(2), np.zeros(2))), "steady_state's shape"),
        (lambda: BoundedNoise.truncated_normal(-1.0, 1.0), "std"),
        (lambda: make().solve(np.full(2, np.nan), np.zeros(2), 0), "x is"),
        (lambda: make().solve(np.zeros(2), np.zeros(2), -1), "step"),
    ],
)
def test_bad_input_is_named(bad: Any, message: str) -> None:
    with pytest.raises((InputError, InputTypeError, TypeError), match=message):
        bad()
