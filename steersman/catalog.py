"""The list of systems: what each is, where it comes from, and how it is run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import InputError, unknown_name


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: its name on the command line.
        title: title of the paper.
        authors: its authors.
        year: year of publication.
        family: the room that it lives in.
        use: one line on when to use it.
        entry_point: dotted path of its algorithm or main function.
        study: dotted path of the study that checks the paper's claim.
        bibtex: the entry that :func:`cite` prints.
        presets: hyperparameters that suit a known environment, by name; ``"mujoco"`` holds for all of Gymnasium's
            MuJoCo tasks. The entry ``steps`` is how long to train there.
    """

    slug: str
    title: str
    authors: str
    year: int
    family: str
    use: str
    entry_point: str
    study: str
    bibtex: str
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> Any:
        """The algorithm class or function behind the entry point."""
        module, _, name = self.entry_point.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def load_study(self) -> Any:
        """The study's module."""
        return importlib.import_module(self.study)

    def preset(self, environment: str) -> dict[str, Any]:
        """Hyperparameters for an environment: its own, or those of its simulator, or ``"*"``, or none."""
        for name in (environment.partition(":")[2], environment, _simulator(environment), "*"):
            if name in self.presets:
                return dict(self.presets[name])
        return {}


def _simulator(environment: str) -> str:
    """``"mujoco"`` for one of Gymnasium's MuJoCo tasks, else an empty string."""
    import gymnasium

    spec = gymnasium.registry.get(environment.partition(":")[2] or environment)
    return "mujoco" if spec is not None and "envs.mujoco" in str(spec.entry_point) else ""


def _bibtex(kind: str, key: str, **entries: str) -> str:
    lines = [f"  {name} = {{{value}}}" for name, value in entries.items()]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


# Settings for well-known tasks. Classic control wants large steps and short batches; MuJoCo's locomotion wants what
# the paper used (Schulman et al., 2017, table 3), with observation and reward normalization.
_CARTPOLE = {
    "num_envs": 16,
    "num_steps": 128,
    "epochs": 10,
    "minibatches": 8,
    "learning_rate": "linear:1e-3:1e-4:300000",
    "steps": 300_000,
}
_PENDULUM = {
    "num_envs": 16,
    "num_steps": 128,
    "epochs": 10,
    "minibatches": 8,
    "gamma": 0.95,
    "reward_scale": 0.1,
    "initial_log_std": -0.5,
    "learning_rate": "linear:1e-3:0:400000",
    "steps": 400_000,
}
_LOCOMOTION = {
    "num_envs": 8,
    "num_steps": 256,
    "epochs": 10,
    "minibatches": 32,
    "learning_rate": "linear:3e-4:0:1000000",
    "normalize_observations": True,
    "normalize_rewards": True,
    "steps": 1_000_000,
}
_LOT_SIZING = {
    "num_envs": 8,
    "num_steps": 50,
    "epochs": 20,
    "minibatches": 1,
    "gamma": 0.97,
    "entropy_coefficient": 0.01,
    "max_gradient_norm": 1.0,
    "learning_rate": 1e-3,
    "steps": 60_000,
}
_TRUST_REGION_CARTPOLE = {"num_envs": 16, "num_steps": 128, "steps": 300_000}
_TRUST_REGION_PENDULUM = {
    "num_envs": 16,
    "num_steps": 128,
    "gamma": 0.95,
    "reward_scale": 0.1,
    "initial_log_std": -0.5,
    "steps": 600_000,
}
_TRUST_REGION = {
    "CartPole-v1": _TRUST_REGION_CARTPOLE,
    "cartpole-discrete": _TRUST_REGION_CARTPOLE,
    "Pendulum-v1": _TRUST_REGION_PENDULUM,
    "pendulum-swingup": _TRUST_REGION_PENDULUM,
    "mujoco": {
        "num_envs": 8,
        "num_steps": 256,
        "normalize_observations": True,
        "normalize_rewards": True,
        "steps": 1_000_000,
    },
}
_FIRST_ORDER = {
    "CartPole-v1": _CARTPOLE,
    "cartpole-discrete": _CARTPOLE,
    "Pendulum-v1": _PENDULUM,
    "pendulum-swingup": _PENDULUM,
    "lot-sizing": _LOT_SIZING,
    "mujoco": _LOCOMOTION,
}

