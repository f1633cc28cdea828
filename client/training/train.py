"""One round of local training: LoRA by (DP-)SGD from the received adapter to an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privet.client.training.dp import (
    Clipping,
    Columns,
    TermSum,
    draw_rows,
    draw_units,
    next_clip_norm,
    noisy,
    per_sample_gradients,
)
from privet.client.training.features import Feature, Pair
from privet.client.training.host import ModelHost
from privet.client.training.meter import Meter
from privet.client.training.packing import pack, pack_in_order
from privet.client.training.passes import Pass, backward, passes_of
from privet.client.training.persample import PerSampleGradients, flat_gradient
from privet.client.training.preference import pair_gradients, reference_margins, windows
from privet.common.errors import DivergedError, StateError
from privet.common.privacy.accounting import PrivacyEvent, quiet_warnings, split_noise
from privet.common.privacy.noise import Randomness, lattice_unit
from privet.common.privacy.schedule import rate_factor
from privet.common.privacy.shared_noise import Integers, SharedNoise, contribute, contribute_correlated
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec, Vector
from privet.common.study.sections import OptimizerSection, PrivacySection, TrainingSection
from privet.common.study.study import Study

_DRAWING = ThreadPoolExecutor(1, "noise")
MOST, MOST_SHARED = 2**62, 2**60
"""Bounds on a sum of terms. Twice the first, and the noise, fit into 64 bits. Shares are cut to the second."""

Drawn = Mapping[int, Sequence[int]]
"""The rows drawn for a step, by unit."""


@dataclass(frozen=True)
class TrainingSet:
    """A site's training records as features, with the rows of each unit and the count it declared.

    Attributes:
        classes: The class of each unit, in a study with correlated noise; otherwise empty.
    """

    features: Sequence[Feature]
    units: Sequence[Sequence[int]]
    declared: int
    classes: Sequence[int] = ()


@dataclass(frozen=True)
class StepNoise:
    """The standard normal variates of one step, on the lattice of `Randomness.lattice_normal`.

    Attributes:
        gradient: For the gradient sum [d].
        balance: For the balance under adaptive clipping [1], otherwise [0].
    """

    gradient: NDArray[np.float64]
    balance: NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """The two streams of randomness of a site's round. They are never shared with anything else."""

    sampling: Randomness
    noise: Randomness


