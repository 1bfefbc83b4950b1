"""On-policy methods: each batch of experience comes from the policy that it improves."""

from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.spo import SPO
from steersman.rl.on_policy.trpo import TRPO, SinglePath, trust_region_step
from steersman.rl.on_policy.vine import Vine

__all__ = ["PPO", "SPO", "TRPO", "FirstOrder", "SinglePath", "Vine", "trust_region_step"]