# Reaching zero is for methods without a fix-up; the bounds are those of the study.
_BOUNDED = {
    name: {
        **preset,
        "learning_rate": str(preset["learning_rate"]).replace(":0:", ":1e-5:"),
        "surrogate.bound": 0.5,
        "surrogate.beta_learning_rate": 0.1,
    }
    for name, preset in _FIRST_ORDER.items()
}

_SMALL_MODEL = {
    "alternatives.capacity": 65_536,
    "alternatives.learner.hidden": (64, 64),
    "alternatives.learner.activation": "relu",
    "alternatives.learner.epochs": 2,
    "alternatives.learner.batches": 40,
}
_WITH_MODEL = {
    name: {**preset, **_SMALL_MODEL}
    for name, preset in _FIRST_ORDER.items()
    if name in ("Pendulum-v1", "pendulum-swingup")
} | {"mujoco": _LOCOMOTION}


def _averaged(preset: dict[str, Any]) -> dict[str, Any]:
    """A first-order preset for an averaged proximal policy that is one batch's gradient steps old in the mean."""
    steps = preset["epochs"] * preset["minibatches"]
    return {**preset, "reference.decay": steps / (steps + 1)}


_AVERAGED = {name: _averaged(preset) for name, preset in _FIRST_ORDER.items()}

