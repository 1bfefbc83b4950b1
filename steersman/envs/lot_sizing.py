"""Stochastic lot-sizing: which machine makes which item, before demand is known."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from steersman.envs.post_decision import PostDecisionEnvironment
from steersman.errors import InputError, require, require_count, require_number


class LotSizingState(NamedTuple):
    """Stock, setups and the steps taken in this episode; before a decision or after it.

    Attributes:
        inventory: units of each item in stock ``[items]``.
        setup: what each machine is set up for ``[machines]``: 0 for nothing, ``i`` for item ``i``.
        time: steps taken.
    """

    inventory: Int[Array, " items"]
    setup: Int[Array, " machines"]
    time: Int[Array, ""]


class LotSizingParams(NamedTuple):
    """What may vary from copy to copy.

    Attributes:
        order_probability: chance that one of the possible orders for an item comes in.
        changeover_cost: of setting up a machine for another item.
        lost_sale_cost: per unit of demand that is not met.
        holding_cost: per unit in stock at the end of a step.
    """

    order_probability: Float[Array, ""]
    changeover_cost: Float[Array, ""]
    lost_sale_cost: Float[Array, ""]
    holding_cost: Float[Array, ""]


class LotSizing(PostDecisionEnvironment):
    """Machines produce to stock, and each of them makes one item at a time.

    The order of events is that of the discrete lot-sizing plant of Felizardo et al. (2025, arXiv:2504.05150). The
    decision sets every machine up for an item (or for nothing, 0), which costs and loses output where it changes the
    setup, and produces. Then chance: each item's demand is ``order_size`` times a binomial number of orders; what
    stock cannot serve is lost at a cost, what exceeds the capacity is thrown away, and what remains costs to hold.
    The reward is the negative of all costs; changeovers are certain, the rest is random.

    Demand arrives in orders, so that its spread can be varied without its mean: one order of four units has the mean
    of four orders of one unit, and twice the standard deviation.

    Observations are stocks in units of the capacity, then each machine's setup as a one-hot vector; the
    post-decision state is observed in the same way. A stock is at most the capacity before a decision, and more only
    between production and demand.

    Attributes:
        num_items: items.
        num_machines: machines. With one, an action is one number; with several, one number for each machine.
        capacity: units of an item that can be kept.
        rate: units that a machine makes in a step.
        changeover_loss: units that a machine does not make in a step in which it is set up anew.
        max_orders: orders for an item that a step can bring at most.
        order_size: units of an order.
        order_probability: see :class:`LotSizingParams`, also for the costs.
        num_steps: steps after which an episode is truncated.
    """

    num_items: int = eqx.field(static=True, default=2)
    num_machines: int = eqx.field(static=True, default=1)
    capacity: int = eqx.field(static=True, default=8)
    rate: int = eqx.field(static=True, default=3)
    changeover_loss: int = eqx.field(static=True, default=1)
    max_orders: int = eqx.field(static=True, default=4)
    order_size: int = eqx.field(static=True, default=1)
    order_probability: float = eqx.field(static=True, default=0.3)
    changeover_cost: float = eqx.field(static=True, default=1.0)
    lost_sale_cost: float = eqx.field(static=True, default=2.0)
    holding_cost: float = eqx.field(static=True, default=0.1)
    num_steps: int = eqx.field(static=True, default=50)

    def __check_init__(self) -> None:
        for name in ("num_items", "num_machines", "capacity", "rate", "max_orders", "order_size", "num_steps"):
            require_count(name, getattr(self, name))
        require_count("changeover_loss", self.changeover_loss, minimum=0)
        require(
            self.changeover_loss <= self.rate, "changeover_loss", self.changeover_loss, f"at most rate = {self.rate}"
        )
        require_number("order_probability", self.order_probability, at_least=0.0, at_most=1.0)
        for name in ("changeover_cost", "lost_sale_cost", "holding_cost"):
            require_number(name, getattr(self, name), at_least=0.0)

    @property
    def name(self) -> str:
        return "lot-sizing"

    @property
    def default_params(self) -> LotSizingParams:
        numbers = (self.order_probability, self.changeover_cost, self.lost_sale_cost, self.holding_cost)
        return LotSizingParams(*(jnp.asarray(number, float) for number in numbers))

    # ---- the two half-steps

    def post_decision(
        self, state: LotSizingState, action: Int[Array, "*machines"], params: LotSizingParams
    ) -> tuple[LotSizingState, Float[Array, ""]]:
        """Setups and production; the reward is the cost of changeovers, negative.

        Raises:
            InputError: an action outside ``0 .. num_items`` that can be looked at (under ``jit`` none can).
        """
        setup = self._as_setup(action)
        changed = (setup > 0) & (setup != state.setup)
        made = jnp.where(setup > 0, self.rate - self.changeover_loss * changed, 0)
        of_item = setup[:, None] == jnp.arange(1, self.num_items + 1)
        inventory = state.inventory + jnp.sum(of_item * made[:, None], axis=0)
        reward = -params.changeover_cost * jnp.sum(changed)
        return LotSizingState(inventory.astype(jnp.int32), setup, state.time), reward

    def exogenous(
        self, key: Key[Array, ""], post_state: LotSizingState, params: LotSizingParams
    ) -> tuple[LotSizingState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        orders = jax.random.bernoulli(key, params.order_probability, (self.num_items, self.max_orders))
        demand = self.order_size * jnp.sum(orders, axis=1)
        following, reward = self.respond(post_state, demand, params)
        return following, reward, jnp.asarray(False), {}

    def respond(
        self, post_state: LotSizingState, demand: Int[Array, " items"], params: LotSizingParams
    ) -> tuple[LotSizingState, Float[Array, ""]]:
        """Sales, losses and stock under a given demand: ``(state, reward)``."""
        lost = jnp.sum(jnp.maximum(demand - post_state.inventory, 0))
        inventory = jnp.clip(post_state.inventory - demand, 0, self.capacity)
        reward = -params.lost_sale_cost * lost - params.holding_cost * jnp.sum(inventory)
        return LotSizingState(inventory.astype(jnp.int32), post_state.setup, post_state.time + 1), reward

    def _as_setup(self, action: Any) -> Int[Array, " machines"]:
        setup = jnp.atleast_1d(jnp.asarray(action))
        require(setup.shape == (self.num_machines,), "action's shape", setup.shape, f"{(self.num_machines,)}, one each")
        if not isinstance(setup, Tracer):
            numbers = np.asarray(setup)
            bad = np.flatnonzero((numbers < 0) | (numbers > self.num_items))
            if bad.size:
                raise InputError(
                    f"action of machine {bad[0] + 1} is {numbers[bad[0]]}, but it must be 0 (idle) or the number of an "
                    f"item, at most {self.num_items}."
                )
        return setup.astype(jnp.int32)

    # ---- the rest of the contract

    def observe(self, state: LotSizingState, params: LotSizingParams) -> Float[Array, " features"]:
        del params
        stock = state.inventory.astype(float) / self.capacity
        return jnp.concatenate([stock, jax.nn.one_hot(state.setup, self.num_items + 1, dtype=stock.dtype).ravel()])

    def reset_env(self, key: Key[Array, ""], params: LotSizingParams) -> tuple[Array, LotSizingState]:
        stock_key, setup_key = jax.random.split(key)
        inventory = jax.random.randint(stock_key, (self.num_items,), 0, self.capacity + 1)
        setup = jax.random.randint(setup_key, (self.num_machines,), 1, self.num_items + 1)
        state = LotSizingState(inventory, setup, jnp.zeros((), jnp.int32))
        return self.observe(state, params), state

    def is_truncated(self, state: LotSizingState, params: LotSizingParams) -> Bool[Array, ""]:
        del params
        return state.time >= self.num_steps

    def observation_space(self, params: LotSizingParams) -> spaces.Box:
        del params
        most = 1.0 + self.num_machines * self.rate / self.capacity  # between production and demand
        high = np.ones(self.num_items + self.num_machines * (self.num_items + 1), np.float32)
        high[: self.num_items] = most
        return spaces.Box(np.zeros_like(high), high, dtype=np.float32)

    def action_space(self, params: LotSizingParams) -> gymnasium.Space:
        del params
        if self.num_machines == 1:
            return spaces.Discrete(self.num_items + 1)
        return spaces.MultiDiscrete([self.num_items + 1] * self.num_machines)

    # ---- what exact methods and callers with a state of their own need

    def state(self, inventory: Any, setup: Any, time: int = 0) -> LotSizingState:
        """The state with this stock and these setups.

        Args:
            inventory: units of each item ``[items]``, whole numbers from 0 to the capacity.
            setup: what each machine is set up for ``[machines]`` (or one number for one machine).
            time: steps taken.

        Raises:
            InputError: a stock or a setup is negative, too large or not a whole number, or there is one too many.
        """
        require_count("time", time, minimum=0)
        parts: list[Array] = []
        for argument, value, count, most in (
            ("inventory", inventory, self.num_items, self.capacity),
            ("setup", setup, self.num_machines, self.num_items),
        ):
            numbers = np.atleast_1d(np.asarray(value))
            require(numbers.shape == (count,), f"{argument}'s shape", numbers.shape, f"({count},)")
            whole = np.issubdtype(numbers.dtype, np.number) and bool(np.all(numbers == np.floor(numbers)))
            good = whole and bool(np.all((numbers >= 0) & (numbers <= most)))
            require(good, argument, numbers.tolist(), f"whole numbers from 0 to {most}")
            parts.append(jnp.asarray(numbers, jnp.int32))
        return LotSizingState(parts[0], parts[1], jnp.asarray(time, jnp.int32))

    def states(self) -> LotSizingState:
        """Every state before a decision, leaves ``[S, ...]``: stocks in the outer order, setups in the inner."""
        stocks = itertools.product(range(self.capacity + 1), repeat=self.num_items)
        setups = list(itertools.product(range(self.num_items + 1), repeat=self.num_machines))
        rows = [(*stock, *setup) for stock in stocks for setup in setups]
        table = np.asarray(rows, np.int32)
        inventory, setup = table[:, : self.num_items], table[:, self.num_items :]
        return LotSizingState(jnp.asarray(inventory), jnp.asarray(setup), jnp.zeros(len(table), jnp.int32))

    def outcomes(self, params: LotSizingParams) -> tuple[Int[Array, "W items"], Float[np.ndarray, " W"]]:
        """Every demand that a step can bring, and its probability in double precision."""
        p, most = float(params.order_probability), self.max_orders
        binomial = np.asarray([math.comb(most, k) * p**k * (1.0 - p) ** (most - k) for k in range(most + 1)])
        orders = np.asarray(list(itertools.product(range(most + 1), repeat=self.num_items)))
        each = binomial[orders]
        return jnp.asarray(self.order_size * orders, jnp.int32), np.prod(each, axis=1)


def lumpy_lot_sizing(num_items: int = 4, num_machines: int = 2, **options: Any) -> LotSizing:
    """The harder instance: several machines, and demand of the same mean with twice the standard deviation.

    Each item's orders come as one of four units instead of four of one.
    """
    return LotSizing(num_items, num_machines, **{"max_orders": 1, "order_size": 4, **options})
