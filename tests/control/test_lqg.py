"""Filters, output feedback and exact costs against printed values, scipy, simulation and calculations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from steersman.control import LinearController, controller_cost, kalman_filter, least_cost, lqg
from steersman.envs import DoubleIntegrator, HiddenVelocity, LinearGaussianProblem, rollout
from steersman.errors import InputError, InputTypeError
from steersman.policies import check_policy, load_policy, save_policy

PROBLEM = HiddenVelocity()
DISCOUNT = 0.98
COST = jax.jit(lambda controller: controller_cost(PROBLEM, controller, DISCOUNT, horizon=100))


def from_vector(x):
    """A controller with one memory from (A, B, C, D)."""
    a, b, c, d = jnp.asarray(x).reshape(4, 1, 1)
    return LinearController(a, b, c, d)


def scalar(process=1.0, sensor=1.0, spread=1.0, a=1.0, mean=None):
    return LinearGaussianProblem(
        [[a]], [[1.0]], [[1.0]], [[1.0]], [[1.0]],
        process_noise=[process], measurement_noise=[sensor], initial_spread=[spread], initial_mean=mean,
    )  # fmt: skip


def test_reference_values_of_the_hidden_velocity_problem():
    """Computed apart from this package, with SciPy."""
    assert float(least_cost(PROBLEM, DISCOUNT, state_seen=True)) == pytest.approx(6.248, abs=1e-3)
    assert float(least_cost(PROBLEM, DISCOUNT)) == pytest.approx(7.682, abs=1e-3)
    assert float(least_cost(PROBLEM, DISCOUNT, horizon=100, state_seen=True)) == pytest.approx(6.20, abs=5e-3)
    assert float(least_cost(PROBLEM, DISCOUNT, horizon=100)) == pytest.approx(7.46, abs=5e-3)
    noisy = controller_cost(PROBLEM, LinearController.static([[-1.053]]), DISCOUNT, action_noise=0.1)
    assert float(noisy) == pytest.approx(32.12, abs=1e-2)


def test_best_controllers_without_memory_and_with_one_number():
    """The search is SciPy's; the best costs are known numbers."""
    static = jax.jit(jax.value_and_grad(lambda d: COST(LinearController.static(d.reshape(1, 1)))))
    found = scipy.optimize.minimize(static, np.asarray([-1.0]), jac=True)
    assert found.fun == pytest.approx(28.29, abs=1e-2)
    assert found.x[0] == pytest.approx(-1.089, abs=1e-2)
    memory = jax.jit(jax.value_and_grad(lambda x: COST(from_vector(x))))
    found = scipy.optimize.minimize(memory, [0.5, -1.0, -2.0, -4.0], jac=True, options={"gtol": 1e-4})
    assert found.fun == pytest.approx(8.54, abs=1e-2)
    # Only the product of what is written to the memory and what is read from it matters.
    a, b, c, d = found.x
    assert (a, b * c, d) == pytest.approx((0.583, 2.96, -8.056), rel=0.02)


def test_best_noisy_controller_with_one_number():
    """With noise of 0.1 on action and memory, over an infinite horizon (oracle 7)."""

    @jax.jit
    @jax.value_and_grad
    def noisy(x):
        return controller_cost(PROBLEM, from_vector(x), DISCOUNT, action_noise=0.1, memory_noise=0.1)

    found = scipy.optimize.minimize(noisy, [0.58, -40.0, -0.074, -8.0], jac=True, options={"gtol": 1e-4})
    assert found.fun == pytest.approx(8.86, abs=1e-2)


def test_filter_of_a_random_walk_by_hand():
    """``P = P - P^2/(P + 1) + 1`` has the golden ratio as its solution."""
    golden = (1.0 + np.sqrt(5.0)) / 2.0
    found = kalman_filter(scalar())
    np.testing.assert_allclose(found.predicted, [[golden]], rtol=1e-6)
    np.testing.assert_allclose(found.gain, [[golden / (golden + 1.0)]], rtol=1e-6)
    np.testing.assert_allclose(found.filtered, [[golden - 1.0]], rtol=1e-6)


def test_filter_agrees_with_scipy():
    g, h = np.asarray(PROBLEM.process_noise, float), np.asarray(PROBLEM.measurement_noise, float)
    a, c = np.asarray(PROBLEM.A, float), np.asarray(PROBLEM.C, float)
    predicted = scipy.linalg.solve_discrete_are(a.T, c.T, g @ g.T, h @ h.T)
    np.testing.assert_allclose(kalman_filter(PROBLEM).predicted, predicted, rtol=1e-5)


def test_least_cost_of_one_and_two_steps_by_hand():
    """``x' = x + u + w``, all variances one, cost ``x^2 + u^2``.

    The last action is zero, as nothing follows it: one step costs ``E x_0^2 = 1``. With two, the first action faces
    ``x^2 + u^2 + (x + u)^2 + 1``, whose best is ``u = -x/2`` for ``1.5 x^2 + 1``; seen through noise, the estimate is
    ``y/2`` with error variance 1/2, and acting on it costs ``2 (1/2)^2`` of that more.
    """
    assert float(least_cost(scalar(), horizon=1)) == pytest.approx(1.0)
    assert float(least_cost(scalar(), horizon=2, state_seen=True)) == pytest.approx(2.5)
    assert float(least_cost(scalar(), horizon=2)) == pytest.approx(2.75)
    # A start elsewhere costs its square more with the state seen, at the value 1.5 of each unit.
    assert float(least_cost(scalar(mean=[2.0]), horizon=2, state_seen=True)) == pytest.approx(2.5 + 1.5 * 4.0)


