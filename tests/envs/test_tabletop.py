"""Pick and place: what counts as a success, what an action does, and the expert's two grips."""

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest

from steersman.envs import as_problem, make, mujoco_scene
from steersman.envs.expert_recording import play_expert
from steersman.envs.rendering import paint
from steersman.envs.scripted_experts import demonstrate
from steersman.errors import InputError, RunError

pytest.importorskip("mujoco", reason="MuJoCo is not installed")

from steersman.envs import tabletop
from steersman.envs.tabletop import CUBE, HIGHEST, LOWEST, REACH, PickAndPlace, PickAndPlaceExpert


@pytest.fixture(scope="module")
def environment():
    return tabletop.make_pick_and_place()


def opengl():
    try:
        tabletop._renderer(8, 8)
    except InputError:
        pytest.skip("MuJoCo finds no OpenGL to draw with")


def test_the_expert_succeeds_with_either_grip(environment):
    turns = []
    for seed in range(10):
        for side in (0, 1):
            played = play_expert(environment, PickAndPlaceExpert(side), lambda inner: inner.state, seed=seed)
            episode = played.episode
            assert episode.success[-1], (seed, side)
            # One reward, at the very end.
            assert list(np.flatnonzero(episode.reward)) == [len(episode) - 1]
            assert episode.reward[-1] == 1.0
            assert played.infos[-1]["lifted"]
            assert played.infos[-1]["distance"] < 0.025
            # Something was carried, well above the table.
            assert episode.observation[:, 7].max() > 0.08
            turns.append(episode.observation[-1, 3])
    smaller, larger = np.abs(np.reshape(turns, (-1, 2))).T
    assert np.all(smaller < 0.8)
    np.testing.assert_allclose(smaller + larger, np.pi / 2, atol=0.05)


def test_a_cube_that_slips_out_is_gripped_again(environment):
    environment.reset(seed=0)
    inner, expert = environment.unwrapped, PickAndPlaceExpert(0)
    dropped = False
    for _ in range(100):
        _, _, terminated, _, info = environment.step(expert(inner.state))
        if not dropped and inner.cube[2] > 0.08:
            inner.data.qpos[:3] = [0.1, 0.1, CUBE]
            inner.data.qvel[:6] = 0.0
            dropped = True
        if terminated:
            break
    assert dropped
    assert info["is_success"]


def test_only_a_cube_that_was_lifted_counts():
    environment = PickAndPlace()
    above = np.asarray([0.0, 0.0, 0.15, 0.0, 0.08])
    environment.reset(seed=0, options={"cube": (0.1, 0.0, 0.2), "target": (0.11, 0.0)})
    for _ in range(5):
        _, reward, terminated, _, info = environment.step(above)
    assert info["distance"] == pytest.approx(0.01, abs=1e-3)
    assert (reward, terminated, info["lifted"]) == (0.0, False, False)
    # The very same place counts once the cube has been up.
    environment._lifted = True
    assert environment.step(above)[1:3] == (1.0, True)


def test_servos_go_no_farther_than_they_are_sent():
    environment = PickAndPlace()
    environment.reset(seed=1, options={"cube": (0.15, 0.15, 0.0), "target": (0.0, 0.0)})
    before = environment.gripper
    for _ in range(30):
        environment.step([-0.2, -0.2, 0.25, -1.0, 0.0])
        moved = environment.gripper - before
        assert np.linalg.norm(moved[:3]) < REACH
        assert abs(moved[3]) < tabletop.TURN
        before = environment.gripper
    np.testing.assert_allclose(environment.gripper, [-0.2, -0.2, 0.25, -1.0, 0.0], atol=2e-3)
    # Twenty steps are a second.
    assert environment.data.time == pytest.approx(30 / 20)
    environment.step([9.0, 9.0, 9.0, 9.0, 9.0])
    assert np.all(environment.gripper[:3] <= HIGHEST[:3])


