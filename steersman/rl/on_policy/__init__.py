"""On-policy methods: each batch of experience comes from the policy that it improves."""

from steersman.rl.on_policy.a2c import A2C
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.on_policy.fixpo import FixPO
from steersman.rl.on_policy.mbma import MBMA
from steersman.rl.on_policy.pdppo import PDPPO
from steersman.rl.on_policy.policy_gradient import PolicyGradient
from steersman.rl.on_policy.policy_gradients_guide import guide_algorithms, suite
from steersman.rl.on_policy.polyak_pg import PolyakPG
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.ppo_ewma import PPOEWMA, rescale_batch
from steersman.rl.on_policy.reinforce import REINFORCE
from steersman.rl.on_policy.s2pg import S2PG, EpisodicS2PG
from steersman.rl.on_policy.spo import SPO
from steersman.rl.on_policy.trpo import TRPO, SinglePath, trust_region_step
from steersman.rl.on_policy.truncated_bptt import TruncatedBPTT
from steersman.rl.on_policy.vine import Vine
from steersman.rl.on_policy.vmpo import VMPO

__all__ = [
    "A2C",
    "MBMA",
    "PDPPO",
    "PPO",
    "PPOEWMA",
    "REINFORCE",
    "S2PG",
    "SPO",
    "TRPO",
    "VMPO",
    "EpisodicS2PG",
    "FirstOrder",
    "FixPO",
    "PolicyGradient",
    "PolyakPG",
    "SinglePath",
    "TruncatedBPTT",
    "Vine",
    "guide_algorithms",
    "rescale_batch",
    "suite",
    "trust_region_step",
]
