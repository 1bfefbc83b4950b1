"""A mass whose noisy position is seen and whose velocity is not: the smallest problem that asks for a memory."""

from __future__ import annotations

from steersman.envs.linear_gaussian import LinearGaussianProblem
from steersman.errors import require_number


class HiddenVelocity(LinearGaussianProblem):
    """Hold a mass at the origin, seeing its position through noise and never its velocity.

    ``position' = position + 0.1 velocity + w1``, ``velocity' = 0.98 velocity + 0.1 acceleration + w2``; the cost of a
    step is ``position^2 + 0.05 velocity^2 + 0.01 acceleration^2``. Positions start with a standard deviation of 1,
    velocities of 0.5. Feedback of the observation alone leaves the mass swinging; every controller that does well
    estimates the velocity. At a discount of 0.98 the least expected cost is 6.25 with the state seen, 7.68 with the
    observations, and 32 without a memory.
    """

    def __init__(
        self,
        position_noise: float = 0.01,
        velocity_noise: float = 0.1,
        sensor_noise: float = 0.1,
        horizon: int = 100,
        privileged: bool = False,
    ):
        """Sets the standard deviations; the rest is as the class says.

        Args:
            position_noise: of ``w1``, in m.
            velocity_noise: of ``w2``, in m/s.
            sensor_noise: of the observed position, in m.
            horizon: steps of one task, of 0.1 s each.
            privileged: whether the observation goes on with the true position and velocity, for critics alone.
        """
        require_number("position_noise", position_noise, at_least=0.0)
        require_number("velocity_noise", velocity_noise, at_least=0.0)
        require_number("sensor_noise", sensor_noise, at_least=0.0)
        super().__init__(
            A=[[1.0, 0.1], [0.0, 0.98]],
            B=[[0.0], [0.1]],
            C=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]] if privileged else [[1.0, 0.0]],
            Q=[[1.0, 0.0], [0.0, 0.05]],
            R=[[0.01]],
            process_noise=[position_noise, velocity_noise],
            measurement_noise=[[sensor_noise], [0.0], [0.0]] if privileged else [sensor_noise],
            initial_spread=[1.0, 0.5],
            states=("position", "velocity"),
            controls=("acceleration",),
            title="hidden-velocity",
            sample_time=0.1,
            horizon=horizon,
        )

    @property
    def state_units(self) -> tuple[str, ...]:
        return ("m", "m/s")

    @property
    def control_units(self) -> tuple[str, ...]:
        return ("m/s^2",)
