"""Names resolve to Steersman's, gymnax's and Gymnasium's environments, in that order."""

import importlib.util
import subprocess
import sys

import gymnasium
import jax
import pytest

from steersman.envs import ControlEnvironment, Problem, as_problem, registry
from steersman.envs.dynamics import DiscreteCartPole, DoubleIntegrator
from steersman.envs.registry import make, names, register
from steersman.errors import InputError, InputTypeError

OWN = [
    "cartpole-balance",
    "cartpole-discrete",
    "cartpole-swingup",
    "contextual-bandit",
    "detour-reach",
    "double-integrator",
    "drifting-goal",
    "hidden-target",
    "hidden-velocity",
    "lot-sizing",
    "obstacle-gate",
    "pendulum-swingup",
    "planar-quadrotor",
    "two-walls",
]
#: Names of tasks that Gymnasium makes.
ON_HOST = ["pick-and-place", "push-t"]


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


@pytest.mark.parametrize("name", OWN)
def test_own_names_are_the_names_of_the_problems(name):
    problem = make(name)
    assert isinstance(problem, Problem)
    assert problem.name == name
    spelled = "".join(part.capitalize() for part in name.split("-"))
    assert make(spelled).name == name


def test_options_reach_the_problem_and_its_environment():
    problem = make("double-integrator", mass=2.0, num_dimensions=2, num_steps=7)
    assert isinstance(problem.environment, ControlEnvironment)
    assert float(problem.params.mass) == 2.0
    assert problem.action_space.shape == (2,)
    assert problem.environment.num_steps == 7
    assert make("cartpole-discrete", num_steps=9).environment.num_steps == 9
    with pytest.raises(InputError, match=r"option of double-integrator 'mas'.*'mass'"):
        make("double-integrator", mas=2.0)
    with pytest.raises(InputError, match=r"option of cartpole-discrete 'num_step'"):
        make("cartpole-discrete", num_step=2)


def test_names_lists_all_libraries_without_importing_gymnax():
    program = (
        "import sys; from steersman.envs.registry import names; listed = names();"
        "assert 'gymnax' not in sys.modules and 'matplotlib' not in sys.modules and 'mujoco' not in sys.modules;"
        "print(*listed)"
    )
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert listed[: len(OWN) + len(ON_HOST)] == sorted([*OWN, *ON_HOST])
    assert {"Breakout-MinAtar", "CartPole-v1", "Hopper-v5", "LunarLander-v3"} <= set(listed)
    assert len(listed) == len(set(listed))
    import gymnax

    assert set(gymnax.registered_envs) <= set(listed)


def test_gymnax_comes_before_gymnasium_and_a_prefix_chooses():
    problem = make("CartPole-v1")
    assert isinstance(problem, Problem)
    assert type(problem.environment).__module__.startswith("gymnax")
    assert make("gymnax:CartPole-v1", max_steps_in_episode=11).params.max_steps_in_episode == 11
    assert make("DeepSea-bsuite", size=5).observation_space.shape == (5, 5)
    hosted = make("gymnasium:CartPole-v1", sutton_barto_reward=True, workers=0)
    assert hosted.on_host
    assert hosted.name == "CartPole-v1"
    assert make("MountainCar-v0").on_host is False
    with pytest.raises(InputError, match=r"option of CartPole-v1 'gravty'.*'gravity'"):
        make("gymnax:CartPole-v1", gravty=1.0)


def test_gymnasium_environments_are_found_by_their_ids():
    assert make("CliffWalking-v1").on_host
    with pytest.raises(InputError, match="no_such_module"):
        make("no_such_module:Task-v0")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pendulum-swingdown", "pendulum-swingup"),
        ("CartPole-v7", "CartPole-v1"),
        ("Hopper", "Hopper-v5"),
        ("gymnax:Cartpole", "CartPole-v1"),
        ("gymnasium:Hoper-v5", "Hopper-v5"),
    ],
)
def test_unknown_names_get_the_nearest(name, nearest):
    with pytest.raises(InputError, match=f"Unknown .*environment.*'{nearest}'"):
        make(name)


def test_mujoco_that_is_missing_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mujoco" else find_spec(name))
    with pytest.raises(
        InputError, match=r"Hopper-v5 needs MuJoCo: install it with pip install 'steersman\[mujoco\]'\."
    ):
        make("Hopper-v5")


def test_registered_factories_may_return_whatever_is_a_problem(own_names):
    register("heavy", lambda mass=5.0: DoubleIntegrator(mass=mass))
    register("short-cartpole", lambda **options: DiscreteCartPole(**options))
    register("host-cartpole", lambda: gymnasium.make("CartPole-v1"))
    assert float(make("Heavy", mass=7.0).params.mass) == 7.0
    assert make("short-cartpole", num_steps=3).environment.num_steps == 3
    assert make("host-cartpole").on_host
    assert make("heavy", num_steps=4).environment.num_steps == 4
    with pytest.raises(InputError, match="option of host-cartpole 'num_steps'"):
        make("host-cartpole", num_steps=4)
    assert "heavy" in names()
    assert as_problem("heavy").name == "double-integrator"
    with pytest.raises(InputError, match="name is 'HEAVY'"):
        register("HEAVY", DoubleIntegrator)
    with pytest.raises(InputError, match="name is 'my:env'"):
        register("my:env", DoubleIntegrator)
    with pytest.raises(InputError, match="name is ''"):
        register("", DoubleIntegrator)


def test_arguments_of_another_kind_are_refused():
    with pytest.raises((InputTypeError, TypeError), match="name"):
        make(3)
    with pytest.raises((InputTypeError, TypeError), match="factory"):
        register("number", 3)


def test_a_named_problem_steps():
    problem = make("planar-quadrotor")
    keys = jax.random.split(jax.random.key(0), 2)
    observation, state = problem.reset(keys)
    assert observation.shape == (2, 6)
    assert state.steps.shape == (2,)