def test_gripped_and_ungripped_cubes_weigh_what_they_should():
    environment = PickAndPlace()
    environment.reset(seed=0, options={"cube": (0.0, 0.0, 0.0), "target": (0.15, 0.0)})
    weight = 0.06 * 9.81
    for _ in range(10):
        environment.step([0.0, 0.0, 0.016, 0.0, 0.07])
    for _ in range(10):
        environment.step([0.0, 0.0, 0.016, 0.0, 0.0])
    for _ in range(20):
        environment.step([0.0, 0.0, 0.15, 0.0, 0.0])
    assert environment.cube[2] > 0.14
    # At rest in the air, the servo carries the cube: the gripper itself is balanced.
    assert environment.data.actuator_force[2] == pytest.approx(weight, rel=0.05)


def test_kinds_of_observations_say_the_same():
    flat, apart = PickAndPlace(), PickAndPlace("environment_state_agent_pos", normalized_actions=True)
    seen, split = flat.reset(seed=4)[0], apart.reset(seed=4)[0]
    random = np.random.default_rng(0)
    for _ in range(5):
        np.testing.assert_array_equal(seen, np.concatenate([split["agent_pos"], split["environment_state"]]))
        assert flat.observation_space.contains(seen)
        assert apart.observation_space.contains(split)
        share = random.uniform(size=5)
        seen = flat.step(LOWEST + share * (HIGHEST - LOWEST))[0]
        # Rounding must not differ, so that the bits can be compared: 2 s - 1 is exact here.
        split = apart.step(2.0 * share - 1.0)[0]
        np.testing.assert_allclose(seen[:5], split["agent_pos"], atol=1e-6)
        seen, split = flat._observe(), apart._observe()
        apart.data.qpos[:], apart.data.qvel[:] = flat.data.qpos, flat.data.qvel
        split = apart._observe()
    assert apart.action_space.high.tolist() == [1.0] * 5


def test_pictures_show_the_cube():
    opengl()
    environment = PickAndPlace("pixels_agent_pos", render_mode="rgb_array", observation_width=64)
    one = environment.reset(seed=0, options={"cube": (0.1, -0.1, 0.0), "target": (-0.1, 0.1)})[0]["pixels"]
    other = environment.reset(seed=0, options={"cube": (-0.1, -0.1, 0.0), "target": (-0.1, 0.1)})[0]["pixels"]
    assert one.shape == (96, 64, 3)
    assert one.dtype == np.uint8
    for picture, on_the_right in ((one, True), (other, False)):
        red, green, blue = picture.astype(int).transpose(2, 0, 1)
        columns = np.argwhere((red > 150) & (red - blue > 80) & (red - green > 40))[:, 1]
        assert len(columns) > 5
        assert (columns.mean() > 32) == on_the_right
    assert environment.render().shape == (360, 480, 3)


def test_without_opengl_there_is_a_sentence_and_a_drawing(monkeypatch):
    import mujoco

    tried = []

    def failing(*arguments):
        tried.append(arguments)
        raise RuntimeError("no context")

    monkeypatch.setattr(mujoco, "Renderer", failing)
    monkeypatch.setattr(tabletop, "_renderers", tabletop._Renderers())
    monkeypatch.setattr(tabletop, "_opengl_failed", False)
    for _ in range(2):
        with pytest.raises(InputError, match="MUJOCO_GL"):
            make("pick-and-place", obs_type="pixels_agent_pos")
    # MuJoCo may end the process when it is asked a second time.
    assert len(tried) == 1
    environment = PickAndPlace()
    environment.reset(seed=0)
    assert np.asarray(paint(mujoco_scene(environment.model, environment.data))).shape == (300, 480, 3)