def test_optimal_controller_reaches_the_least_cost_where_the_prior_is_stationary():
    """From the covariance that the filter settles at, the stationary controller is the optimum."""
    settled = kalman_filter(PROBLEM).predicted
    problem = LinearGaussianProblem(
        PROBLEM.A, PROBLEM.B, PROBLEM.C, PROBLEM.Q, PROBLEM.R,
        process_noise=PROBLEM.process_noise, measurement_noise=PROBLEM.measurement_noise,
        initial_spread=np.linalg.cholesky(np.asarray(settled, float)), initial_mean=[0.3, -0.2],
    )  # fmt: skip
    solution = lqg(problem, DISCOUNT)
    assert float(controller_cost(problem, solution.controller, DISCOUNT)) == pytest.approx(
        float(solution.cost), rel=1e-4
    )
    nudged = LinearController(
        solution.controller.A, solution.controller.B, 1.2 * solution.controller.C, solution.controller.D,
        solution.controller.start,
    )  # fmt: skip
    assert float(controller_cost(problem, nudged, DISCOUNT)) > float(solution.cost) * (1 + 1e-4)


def test_exact_cost_agrees_with_simulation():
    """Twenty thousand trajectories of the same controller in the same problem."""
    controller = LinearController([[0.58]], [[-2.0]], [[-1.5]], [[-8.0]], start=[0.1])
    key = jax.random.key(0)
    starts = jax.vmap(PROBLEM.initial_state)(jax.random.split(key, 20_000))
    states, controls = rollout(PROBLEM, controller, starts, key=jax.random.key(1), num_steps=30)
    cost = np.einsum("tbi,ij,tbj->tb", states[:-1], PROBLEM.Q, states[:-1]) + 0.01 * np.asarray(controls)[..., 0] ** 2
    totals = DISCOUNT ** np.arange(30) @ cost
    exact = float(controller_cost(PROBLEM, controller, DISCOUNT, horizon=30))
    assert abs(totals.mean() - exact) < 4 * totals.std() / np.sqrt(totals.size)


def test_infinite_horizon_is_the_limit_of_finite_ones():
    controller = from_vector([0.58, -2.0, -1.5, -8.0])
    noises = {"action_noise": 0.3, "memory_noise": 0.2}
    long = controller_cost(PROBLEM, controller, DISCOUNT, horizon=1500, **noises)
    assert float(controller_cost(PROBLEM, controller, DISCOUNT, **noises)) == pytest.approx(float(long), rel=1e-5)
    assert float(controller_cost(PROBLEM, LinearController.static([[1.0]]), DISCOUNT)) == np.inf


def test_batched_and_traced_it_is_the_same():
    vectors = jnp.asarray([[0.58, -2.0, -1.5, -8.0], [0.2, 1.0, -1.0, -1.0]])
    many = jax.jit(jax.vmap(lambda x: COST(from_vector(x))))(vectors)
    np.testing.assert_allclose(many, [COST(from_vector(x)) for x in vectors], rtol=1e-4)
    exact = [float(controller_cost(PROBLEM, from_vector(x), DISCOUNT, horizon=100)) for x in vectors]
    np.testing.assert_allclose(many, exact, rtol=1e-3)


def test_a_controller_is_a_policy(tmp_path):
    controller = lqg(PROBLEM, DISCOUNT).controller
    check_policy(controller, PROBLEM.environment())
    save_policy(controller, tmp_path)
    loaded = load_policy(tmp_path)
    arguments = (jnp.asarray([0.4]), jnp.asarray([0.1, -0.3]), jax.random.key(0))
    for found, expected in zip(loaded(*arguments), controller(*arguments), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: least_cost(PROBLEM, 1.0), r"discount is 1\.0"),
        (lambda: least_cost(PROBLEM, 0.9, horizon=0), "horizon is 0"),
        (lambda: lqg(PROBLEM, 1.2), r"discount is 1\.2"),
        (lambda: LinearController([[1.0]], [[1.0]], [[1.0, 2.0]], [[1.0]]), r"C's shape is \(1, 2\)"),
        (lambda: LinearController([1.0], [[1.0]], [[1.0]], [[1.0]]), r"A's shape is \(1,\)"),
        (lambda: LinearController([[1.0]], [[1.0]], [[1.0]], [[1.0]], [1.0, 2.0]), r"start's shape"),
        (lambda: LinearController.static([1.0]), r"D's shape is \(1,\)"),
        (
            lambda: controller_cost(PROBLEM, LinearController.static([[1.0, 2.0]]), 0.9),
            r"controller\.D's shape is \(1, 2\)",
        ),
        (
            lambda: controller_cost(PROBLEM, LinearController.static([[1.0]]), 0.9, action_noise=-1.0),
            r"action_noise is -1\.0",
        ),
        (
            lambda: controller_cost(PROBLEM, LinearController.static([[1.0]]), 0.9, memory_noise=np.nan),
            "memory_noise is nan",
        ),
        (lambda: kalman_filter(HiddenVelocity(sensor_noise=0.0)), "problem has no stationary Kalman filter"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_other_kinds_are_refused():
    with pytest.raises(InputTypeError, match="problem is a DoubleIntegrator"):
        least_cost(DoubleIntegrator(), 0.9)
    with pytest.raises(InputTypeError, match="controller is a float"):
        controller_cost(PROBLEM, 1.0, 0.9)
