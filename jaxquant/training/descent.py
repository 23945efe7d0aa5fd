"""Descent: how latent weights train by derivatives, AdamW and its remedies."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxquant.estimators.kurtosis import flattened
from jaxquant.training import stability
from jaxquant.training.latent import OTHER, RANGE, SCALE, WEIGHT, trained
from jaxquant.training.optimizers import optimizer, relative
from jaxquant.tuning.trainable import Opened
from jaxquant.tuning.trainer import Healing, Loss, Rule


@dataclasses.dataclass(frozen=True)
class QAT(Healing):
    """How to train latent weights: AdamW with a warm-up, then a cosine to zero.

    Attributes:
      learning_rate: of weights, at its highest.
      in_steps: this rate is in steps, distances of two codes, the mean of a matrix: one rate then
        serves all layers and bits. Of integers and tables.
      scale_rate, range_rate: of learned scales and of learned ranges of inputs, relative to their
        size. 0: these stay.
      also: globs of leaves that are not quantized and train too ("*norm*"). other_rate: of these.
      weight_decay: of weights alone.
      clip: the largest norm of a gradient, of weights, scales, ... each by itself; 0: any.
      dampening: factor of `stability.dampening` in the loss, at the end: it grows as a cosine over
        the last three quarters of the steps. 0: none.
      holding: threshold of `stability.hold`, at the end: it falls as a cosine from ten times that.
        Codes that oscillate more often are frozen. 0: none.
      steadying: scales whose gradient turns more often than this share of the steps stay where they
        are until it does not (`stability.frozen_scales`). 0: none.
      kurtosis: weight of the kurtosis of outputs (`flattened`).
      watch: measure in every step which share of codes changed, and how far scales drifted; costs
        rounding all weights twice more.
    """

    learning_rate: float = 1e-4
    in_steps: bool = False
    scale_rate: float = 1e-3
    range_rate: float = 1e-3
    also: tuple[str, ...] = ()
    other_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    dampening: float = 0.0
    holding: float = 0.0
    steadying: float = 0.0
    kurtosis: float = 0.0
    watch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "scale_rate", "range_rate", "other_rate", "weight_decay", "clip", "dampening",
            "holding", "steadying", "kurtosis",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.holding <= stability.MOMENTUM:
            raise ValueError(
                f"holding must be above {stability.MOMENTUM}, which a single change gives, got "
                f"{self.holding}"
            )

    @property
    def rates(self) -> dict[str, float]:
        """The highest rate of every kind that trains, by label."""
        every = {WEIGHT: self.learning_rate, SCALE: self.scale_rate, RANGE: self.range_rate,
                 OTHER: self.other_rate if self.also else 0.0}  # fmt: skip
        return {label: rate for label, rate in every.items() if rate}

    def rule(self) -> Rule:
        """What `Trainer` asks for."""
        return Descent(self)

    def trained(self, params: Any) -> Any:
        """Which arrays of a tree train, a tree of booleans."""
        return trained(params, *self.rates, also=self.also)

    def optimizer(self, train: Any) -> optax.GradientTransformation:
        """For the tree of what trains."""

        def of(label: str, rate: float) -> optax.GradientTransformation:
            schedule = dataclasses.replace(self, learning_rate=rate).schedule()
            decay = self.weight_decay if label == WEIGHT else 0.0
            parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
            parts += [optax.adamw(schedule, b2=0.95, weight_decay=decay)]
            return optax.chain(*parts, *([relative()] if label in (SCALE, RANGE) else []))

        return optimizer(train, **{label: of(label, rate) for label, rate in self.rates.items()})

    def dampening_at(self, step: Array) -> Array:
        """The factor of dampening after so many steps."""
        part = jnp.clip((step / self.steps - 0.25) / 0.75, 0, 1)
        return self.dampening * (1 - jnp.cos(jnp.pi * part)) / 2

    def holding_at(self, step: Array) -> Array:
        """The threshold of holding after so many steps."""
        return self.holding * (1 + 9 * (1 + jnp.cos(jnp.pi * step / self.steps)) / 2)


class _Slots(NamedTuple):
    """What training keeps: the optimizer's state, and that of the remedies."""

    step: Array
    optimizer: Any
    oscillations: dict[str, stability.Oscillation]
    disorder: dict[str, stability.Disorder]


class Descent:
    """The training rule (`trainer.Rule`) of a tree's trained arrays by an Optax optimizer."""

    def __init__(self, how: QAT) -> None:
        self.how = how

    def init(self, opened: Opened) -> tuple[Any, Any]:
        train, how, tree = opened.start, self.how, eqx.combine(opened.start, opened.params)
        return train, _Slots(
            jnp.int32(0),
            how.optimizer(train).init(train),
            stability.oscillations(tree) if how.holding else {},
            stability.disorder(tree) if how.steadying and how.scale_rate else {},
        )

    def update(
        self, loss: Loss, change: Any, slots: _Slots, opened: Opened, *batch: Any
    ) -> tuple[Any, _Slots, dict[str, Array]]:
        how, tree = self.how, lambda change: eqx.combine(change, opened.params)

        def whole(change: Any) -> tuple[Array, Array]:
            with flattened(how.kurtosis):
                value = loss(change, opened, *batch)
            if not how.dampening:
                return value, value
            return value + how.dampening_at(slots.step) * stability.dampening(tree(change)), value

        (_, value), slope = jax.value_and_grad(whole, has_aux=True)(change)
        measured = {"loss": value, "gradient": optax.tree.norm(slope)}
        disorder, oscillations = slots.disorder, slots.oscillations
        if disorder:
            disorder = stability.turned(disorder, slope)
            slope = stability.frozen_scales(disorder, slope, how.steadying)
        step, state = how.optimizer(change).update(slope, slots.optimizer, change)
        if how.in_steps:
            step = stability.times_steps(step, tree(change))
        new = optax.apply_updates(change, step)
        if oscillations:
            threshold = how.holding_at(slots.step)
            oscillations, held = stability.hold(oscillations, tree(new), threshold)
            new = eqx.filter(held, how.trained(held))
            measured["frozen"] = _mean({p: o.frozen for p, o in oscillations.items()})
        if how.watch:
            before, after = tree(change), tree(new)
            changed = stability.flips(stability.codes_of(before), stability.codes_of(after))
            measured["flips"] = _mean(changed)
            measured["drift"] = _mean(stability.drift(before, after))
        return new, _Slots(slots.step + 1, state, oscillations, disorder), measured


def _mean(of: dict[str, Array]) -> Array:
    return jnp.mean(jnp.stack([jnp.mean(a) for a in of.values()])) if of else jnp.zeros(())