def test_the_task_has_a_name_and_is_resumed_exactly():
    made = gymnasium.make("steersman/PickAndPlace-v0")
    made.reset(seed=0)
    ends = [made.step(made.action_space.sample())[3] for _ in range(100)]
    assert ends == [False] * 99 + [True]
    problem = as_problem("steersman/PickAndPlace-v0")
    assert problem.observation_space.shape == (14,)
    with make("pick-and-place", workers=0).start(2, 0) as live:
        live.reset()
        actions = np.random.default_rng(0).uniform(LOWEST, HIGHEST, (6, 2, 5)).astype(np.float32)
        for action in actions[:3]:
            live.step(action)
        kept = live.snapshot()
        ahead = [live.step(action).observation for action in actions[3:]]
        live.restore(kept)
        for action, expected in zip(actions[3:], ahead, strict=True):
            np.testing.assert_array_equal(live.step(action).observation, expected)


def test_demonstrations_have_both_grips_and_noise():
    shown = demonstrate("pick-and-place", 8, 3, noise=0.003)
    assert shown.successes.all()
    assert shown.fps == 20
    assert shown.environment.id == tabletop.ID
    assert shown[0].observation.shape == (len(shown[0]) + 1, 14)
    assert {abs(episode.action[-1, 3]) > np.pi / 4 for episode in shown} == {False, True}
    clean = tabletop.demonstrations(8, 3)
    # The same starts and grips; what is played differs by the noise, in the grip's place alone.
    first = shown[0].action[0] - clean[0].action[0]
    assert 0.0 < np.abs(first[:3]).max() < 0.02
    np.testing.assert_array_equal(first[3:], 0.0)
    one = tabletop.demonstrations(4, 3, side=1)
    assert all(abs(episode.action[-1, 3]) > np.pi / 4 for episode in one)
    assert shown.chunks(16, 2).batch(jnp.zeros(1, jnp.int32))[1].shape == (1, 16, 5)


def test_noise_that_the_expert_cannot_bear_is_told():
    with pytest.raises(RunError, match="lower the noise"):
        tabletop.demonstrations(1, 0, noise=0.5)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: PickAndPlace("touch"), "obs_type 'touch'"),
        (lambda: make("pick-and-place", obs_type="touch"), "obs_type 'touch'"),
        (lambda: PickAndPlace(render_mode="human"), "render_mode is 'human'"),
        (lambda: PickAndPlace(tolerance=0.0), "tolerance is 0"),
        (lambda: PickAndPlace(observation_width=0), "observation_width is 0"),
        (lambda: PickAndPlace(visualization_height=900), "visualization_height is 900"),
        (lambda: PickAndPlace().reset(options={"colour": 1}), "option of reset 'colour'"),
        (lambda: PickAndPlace().reset(options={"cube": (0.0, 0.0)}), "cube's shape"),
        (lambda: PickAndPlace().reset(options={"target": (0.3, 0.0)}), "target is"),
        (lambda: PickAndPlace().step(np.zeros(4)), "action's shape"),
        (lambda: PickAndPlace().step(np.full(5, np.nan)), "action is"),
        (lambda: PickAndPlace().step("up"), "action is 'up'"),
        (lambda: PickAndPlace().render(), "render_mode is None"),
        (lambda: tabletop.make_pick_and_place(num_steps=0), "num_steps is 0"),
        (lambda: tabletop.demonstrations(0, 0), "episodes is 0"),
        (lambda: tabletop.demonstrations(1, -1), "seed is -1"),
        (lambda: tabletop.demonstrations(1, 0, noise=-0.1), "noise is -0.1"),
        (lambda: tabletop.demonstrations(1, 0, side=2), "side is 2"),
        (lambda: tabletop.demonstrations(1, 0, obs_type="touch"), "obs_type 'touch'"),
        (lambda: PickAndPlaceExpert(2), "side is 2"),
        (lambda: PickAndPlaceExpert(0, height=0.01), "height is 0.01"),
        (lambda: PickAndPlaceExpert(0)(np.zeros(13)), "state"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    # Shapes and kinds of arguments are refused by the type checker before the library sees them, where it is on.
    with pytest.raises((InputError, TypeError), match=argument):
        call()