def train_round(
    host: ModelHost | Apart,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    *,
    first_step: int,
    mechanism: PrivacyEvent | None,
    physical_batch: int,
    stepped: Callable[[int], None] = lambda done: None,
    own: NDArray[np.bool_] | None = None,
) -> Vector:
    """Train for one round and return the update: trained values after minus before, flattened, float32.

    Args:
        host: The model, or the trainer that has it; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent.
        data: The site's training records; of a trainer apart, their units.
        draws: This round's randomness.
        first_step: Steps of the study before this round, for the learning-rate schedule.
        mechanism: Noise multiplier and sampling rate of private training; None trains without privacy.
        physical_batch: Most records of a pass.
        stepped: Called after each step with the number of steps done.
        own: Which values [d] the site trains; the update is zero elsewhere. None: all.

    Raises:
        DivergedError: Without privacy, a loss is not finite. (With privacy such a record counts as zero.)
    """
    # A constant that everybody knows, so dividing by it costs no privacy; the number drawn would be a secret.
    expected = study.training.sampling_rate * data.declared
    with stepping(host, study, adapter, data, physical_batch, own, private=mechanism is not None) as at:
        parameters = [parameter for _, parameter in at.trained]
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer = local_optimizer(study.training, at.trained)
        rates = [group["lr"] for group in optimizer.param_groups]
        sums: GradientSums = PlainSums(at, study.training.steps)
        if mechanism is not None:
            clip_norm, z = study.privacy.promise.clip_norm, mechanism.noise_multiplier
            sums = PrivateSums(at, study, len(data.units), z, draws.noise, expected, clip_norm)
        kept = own_part(own, at.device)
        for step in range(study.training.steps):
            factor = rate_factor(study.training.schedule, first_step + step, study.total_steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            total = sums.sum(draw_step(study, data, draws.sampling))
            set_gradients(parameters, total / expected)
            _pull_back(parameters, start, study.training.fedprox_mu)
            optimizer.step()
            _put_back(parameters, start, kept)
            stepped(step + 1)
    with torch.no_grad():
        moved = [(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)]
    update: Vector = torch.cat(moved).cpu().numpy()
    return update


def prepare(host: ModelHost, data: TrainingSet, most: int) -> None:
    """Score what a step needs to know of all records beforehand: of pairs, the reference."""
    if host.beta is not None:
        with quiet_warnings():
            reference_margins(host, data.features, most)


@dataclass(frozen=True)
class Steps:
    """What all steps of a round share.

    Attributes:
        host: The model, inside `host.passing`.
        study: What was agreed.
        data: The site's training records.
        parameters: What is trained.
        most: Most records of a pass.
        own: Which values [d] the site trains; None: all.
    """

    host: ModelHost
    study: Study
    data: TrainingSet
    parameters: Sequence[nn.Parameter]
    most: int
    own: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters)

    def owned(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return gradients [n, d] of single records with zeros where the site does not train."""
        return gradients if self.own is None else gradients.masked_fill_(~self.own, 0.0)

    def passes(self, drawn: Drawn) -> Iterator[Pass]:
        """Yield the passes of one step; a unit of several rows gives them one after another."""
        features, shape = self.data.features, self.host.shape
        order = sorted(drawn, key=lambda unit: (max(len(features[row].ids) for row in drawn[unit]), unit))
        rows = [row for unit in order for row in drawn[unit]]
        several = any(len(drawn[unit]) > 1 for unit in order)
        placed = (pack_in_order if several else pack)(shape, features, rows, self.most)
        return passes_of(self.host, features, placed)

    def pairs(self, drawn: Drawn, per_sample: PerSampleGradients) -> Iterator[tuple[list[torch.Tensor], list[int]]]:
        """Yield gradients of some pairs, [P] each, and the number of pairs of each one's unit; units stay together."""
        order = sorted(drawn, key=lambda unit: (max(map(self._longest, drawn[unit])), unit))
        pairs = [self._pair(row) for unit in order for row in drawn[unit]]
        rows = [len(drawn[unit]) for unit in order for _ in drawn[unit]]
        done = 0
        for window in windows(self.host, pairs, self.most):
            yield pair_gradients(self.host, window, self.most, per_sample), rows[done : done + len(window)]
            done += len(window)

    def _pair(self, row: int) -> Pair:
        pair = self.data.features[row]
        if not isinstance(pair, Pair):
            raise StateError("a record of preference: expected a pair, found a single answer", "report this as a bug")
        return pair

    def _longest(self, row: int) -> int:
        return max(len(sequence.ids) for sequence in self._pair(row).sequences)


class Stepping(Protocol):
    """What computes the sums of a round's steps, at the present values of what is trained.

    The sums are all that anybody needs of records: they are functions of the values, of the drawn rows and of how terms
    are clipped. So a model in this process or a trainer apart may compute them.
    """

    @property
    def spec(self) -> AdapterSpec:
        """The adapter's layout."""

    @property
    def trained(self) -> Sequence[tuple[TensorSpec, nn.Parameter]]:
        """What is trained, in order. The caller moves it."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def meter(self) -> Meter:
        """Counts what steps take."""

    def terms(self, drawn: Drawn, clipping: Clipping) -> TermSum:
        """Return the sum of the drawn units' terms."""

    def plain(self, drawn: Drawn) -> torch.Tensor:
        """Return the gradient sum without clipping, float64 [d]."""


class Apart(Protocol):
    """A trainer apart from this process, as far as training a round needs it (`privet.client.trainer`)."""

    @property
    def meter(self) -> Meter:
        """Counts what training takes."""

    def stepping(
        self, study: Study, adapter: Adapter, own: NDArray[np.bool_] | None, *, private: bool
    ) -> AbstractContextManager[Stepping]:
        """Begin a round."""


@dataclass(frozen=True)
class _Inside:
    """Steps with the model of this process."""

    steps: Steps
    trained: Sequence[tuple[TensorSpec, nn.Parameter]]
    per_sample: PerSampleGradients | None

    @property
    def spec(self) -> AdapterSpec:
        return self.steps.host.spec

    @property
    def device(self) -> torch.device:
        return self.steps.host.device

    @property
    def meter(self) -> Meter:
        return self.steps.host.meter

    def terms(self, drawn: Drawn, clipping: Clipping) -> TermSum:
        if self.per_sample is None:
            raise StateError("terms: expected a round of private training", "report this as a bug")
        return term_sum(self.steps, drawn, self.per_sample, clipping)

    def plain(self, drawn: Drawn) -> torch.Tensor:
        return gradient_sum(self.steps, drawn)


@contextmanager
def stepping(
    host: ModelHost | Apart,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    most: int,
    own: NDArray[np.bool_] | None,
    *,
    private: bool,
) -> Iterator[Stepping]:
    """Begin a round from an adapter: what computes its steps' sums, while the context is open.

    Args:
        host: The model, or the trainer that has it.
        study: What was agreed.
        adapter: What the round starts from.
        data: The site's training records.
        most: Most records of a pass.
        own: Which values [d] the site trains; None: all.
        private: Whether terms are clipped; otherwise gradients are summed as they are.
    """
    with quiet_warnings():
        if not isinstance(host, ModelHost):
            with host.stepping(study, adapter, own, private=private) as apart:
                yield apart
            return
        prepare(host, data, most)
        host.mount(adapter)
        trained = host.train_only(study.trained(adapter.spec))
        parameters = [parameter for _, parameter in trained]
        steps = Steps(host, study, data, parameters, most, own_part(own, host.device))
        collecting = per_sample_gradients(host.model, parameters, packed=host.shape.packed)
        with host.passing(training=True), collecting if private else nullcontext() as per_sample:
            yield _Inside(steps, trained, per_sample)


class GradientSums(Protocol):
    """Where a round's steps get their gradient sums from."""

    def sum(self, drawn: Drawn) -> torch.Tensor:
        """Return the next step's gradient sum as the optimizer takes it, float64 [d]."""


@dataclass
class PlainSums:
    """Gradient sums without privacy.

    Attributes:
        at: Computes them.
        steps: Steps of the round.
    """

    at: Stepping
    steps: int
    _taken: int = 0

    def sum(self, drawn: Drawn) -> torch.Tensor:
        """Return the next step's gradient sum, float64 [d].

        Raises:
            DivergedError: It is not finite.
        """
        self._taken += 1
        total = self.at.plain(drawn)
        if not bool(torch.isfinite(total).all()):
            raise DivergedError(
                f"training diverged at step {self._taken} of {self.steps} of the round: the loss "
                "or a gradient is infinite or not a number",
                "lower training.learning_rate in the study",
            )
        return total


@dataclass
class PrivateSums:
    """Gradient sums of clipped gradients with noise. A record that is not finite counts as zero, and nobody is told.

    Attributes:
        at: Computes sums of clipped terms.
        study: What was agreed.
        units: Number of the site's units.
        noise_multiplier: z of everything that a step releases.
        noise: Where noise is drawn from, and nothing else.
        expected: Units expected in a step's batch.
        clip_norm: C of the next step; an adaptive clip norm moves from step to step.
    """

    at: Stepping
    study: Study
    units: int
    noise_multiplier: float
    noise: Randomness
    expected: float
    clip_norm: float

    def sum(self, drawn: Drawn) -> torch.Tensor:
        """Return the next step's gradient sum with its noise, float64 [d]."""
        at, privacy = self.at, self.study.privacy
        # Drawing takes the CPU as long as a step of a small model takes the accelerator, so both go on at once.
        noise = noise_ahead(at.device, privacy, sum(tensor.size for tensor, _ in at.trained), self.noise)
        clipping = clipping_of(privacy, self.clip_norm, self.noise_multiplier, head_columns(self.study, at.spec))
        check_room(clipping, self.units, self.study.training.sampling_rate, MOST)
        terms = at.terms(drawn, clipping)
        with at.meter.phase("noise"):
            total, self.clip_norm = release(privacy, self.noise_multiplier, terms, self.expected, noise())
        return total


def own_part(own: NDArray[np.bool_] | None, device: torch.device) -> torch.Tensor | None:
    """Return which values [d] a site trains as a tensor; None: all."""
    return None if own is None else torch.from_numpy(own).to(device)


def _put_back(parameters: Sequence[nn.Parameter], start: Sequence[torch.Tensor], own: torch.Tensor | None) -> None:
    """Undo a step where the site does not train. There the sum is noise or zero, and weights would decay.

    Optimizers work value by value, so the other values are those of a training of these alone.
    """
    if own is None:
        return
    parts = torch.split(own, [parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, origin, part in zip(parameters, start, parts, strict=True):
            parameter.copy_(torch.where(part.view(parameter.shape), parameter, origin))


def _pull_back(parameters: Sequence[nn.Parameter], start: Sequence[torch.Tensor], mu: float) -> None:
    """Add the gradient of the proximal term mu/2 |w - w_round|^2 (Li et al. 2020)."""
    if not mu:
        return
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def release_step(
    host: ModelHost | Apart,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    *,
    shares: SharedNoise,
    physical_batch: int,
    own: NDArray[np.bool_] | None = None,
) -> Integers:
    """Take this site's part in one step of a study whose sites share the noise; nothing at the site moves.

    Args:
        host: The model, or the trainer that has it; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent.
        data: The site's training records; of a trainer apart, their units.
        draws: This round's randomness.
        shares: How much of the noise is this site's.
        physical_batch: Most records of a pass.
        own: Which values [d] the site trains; None: all. Elsewhere its terms are zero. The noise is everywhere, as
            every value of the sum needs a share from each site.

    Returns:
        The sum over the drawn units of their clipped gradients plus a share of the noise, in levels, int64 [d]. Only
        a sum over enough sites is private.
    """
    points = _step_points(host, study, adapter, data, draws, shares, physical_batch, own)
    with host.meter.phase("noise"):
        return contribute(points, shares, draws.noise)


def release_correlated(
    host: ModelHost | Apart,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    *,
    shares: SharedNoise,
    physical_batch: int,
    step: int,
    past: Mapping[int, Integers],
    own: NDArray[np.bool_] | None = None,
) -> tuple[Integers, Integers]:
    """Take this site's part in one step whose noise is correlated with that of earlier steps.

    Args:
        host: The model, or the trainer that has it; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent.
        data: The site's training records; of a trainer apart, their units.
        draws: This round's randomness.
        shares: How much of the noise is this site's.
        physical_batch: Most records of a pass.
        step: Number of the step in the study, from 0. Units of its class alone are drawn.
        past: Noise of earlier steps that is taken back, [d] each, by the number of steps since.
        own: Which values [d] the site trains, as in `release_step`.

    Returns:
        This site's part, as `release_step` returns it, and the noise of the step, which the site keeps; int64 [d].
    """
    points = _step_points(host, study, adapter, data, draws, shares, physical_batch, own, step)
    with host.meter.phase("noise"):
        return contribute_correlated(points, shares, past, draws.noise)


def _step_points(
    host: ModelHost | Apart,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    draws: Draws,
    shares: SharedNoise,
    physical_batch: int,
    own: NDArray[np.bool_] | None,
    step: int = 0,
) -> Integers:
    """Return the sum of the drawn units' terms, in multiples of the lattice of the noise, int64 [d]."""
    with stepping(host, study, adapter, data, physical_batch, own, private=True) as at:
        clipping = _clipping(study.privacy, shares.clip_norm, shares.lattice, head_columns(study, at.spec))
        check_room(clipping, len(data.units), study.draws[0], MOST_SHARED)
        terms = at.terms(draw_step(study, data, draws.sampling, step), clipping)
    points: Integers = terms.total.cpu().numpy()
    return points


def clipping_of(privacy: PrivacySection, clip_norm: float, noise_multiplier: float, head: Columns = ()) -> Clipping:
    """Return how a step's units are clipped, for noise of its own. `head` are the columns that are clipped apart."""
    adaptive = privacy.clipping == "adaptive"
    for_gradient = split_noise(noise_multiplier, privacy.quantile_share)[0] if adaptive else noise_multiplier
    return _clipping(privacy, clip_norm, lattice_unit(for_gradient * clip_norm), head)


def _clipping(privacy: PrivacySection, clip_norm: float, lattice: float, head: Columns) -> Clipping:
    stability = privacy.stability if privacy.clipping == "automatic" else None
    return Clipping(clip_norm, lattice, stability, head, privacy.head_clip_share or 0.0)


def head_columns(study: Study, spec: AdapterSpec) -> Columns:
    """Return the columns of a gradient that a study clips apart: those of modules trained in full; none if together."""
    if study.privacy.head_clip_share is None:
        return ()
    trained = study.trained(spec)
    ends = [int(end) for end in np.cumsum([tensor.size for tensor in trained])]
    return tuple((end - tensor.size, end) for tensor, end in zip(trained, ends, strict=True) if tensor.role == "full")


def check_room(clipping: Clipping, units: int, rate: float, bound: int) -> None:
    """Refuse a step whose sum of terms could exceed a bound: integers would wrap around.

    Args:
        clipping: How units are clipped, and the lattice.
        units: The site's units.
        rate: Probability with which each is drawn. More than 20 deviations and 200 above the mean are never drawn: that
            has a probability below exp(-150) (Bernstein).
        bound: Bound on the sum, in multiples of the lattice.

    Raises:
        StateError: It could.
    """
    mean = units * rate
    if clipping.largest * min(units, mean + 20 * math.sqrt(mean) + 200) >= bound:
        raise StateError(
            "the sum of a step's terms could exceed what 64 bits hold, as the noise is very small",
            "lower privacy.epsilon, training.sampling_rate or the number of sites in the study",
        )


def draw_step(study: Study, data: TrainingSet, sampling: Randomness, step: int = 0) -> Drawn:
    """Draw one step's batch: the rows of each unit drawn.

    With correlated noise only units of one class may be drawn, with a probability that is higher in return. So no unit
    is drawn in two steps whose noise depends on each other.

    Args:
        study: The study.
        data: The site's training records.
        sampling: A stream that nothing else uses.
        step: Number of the step in the study, from 0; without correlated noise it has no meaning.
    """
    most = study.privacy.max_records_per_unit if study.privacy.unit == "patient" else 1
    band, units = study.privacy.band, range(len(data.units))
    eligible = units if band is None else [unit for unit in units if data.classes[unit] == step % band]
    drawn = [eligible[index] for index in draw_units(len(eligible), study.draws[0], sampling)]
    return {unit: draw_rows(data.units[unit], most, sampling) for unit in drawn}


def gradient_sum(steps: Steps, drawn: Drawn) -> torch.Tensor:
    """Return a step's gradient sum without clipping, float64 [d]. No rows give zeros."""
    total = torch.zeros(steps.size, dtype=torch.float64, device=steps.host.device)
    if steps.host.beta is not None:
        # A factor is known only after both answers' passes, so their gradients are kept apart here as well.
        for parameter in steps.parameters:
            parameter.grad = None
        collecting = per_sample_gradients(steps.host.model, steps.parameters, packed=steps.host.shape.packed)
        with collecting as per_sample:
            for gradients, _ in steps.pairs(drawn, per_sample):
                for gradient in gradients:
                    total += gradient
        return total
    for passed in steps.passes(drawn):
        for parameter in steps.parameters:
            parameter.grad = None  # the last pass's, of whichever site used this model
        backward(steps.host, passed)
        total += flat_gradient(steps.parameters)
    return total


def term_sum(steps: Steps, drawn: Drawn, per_sample: PerSampleGradients, clipping: Clipping) -> TermSum:
    """Return the sum of a step's terms. No units give zeros: a step without records is a step all the same."""
    for parameter in steps.parameters:
        parameter.grad = None
    rows_of = {row: len(rows) for rows in drawn.values() for row in rows}
    terms = TermSum(clipping, torch.zeros(steps.size, dtype=torch.int64, device=steps.host.device))
    if steps.host.beta is not None:
        for gradients, rows in steps.pairs(drawn, per_sample):
            with steps.host.meter.phase("clipping"):
                terms.add(steps.owned(torch.stack(gradients)), rows)
        return terms
    for passed in steps.passes(drawn):
        per_sample.begin(passed.layout)
        backward(steps.host, passed)
        with steps.host.meter.phase("clipping"):
            terms.add(steps.owned(per_sample.take()), [rows_of[row] for row in passed.records])
    return terms


def draw_noise(privacy: PrivacySection, size: int, noise: Randomness) -> StepNoise:
    """Draw one step's noise for a gradient of `size` values."""
    gradient = noise.lattice_normal(size)
    return StepNoise(gradient, noise.lattice_normal(1 if privacy.clipping == "adaptive" else 0))


def noise_ahead(device: torch.device, privacy: PrivacySection, size: int, noise: Randomness) -> Callable[[], StepNoise]:
    """Return a function that returns the next step's noise, which is drawn on the CPU while an accelerator works.

    Nothing else may use `noise` before that function has returned.
    """
    if device.type == "cpu":
        return partial(draw_noise, privacy, size, noise)
    return _DRAWING.submit(draw_noise, privacy, size, noise).result


def release(
    privacy: PrivacySection, noise_multiplier: float, terms: TermSum, expected: float, noise: StepNoise
) -> tuple[torch.Tensor, float]:
    """Noise a step's sums. Return the gradient sum, float64 [d], and the clip norm of the next step.

    An adaptive clip norm starts from the study's in every round: a site may miss rounds, and would otherwise have
    to keep a state that nobody could check between those it takes part in.

    Args:
        privacy: How the study clips.
        noise_multiplier: z of everything this step releases.
        terms: The sums, clipped as `clipping_of` says.
        expected: Units expected in a step's batch.
        noise: This step's.
    """
    clip_norm = terms.clipping.norm
    gradient = noisy(terms.total, terms.clipping.lattice, noise.gradient)
    if privacy.clipping != "adaptive":
        return gradient, clip_norm
    lattice = lattice_unit(split_noise(noise_multiplier, privacy.quantile_share)[1])
    # A unit's 1/2 in multiples of the lattice, so that here too it moves the sum by exactly its own term.
    half = torch.tensor([int(2 * terms.balance) * int(0.5 / lattice)])
    count = float(noisy(half, lattice, noise.balance)[0])
    return gradient, next_clip_norm(clip_norm, count, expected, privacy.quantile, privacy.quantile_rate)


def set_gradients(parameters: Sequence[nn.Parameter], flat: torch.Tensor) -> None:
    """Lay a flat gradient [d] out over the parameters, for the optimizer."""
    parts = torch.split(flat.float(), [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view(parameter.shape)


def parameter_groups(
    section: OptimizerSection, trained: Sequence[tuple[TensorSpec, nn.Parameter]]
) -> list[dict[str, object]]:
    """Return one group for LoRA tensors and one for modules trained in full, each with its learning rate."""
    lora = [parameter for tensor, parameter in trained if tensor.role != "full"]
    full = [parameter for tensor, parameter in trained if tensor.role == "full"]
    groups: list[dict[str, object]] = [{"params": lora, "lr": section.learning_rate}]
    if full:
        groups.append({"params": full, "lr": section.head_learning_rate or section.learning_rate})
    return groups


def local_optimizer(
    section: TrainingSection, trained: Sequence[tuple[TensorSpec, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Return the site's optimizer, with fresh state."""
    groups = parameter_groups(section, trained)
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=section.betas, weight_decay=section.weight_decay)
    return torch.optim.SGD(groups, momentum=section.momentum, weight_decay=section.weight_decay)