_SYSTEMS = [
    System(
        slug="ppo",
        title="Proximal Policy Optimization Algorithms",
        authors="Schulman, Wolski, Dhariwal, Radford, Klimov",
        year=2017,
        family="rl/on_policy",
        use="The default on-policy learner: first-order, forgiving, any network and action space.",
        entry_point="steersman.rl.on_policy.ppo.PPO",
        study="steersman.studies.ppo",
        bibtex=_bibtex(
            "article",
            "schulman2017ppo",
            title="Proximal Policy Optimization Algorithms",
            author="Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg",
            journal="arXiv preprint arXiv:1707.06347",
            year="2017",
        ),
        presets=_FIRST_ORDER,
    ),
    System(
        slug="trpo",
        title="Trust Region Policy Optimization",
        authors="Schulman, Levine, Moritz, Jordan, Abbeel",
        year=2015,
        family="rl/on_policy",
        use="A hard, audited bound on every update with one number to choose, and almost no tuning.",
        entry_point="steersman.rl.on_policy.trpo.TRPO",
        study="steersman.studies.trpo",
        bibtex=_bibtex(
            "inproceedings",
            "schulman2015trpo",
            title="Trust Region Policy Optimization",
            author="Schulman, John and Levine, Sergey and Moritz, Philipp and Jordan, Michael and Abbeel, Pieter",
            booktitle="Proceedings of the 32nd International Conference on Machine Learning",
            pages="1889--1897",
            year="2015",
        ),
        presets=_TRUST_REGION,
    ),
    System(
        slug="spo",
        title="Simple Policy Optimization",
        authors="Xie, Zhang, Yang, Hutter, Xu",
        year=2025,
        family="rl/on_policy",
        use="PPO's loop with one line changed: ratios are pulled back, which deep networks and many epochs need.",
        entry_point="steersman.rl.on_policy.spo.SPO",
        study="steersman.studies.spo",
        bibtex=_bibtex(
            "inproceedings",
            "xie2025spo",
            title="Simple Policy Optimization",
            author="Xie, Zhengpeng and Zhang, Qiang and Yang, Fan and Hutter, Marco and Xu, Renjing",
            booktitle="Proceedings of the 42nd International Conference on Machine Learning",
            year="2025",
        ),
        presets=_FIRST_ORDER,
    ),
    System(
        slug="fixpo",
        title="Guaranteed Trust Region Optimization via Two-Phase KL Penalization",
        authors="Zentner, Puri, Huang, Sukhatme",
        year=2023,
        family="rl/on_policy",
        use="A bound on the divergence at every state of every update, first-order: no Fisher products, any policy.",
        entry_point="steersman.rl.on_policy.fixpo.FixPO",
        study="steersman.studies.fixpo",
        bibtex=_bibtex(
            "article",
            "zentner2023fixpo",
            title="Guaranteed Trust Region Optimization via Two-Phase {KL} Penalization",
            author="Zentner, K. R. and Puri, Ujjwal and Huang, Zhehui and Sukhatme, Gaurav S.",
            journal="arXiv preprint arXiv:2312.05405",
            year="2023",
        ),
        presets=_BOUNDED,
    ),
    System(
        slug="ppo-ewma",
        title="Batch size-invariance for policy optimization",
        authors="Hilton, Cobbe, Schulman",
        year=2022,
        family="rl/on_policy",
        use="PPO for data that come late, or for batches whose size must change: measured from an averaged policy.",
        entry_point="steersman.rl.on_policy.ppo_ewma.PPOEWMA",
        study="steersman.studies.ppo_ewma",
        bibtex=_bibtex(
            "inproceedings",
            "hilton2022batch",
            title="Batch size-invariance for policy optimization",
            author="Hilton, Jacob and Cobbe, Karl and Schulman, John",
            booktitle="Advances in Neural Information Processing Systems 35",
            year="2022",
        ),
        presets=_AVERAGED,
    ),
    System(
        slug="policy-gradients-guide",
        title="The Definitive Guide to Policy Gradients in Deep Reinforcement Learning: Theory, Algorithms and "
        "Implementations",
        authors="Lehmann",
        year=2024,
        family="rl/on_policy",
        use="REINFORCE, A2C, TRPO, PPO and V-MPO on equal footing; by this name, V-MPO: no ratios, soft bounds on KL.",
        entry_point="steersman.rl.on_policy.vmpo.VMPO",
        study="steersman.studies.policy_gradients_guide",
        bibtex=_bibtex(
            "article",
            "lehmann2024guide",
            title="The Definitive Guide to Policy Gradients in Deep Reinforcement Learning: Theory, Algorithms and "
            "Implementations",
            author="Lehmann, Matthias",
            journal="arXiv preprint arXiv:2401.13662",
            year="2024",
        ),
        presets=_FIRST_ORDER,
    ),
    System(
        slug="pdppo",
        title="A Reinforcement Learning Method for Environments with Stochastic Variables: Post-Decision Proximal "
        "Policy Optimization with Dual Critic Networks",
        authors="Felizardo, Fadda, Brandimarte, Del-Moral-Hernandez, Nascimento",
        year=2025,
        family="rl/on_policy",
        use="Steps that split into a known decision and random noise: a second critic between the two.",
        entry_point="steersman.rl.on_policy.pdppo.PDPPO",
        study="steersman.studies.pdppo",
        bibtex=_bibtex(
            "article",
            "felizardo2025pdppo",
            title="A Reinforcement Learning Method for Environments with Stochastic Variables: Post-Decision Proximal "
            "Policy Optimization with Dual Critic Networks",
            author="Felizardo, Leonardo Kanashiro and Fadda, Edoardo and Brandimarte, Paolo and Del-Moral-Hernandez, "
            r"Emilio and Nascimento, Mari{\'a} Cristina Vasconcelos",
            journal="arXiv preprint arXiv:2504.05150",
            year="2025",
        ),
        presets={"lot-sizing": _LOT_SIZING},
    ),
    System(
        slug="polyak-pg",
        title="Enhancing Policy Gradient with the Polyak Step-Size Adaption",
        authors="Li, Yuan, Fan, Schmidt, Horváth, Gower, Takáč",
        year=2024,
        family="rl/on_policy",
        use="Episodic policy gradient without a learning rate: the step follows from value, target and gradient norm.",
        entry_point="steersman.rl.on_policy.polyak_pg.PolyakPG",
        study="steersman.studies.polyak_pg",
        bibtex=_bibtex(
            "article",
            "li2024polyakpg",
            title="Enhancing Policy Gradient with the Polyak Step-Size Adaption",
            author="Li, Yunxiang and Yuan, Rui and Fan, Chen and Schmidt, Mark and Horv{\\'a}th, Samuel and "
            "Gower, Robert M. and Tak{\\'a}{\\v{c}}, Martin",
            journal="arXiv preprint arXiv:2404.07525",
            year="2024",
        ),
        # Steps count all of horizon for each episode of both copies.
        presets={
            "CartPole-v1": {"horizon": 500, "steps": 2_000_000},
            "cartpole-discrete": {"hidden": (), "horizon": 200, "steps": 500_000},
            "Acrobot-v1": {"horizon": 500, "steps": 2_000_000},
        },
    ),
    System(
        slug="mbma",
        title="On Many-Actions Policy Gradient",
        authors="Nauman, Cygan",
        year=2023,
        family="rl/on_policy",
        use="PPO with more actions at each visited state, scored by a learned model, where environment steps are dear.",
        entry_point="steersman.rl.on_policy.mbma.MBMA",
        study="steersman.studies.mbma",
        bibtex=_bibtex(
            "inproceedings",
            "nauman2023many",
            title="On Many-Actions Policy Gradient",
            author="Nauman, Michal and Cygan, Marek",
            booktitle="Proceedings of the 40th International Conference on Machine Learning",
            year="2023",
        ),
        presets=_WITH_MODEL,
    ),
    System(
        slug="s2pg",
        title="Time-Efficient Reinforcement Learning with Stochastic Stateful Policies",
        authors="Al-Hafez, Zhao, Peters, Tateo",
        year=2024,
        family="rl/on_policy",
        use="Policies with memory, trained without backpropagation through time: the next memory is sampled.",
        entry_point="steersman.rl.on_policy.s2pg.S2PG",
        study="steersman.studies.s2pg",
        bibtex=_bibtex(
            "inproceedings",
            "alhafez2024s2pg",
            title="Time-Efficient Reinforcement Learning with Stochastic Stateful Policies",
            author="Al-Hafez, Firas and Zhao, Guoping and Peters, Jan and Tateo, Davide",
            booktitle="The Twelfth International Conference on Learning Representations",
            year="2024",
        ),
        presets=_FIRST_ORDER,
    ),
    System(
        slug="gpc",
        title="Compose Your Policies! Improving Diffusion-based or Flow-based Robot Policies via Test-time "
        "Distribution-level Composition",
        authors="Cao, Huang, Guo, Zhang, Nan, Mai, Wang, Cheng, Sun, Han, Zhao, Zhang, Guo, Zheng, Song, Li, Luo, Luo",
        year=2026,
        family="diffusion",
        use="Several trained diffusion or flow policies as one that beats each, without training.",
        entry_point="steersman.diffusion.gpc.compose",
        study="steersman.studies.gpc",
        bibtex=_bibtex(
            "inproceedings",
            "cao2026gpc",
            title="Compose Your Policies! Improving Diffusion-based or Flow-based Robot Policies via Test-time "
            "Distribution-level Composition",
            author="Cao, Jiahang and Huang, Yize and Guo, Hanzhong and Zhang, Rui and Nan, Mu and Mai, Weijian "
            "and Wang, Jiaxu and Cheng, Hao and Sun, Jingkai and Han, Gang and Zhao, Wen and Zhang, Qiang and "
            "Guo, Yijie and Zheng, Qihao and Song, Chunfeng and Li, Xiao and Luo, Ping and Luo, Andrew F.",
            booktitle="International Conference on Learning Representations",
            year="2026",
            note="arXiv:2510.01068",
        ),
    ),
    System(
        slug="mcdp",
        title="Modality-Composable Diffusion Policy via Inference-Time Distribution-level Composition",
        authors="Cao, Zhang, Guo, Wang, Cheng, Xu",
        year=2025,
        family="diffusion",
        use="Policies of single sensors (camera, point cloud) as one, with fixed weights and no training.",
        entry_point="steersman.diffusion.mcdp.compose_modalities",
        study="steersman.studies.mcdp",
        bibtex=_bibtex(
            "article",
            "cao2025mcdp",
            title="Modality-Composable Diffusion Policy via Inference-Time Distribution-level Composition",
            author="Cao, Jiahang and Zhang, Qiang and Guo, Hanzhong and Wang, Jiaxu and Cheng, Hao and Xu, Renjing",
            journal="arXiv preprint arXiv:2503.12466",
            year="2025",
        ),
    ),
    System(
        slug="dppo",
        title="Diffusion Policy Policy Optimization",
        authors="Ren, Lidard, Ankile, Simeonov, Agrawal, Majumdar, Burchfiel, Dai, Simchowitz",
        year=2025,
        family="diffusion",
        use="Fine-tuning a cloned diffusion policy on any reward, sparse ones too, through its own denoising steps.",
        entry_point="steersman.diffusion.dppo.DPPO",
        study="steersman.studies.dppo",
        bibtex=_bibtex(
            "inproceedings",
            "ren2025dppo",
            title="Diffusion Policy Policy Optimization",
            author="Ren, Allen Z. and Lidard, Justin and Ankile, Lars L. and Simeonov, Anthony and Agrawal, "
            "Pulkit and Majumdar, Anirudha and Burchfiel, Benjamin and Dai, Hongkai and Simchowitz, Max",
            booktitle="International Conference on Learning Representations",
            year="2025",
        ),
    ),
    System(
        slug="fpo",
        title="Flow Matching Policy Gradients",
        authors="McAllister, Ge, Yi, Kim, Weber, Choi, Feng, Kanazawa",
        year=2025,
        family="diffusion",
        use="Flow policies trained on-policy without likelihoods, for optima with several modes; the sampler "
        "stays free.",
        entry_point="steersman.diffusion.fpo.FPO",
        study="steersman.studies.fpo",
        bibtex=_bibtex(
            "article",
            "mcallister2025flow",
            title="Flow Matching Policy Gradients",
            author="McAllister, David and Ge, Songwei and Yi, Brent and Kim, Chung Min and Weber, Ethan and Choi, "
            "Hongsuk and Feng, Haiwen and Kanazawa, Angjoo",
            journal="arXiv preprint arXiv:2507.21053",
            year="2025",
        ),
    ),
    System(
        slug="gorl",
        title="GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative Policies",
        authors="Zhang, Wan, Chen, Yu, Tsang, An",
        year=2025,
        family="diffusion",
        use="An expressive policy from a stock algorithm: it learns a decoder's latent vectors, the decoder is "
        "refitted.",
        entry_point="steersman.diffusion.gorl.StageLoop",
        study="steersman.studies.gorl",
        bibtex=_bibtex(
            "article",
            "zhang2025gorl",
            title="{GoRL}: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative Policies",
            author="Zhang, Chubin and Wan, Zhenglin and Chen, Feng and Yu, Xingrui and Tsang, Ivor and An, Bo",
            journal="arXiv preprint arXiv:2512.02581",
            year="2025",
        ),
    ),
    System(
        slug="onedp",
        title="One-Step Diffusion Policy: Fast Visuomotor Policies via Diffusion Distillation",
        authors="Wang, Li, Mandlekar, Xu, Fan, Narang, Fan, Zhu, Balaji, Zhou, Liu, Zeng",
        year=2025,
        family="diffusion",
        use="A trained diffusion policy distilled into one network call, from observations alone.",
        entry_point="steersman.diffusion.onedp.OneDP",
        study="steersman.studies.onedp",
        bibtex=_bibtex(
            "inproceedings",
            "wang2025onedp",
            title="One-Step Diffusion Policy: Fast Visuomotor Policies via Diffusion Distillation",
            author="Wang, Zhendong and Li, Zhaoshuo and Mandlekar, Ajay and Xu, Zhenjia and Fan, Jiaojiao and Narang, "
            "Yashraj and Fan, Linxi and Zhu, Yuke and Balaji, Yogesh and Zhou, Mingyuan and Liu, Ming-Yu and Zeng, Yu",
            booktitle="International Conference on Machine Learning",
            year="2025",
        ),
    ),
    System(
        slug="rti-dp",
        title="Real-Time Iteration Scheme for Diffusion Policy",
        authors="Duan, Yin, Kragic",
        year=2025,
        family="diffusion",
        use="A trained diffusion policy plans anew at every step for three network calls, from its last chunk.",
        entry_point="steersman.diffusion.rti_dp.RealTimeIteration",
        study="steersman.studies.rti_dp",
        bibtex=_bibtex(
            "inproceedings",
            "duan2025rtidp",
            title="Real-Time Iteration Scheme for Diffusion Policy",
            author="Duan, Yufei and Yin, Hang and Kragic, Danica",
            booktitle="IEEE/RSJ International Conference on Intelligent Robots and Systems",
            year="2025",
        ),
    ),
    System(
        slug="sgac",
        title="Improving Generative Behavior Cloning via Self-Guidance and Adaptive Chunking",
        authors="So, Lee, Lee, Ok, Park",
        year=2025,
        family="diffusion",
        use="A frozen generative policy in a scene that moves: anticipates, and keeps a plan while it is good.",
        entry_point="steersman.diffusion.sgac.SelfGuidedPolicy",
        study="steersman.studies.sgac",
        bibtex=_bibtex(
            "inproceedings",
            "so2025sgac",
            title="Improving Generative Behavior Cloning via Self-Guidance and Adaptive Chunking",
            author="So, Junhyuk and Lee, Chiwoong and Lee, Shinyoung and Ok, Jungseul and Park, Eunhyeok",
            booktitle="Advances in Neural Information Processing Systems 38",
            year="2025",
        ),
    ),
    System(
        slug="rl-100",
        title="RL-100: Performant Robotic Manipulation with Real-World Reinforcement Learning",
        authors="Lei, Li, Yu, Wei, Guo, Jiang, Wang, Liang, Xu",
        year=2025,
        family="diffusion",
        use="A cloned diffusion policy improved offline, then online, then distilled into one network call.",
        entry_point="steersman.diffusion.rl_100.RL100",
        study="steersman.studies.rl_100",
        bibtex=_bibtex(
            "article",
            "lei2025rl100",
            title="RL-100: Performant Robotic Manipulation with Real-World Reinforcement Learning",
            author="Lei, Kun and Li, Huanyu and Yu, Dongjie and Wei, Zhenyu and Guo, Lingxiao and Jiang, Zhennan and "
            "Wang, Ziyu and Liang, Shiyu and Xu, Huazhe",
            journal="arXiv preprint arXiv:2510.14830",
            year="2025",
        ),
    ),
    System(
        slug="hmpc",
        title="Harmonic model predictive control for tracking sinusoidal references and its application to trajectory "
        "tracking",
        authors="Krupa, Limon, Bemporad, Alamo",
        year=2023,
        family="control",
        use="Linear MPC with a tiny horizon that tracks sinusoids, and anything else through local fits.",
        entry_point="steersman.control.hmpc.HMPC",
        study="steersman.studies.hmpc",
        bibtex=_bibtex(
            "article",
            "krupa2023hmpc",
            title="Harmonic model predictive control for tracking sinusoidal references and its application to "
            "trajectory tracking",
            author="Krupa, Pablo and Limon, Daniel and Bemporad, Alberto and Alamo, Teodoro",
            journal="arXiv preprint arXiv:2310.16723",
            year="2023",
        ),
    ),
    System(
        slug="learned-locally-linear",
        title="The Power of Learned Locally Linear Models for Nonlinear Policy Optimization",
        authors="Pfrommer, Simchowitz, Westenbroek, Matni, Tu",
        year=2023,
        family="control",
        use="A trajectory with gains for an unknown, unstable system, from rollouts around it alone.",
        entry_point="steersman.control.learned_locally_linear.LearnedLocallyLinear",
        study="steersman.studies.learned_locally_linear",
        bibtex=_bibtex(
            "inproceedings",
            "pfrommer2023locally",
            title="The Power of Learned Locally Linear Models for Nonlinear Policy Optimization",
            author="Pfrommer, Daniel and Simchowitz, Max and Westenbroek, Tyler and Matni, Nikolai and Tu, Stephen",
            booktitle="International Conference on Machine Learning",
            year="2023",
            note="arXiv:2305.09619",
        ),
    ),
    System(
        slug="gradient-planning",
        title="Gradient-based Planning with World Models",
        authors="S V, Jalagam, LeCun, Sobal",
        year=2023,
        family="control",
        use="Plans by descent through a differentiable or learned model, from the last plan or from a policy's.",
        entry_point="steersman.control.gradient_planning.GradientPlanner",
        study="steersman.studies.gradient_planning",
        bibtex=_bibtex(
            "article",
            "jyothir2023gradient",
            title="Gradient-based Planning with World Models",
            author="S V, Jyothir and Jalagam, Siddhartha and LeCun, Yann and Sobal, Vlad",
            journal="arXiv preprint arXiv:2312.17227",
            year="2023",
        ),
    ),
    System(
        slug="stochastic-mpc",
        title="On stochastic MPC formulations with closed-loop guarantees: Analysis and a unifying framework",
        authors="Koehler, Geuss, Zeilinger",
        year=2023,
        family="control",
        use="Linear MPC under bounded noise whose bounds hold with a probability: given every state, or over runs.",
        entry_point="steersman.control.stochastic_mpc.StochasticMPC",
        study="steersman.studies.stochastic_mpc",
        bibtex=_bibtex(
            "inproceedings",
            "koehler2023stochastic",
            title="On stochastic MPC formulations with closed-loop guarantees: Analysis and a unifying framework",
            author='K{\\"o}hler, Johannes and Geuss, Ferdinand and Zeilinger, Melanie N.',
            booktitle="IEEE Conference on Decision and Control",
            year="2023",
            note="arXiv:2304.00069",
        ),
    ),
]

_BY_SLUG = {system.slug: system for system in _SYSTEMS}


def systems(family: str | None = None) -> list[System]:
    """All systems, or those of one family.

    Raises:
        InputError: nothing belongs to that family.
    """
    if family is None:
        return list(_SYSTEMS)
    families = {system.family for system in _SYSTEMS}
    found = [system for system in _SYSTEMS if system.family == family or system.family.split("/")[0] == family]
    if not found:
        raise unknown_name("family", family, families)
    return found


def get(slug: str) -> System:
    """The system with this slug.

    Raises:
        InputError: there is none, with the nearest slugs.
    """
    if slug not in _BY_SLUG:
        raise unknown_name("system", slug, _BY_SLUG)
    return _BY_SLUG[slug]


def cite(*slugs: str) -> str:
    """BibTeX of the systems named."""
    if not slugs:
        raise InputError("slugs is empty, but cite needs at least one system.")
    return "\n\n".join(get(slug).bibtex for slug in slugs)
