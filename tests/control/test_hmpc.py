"""Harmonic MPC against closed forms: rotations, frequency responses, equilibria, and its own guarantees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.control.harmonics import Harmonic, HarmonicPlant
from steersman.control.hmpc import HMPC
from steersman.control.periodic_mpct import PeriodicMPCT
from steersman.errors import InputError, InputTypeError

W, SIGMA = 0.3254, 1e-4
POSITION = np.array([[1.0, 0.0, 0.0, 0.0]])


def axis() -> tuple[np.ndarray, np.ndarray]:
    """One axis of a ball on a plate, sampled at 0.2 s; the matrix exponential of a chain ends after four terms."""
    power = scipy.linalg.expm(0.2 * np.diag([1.0, 5.0 / 7.0 * 9.81, 1.0, 1.0], 1))
    return power[:4, :4], power[:4, 4:]


A, B = axis()
BOUNDS = np.array([0.5, np.pi / 4.0, 0.4])
ROWS: Any = (
    np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
    np.array([[0.0], [0.0], [1.0]]),
    -BOUNDS,
    BOUNDS,
)
Q, R, TE, SE = np.diag([10.0, 0.05, 0.05, 0.05]), np.eye(1) * 0.5, np.diag([600.0, 50.0, 50.0, 50.0]), np.eye(1) * 0.3
PLANT = HarmonicPlant(A, B, W)


@pytest.fixture(scope="module")
def controller() -> HMPC:
    return HMPC(PLANT, Q, R, ROWS, TE, SE, sigma=SIGMA)


def sinusoid(amplitude: float, plant: HarmonicPlant = PLANT) -> Harmonic:
    return plant.complete(POSITION, Harmonic(np.zeros(1), np.array([amplitude]), np.zeros(1)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), frequency=st.floats(0.05, 3.0), steps=st.integers(1, 50))
def test_rotation_is_the_passage_of_time_and_keeps_the_offset_cost(seed: int, frequency: float, steps: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (Harmonic(*rng.normal(size=(3, 4))) for _ in range(2))
    later = one.rotated(frequency * steps)
    np.testing.assert_allclose(later.values(frequency, 7), one.values(frequency, steps + 7)[steps:], atol=1e-12)

    def cost(a: Harmonic, b: Harmonic) -> float:
        return sum(float((x - y) @ TE @ (x - y)) for x, y in zip(a[1:], b[1:], strict=True))

    turned = cost(later, other.rotated(frequency * steps))
    np.testing.assert_allclose(turned, cost(one, other), rtol=1e-12)
    phases = np.linspace(0.0, 2.0 * np.pi / frequency, 10_001)
    np.testing.assert_allclose(one.values(frequency, phases).max(axis=0), one.constant + one.amplitude, atol=1e-6)


def test_the_basis_spans_what_the_plant_follows() -> None:
    assert PLANT.basis.shape == (15, 3)
    harmonic = Harmonic(*np.split(PLANT.basis @ np.array([0.3, -1.0, 0.5]), 3))
    np.testing.assert_allclose(PLANT.defect(harmonic), 0.0, atol=1e-12)
    both = harmonic.values(W, 30)
    np.testing.assert_allclose(both[1:, :4], both[:-1, :4] @ A.T + both[:-1, 4:] @ B.T, atol=1e-12)


@pytest.mark.parametrize("length", [3, 10])
def test_a_harmonic_of_the_plant_is_recovered_by_its_fit(length: int) -> None:
    harmonic = Harmonic(*np.split(PLANT.basis @ np.array([0.3, -1.0, 0.5]), 3))
    window = harmonic.values(W, length)[:, :1]
    np.testing.assert_allclose(np.stack(PLANT.fit(POSITION, window, ridge=0.0)), np.stack(harmonic), atol=1e-9)
    np.testing.assert_allclose(np.stack(PLANT.fit(POSITION, window)), np.stack(harmonic), atol=1e-3)


def test_on_an_admissible_harmonic_nothing_is_to_be_done(controller: HMPC) -> None:
    reference = sinusoid(0.2)
    now = reference.values(W, 1)[0]
    found = controller.solve(now[:4], reference)
    assert found.word == "solved"
    np.testing.assert_allclose(found.controls[0], now[4:], atol=1e-5)
    assert abs(found.cost) < 1e-7
    np.testing.assert_allclose(np.stack(found.artificial), np.stack(reference), atol=1e-4)


def test_without_sines_it_is_the_program_of_a_period_of_one_sample() -> None:
    still = HMPC(PLANT, Q, R, ROWS, TE, SE, artificial="equilibrium", horizon=8)
    other = PeriodicMPCT(A, B, Q, R, ROWS, TE, SE, period=1, horizon=8)
    assert other.variables == still.variables - 10
    for x in (np.array([0.2, 0.1, 0.0, 0.0]), np.array([-0.1, -0.2, 0.05, 0.0])):
        target = np.array([0.5, 0.0, 0.0, 0.0, 0.0])
        one = still.solve(x, Harmonic(target, np.zeros(5), np.zeros(5)))
        two = other.solve(x, target[None, :4], target[None, 4:])
        assert one.solved
        np.testing.assert_allclose(one.controls, two.controls, atol=1e-4)
        np.testing.assert_allclose(one.cost, two.cost, rtol=1e-6)
        np.testing.assert_allclose(one.artificial.constant, two.artificial[0], atol=1e-4)
    assert not other.solve(np.array([0.0, 0.0, 0.3, 0.0]), np.zeros((1, 4)), np.zeros((1, 1))).solved


@pytest.mark.parametrize("amplitude", [0.25, 0.6])
def test_the_value_falls_by_the_stage_cost_and_the_best_admissible_amplitude_is_reached(
    controller: HMPC, amplitude: float
) -> None:
    reference, x, last = sinusoid(amplitude), np.array([0.0, 0.2, 0.0, 0.0]), np.inf
    found = controller.solve(x, reference)
    first = found.cost
    for _ in range(110):
        found = controller.solve(x, reference)
        assert found.solved
        assert found.cost <= last + 1e-6 * first
        artificial = found.artificial.values(W, 1)[0]
        away, effort = x - artificial[:4], found.controls[0] - artificial[4:]
        last = found.cost - away @ Q @ away - effort @ R @ effort
        x, reference = A @ x + B @ found.controls[0], reference.rotated(W)
    # The plant's frequency response says how much velocity a unit of position takes.
    response = np.linalg.solve(np.exp(1j * W) * np.eye(4) - A, B[:, 0])
    ratio = abs(response[1] / response[0])
    np.testing.assert_allclose(ratio, 1.627026, atol=1e-6)
    np.testing.assert_allclose(found.artificial.amplitude[0], min(amplitude, (0.5 - SIGMA) / ratio), atol=1e-4)


def test_a_periodic_program_follows_a_period_that_it_is_on() -> None:
    plant = HarmonicPlant(A, B, 2.0 * np.pi / 20.0)
    whole = PeriodicMPCT(A, B, Q, R, ROWS, TE, SE, period=20)
    table = sinusoid(0.2, plant).values(plant.frequency, 20)
    found = whole.solve(table[0, :4], table[:, :4], table[:, 4:])
    np.testing.assert_allclose(found.controls[:, 0], table[:5, 4], atol=1e-5)
    assert abs(found.cost) < 1e-6
    assert whole.variables == 29 + 5 * 20


def play(policy: Any, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, Any]:
    def step(running: tuple, _: None) -> tuple[tuple, tuple]:
        x, carry = running
        u, carry = policy(x, carry, jax.random.key(0))
        return (jnp.asarray(A) @ x + jnp.asarray(B) @ u, carry), (x, u, carry)

    begin = jnp.asarray(start), policy.init(jax.random.key(0))
    states, controls, plans = jax.jit(lambda begin: jax.lax.scan(step, begin, length=steps)[1])(begin)
    return np.asarray(states), np.asarray(controls), plans


def test_the_policy_turns_its_reference_and_plays_the_host_solutions(controller: HMPC) -> None:
    reference = sinusoid(0.25)
    states, controls, plans = play(controller.policy(reference), np.zeros(4), 6)
    for t in (0, 5):
        want = controller.solve(states[t], reference.rotated(W * t))
        np.testing.assert_allclose(controls[t], want.controls[0], atol=1e-4)
        np.testing.assert_allclose(plans.cost[t], want.cost, rtol=1e-4)
    np.testing.assert_array_equal(plans.report["status"], 0)
    # Any table of outputs, through fits; of a harmonic these are the harmonic.
    again = play(controller.policy(outputs=reference.values(W, 20)[:, :1], output=POSITION), np.zeros(4), 6)
    np.testing.assert_allclose(again[0], states, atol=1e-3)


def test_a_start_out_of_reach_is_named_and_the_fallback_acts(controller: HMPC) -> None:
    refused = controller.solve(np.array([0.0, 0.0, 0.3, 0.0]), sinusoid(0.2))
    assert refused.word == "infeasible"
    assert np.isnan(refused.controls).all()
    assert "in 5 steps" in refused.blame
    assert "row 1" in controller.solve(np.array([0.0, 0.8, 0.0, 0.0]), sinusoid(0.2)).blame
    far = np.array([0.0, 0.0, 0.3, 0.0])
    _, controls, plans = play(controller.policy(sinusoid(0.2), fallback=np.array([-0.4])), far, 2)
    np.testing.assert_allclose(controls[0], -0.4)
    assert plans.report["fallback"][0] == 1
    _, controls, plans = play(controller.policy(sinusoid(0.2)), far, 2)
    assert np.isnan(controls).all()
    np.testing.assert_array_equal(plans.report["status"], [2, 4])


def make(**changes: Any) -> HMPC:
    arguments: dict[str, Any] = {"plant": PLANT, "Q": Q, "R": R, "rows": ROWS, "Te": TE, "Se": SE}
    return HMPC(**{**arguments, **changes})


def rows(place: int, value: Any) -> tuple:
    return tuple(value if i == place else part for i, part in enumerate(ROWS))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: HarmonicPlant(A, B, 0.0), "frequency"),
        (lambda: HarmonicPlant(A, B, 3.2), "frequency"),
        (lambda: HarmonicPlant(A[:2], B, W), "A's shape"),
        (lambda: HarmonicPlant(A, B[:2], W), "B's shape"),
        (lambda: make(horizon=0), "horizon"),
        (lambda: make(sigma=0.0), "sigma"),
        (lambda: make(artificial="sine"), "artificial"),
        (lambda: make(rows=rows(0, np.eye(3))), "E's shape"),
        (lambda: make(rows=rows(1, np.eye(3))), "F's shape"),
        (lambda: make(rows=rows(2, np.zeros(2))), "low's shape"),
        (lambda: make(rows=rows(2, BOUNDS - 1e-4)), "leave room"),
        (lambda: make(Q=-Q), "Q is .* semidefinite"),
        (lambda: make(Te=-TE), "Te is .* semidefinite"),
        (lambda: make(R=0.0 * R), "R is .* definite"),
        (lambda: make(Sh=np.eye(2)), "Sh's shape"),
        (lambda: make(Th=np.stack([TE, 2.0 * TE])), "Th is .* equal"),
        (lambda: PeriodicMPCT(A, B, Q, R, ROWS, TE, SE, period=0), "period"),
        (lambda: PLANT.fit(POSITION, np.zeros(3)), "window's shape"),
        (lambda: PLANT.complete(np.eye(3), sinusoid(0.1)), "output's shape"),
    ],
)
def test_bad_input_is_named(bad: Any, message: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=message):
        bad()


def test_bad_states_and_references_are_named(controller: HMPC) -> None:
    with pytest.raises(InputError, match="x is"):
        controller.solve(np.full(4, np.nan), sinusoid(0.1))
    with pytest.raises(InputError, match="reference's shape"):
        controller.solve(np.zeros(4), Harmonic(*np.zeros((3, 4))))
    with pytest.raises(InputError, match="reference and outputs"):
        controller.policy()
    with pytest.raises(InputError, match="output is"):
        controller.policy(outputs=np.zeros((5, 1)))
    # A rotation of the base frequency that no control touches.
    turn = np.array([[np.cos(W), -np.sin(W)], [np.sin(W), np.cos(W)]])
    with pytest.warns(UserWarning, match="resonates"):
        HarmonicPlant(scipy.linalg.block_diag(turn, 0.5), np.array([[0.0], [0.0], [1.0]]), W)
