"""On-policy methods: each batch of experience comes from the policy that it improves."""

from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.spo import SPO

__all__ = ["PPO", "SPO"]
