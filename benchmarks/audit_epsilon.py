"""Audit epsilon of one step by a likelihood ratio, with an adapter that the adversary chose: does the claim hold?

One site has 31 records, with or without one more, x. The adversary knows all records, the other sites' gradients and
which of the 31 were drawn. It does not know whether x is there, whether x was drawn, or the noise. It chooses the
adapter: the head's two rows are +K·v and -K·v, with v orthogonal to the pooled vectors of the 31 records. So each of
the 31 lies on a tie, and a last bit decides its class and whether it has a gradient at all. Of several such v it takes
the one with which x moves the sum of the gradients most. Then it tests S(D + x) against S(D) by the likelihood ratio of
what was released; both sums are the engine's own.

Each mode is audited at claims of epsilon 1 and 4 (delta 1e-5) in two phases, which the output names:

* `steps`: each trial is a whole step on the model with secret randomness, `train_round` in mode local and
  `release_step` in mode distributed. The noise of the first trials is recorded, and their releases must be the exact
  sum plus that noise, bit for bit.
* `noise`: the sums are exact and always the same, so each trial draws the noise alone, by `noisy` and `contribute`.

In mode distributed, what is tested is the sum of the shares of m honest sites, the fewest that a study admits: corrupt
sites know their own shares and subtract them. Other honest sites' sums are known, and only their noise is not.

The lower bound on epsilon holds with 95 % confidence: the threshold is chosen beforehand, from the known distribution
of the noise, and the rates are bounded with 97.5 % each (Clopper and Pearson 1934). With half of the noise the bound
must exceed the claim; otherwise the audit could not tell.

With `--against DIR`, a checkout of commit 88891e7, that version's `train_round` is attacked in the same way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Bench, Check, start
from numpy.typing import NDArray
from scipy.stats import norm

from privet.client.bases.files import pins_of
from privet.client.release.separation import clopper_pearson
from privet.client.site import Resources
from privet.client.training.dp import Clipping, noisy, per_sample_gradients
from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.train import (
    Draws,
    Steps,
    TrainingSet,
    clipping_of,
    local_optimizer,
    release_step,
    set_gradients,
    term_sum,
    train_round,
)
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.accounting import PrivacyEvent, plan, quiet_warnings
from privet.common.privacy.noise import Randomness, SecretRandomness
from privet.common.privacy.shared_noise import SharedNoise, contribute
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study

Integers = NDArray[np.int64]
Values = NDArray[np.float64]

DELTA, CLIP_NORM = 1e-5, 1.0
CLAIMS, MODES = (1.0, 4.0), ("local", "distributed")
COMPANIONS, WIDTH = 31, 64
SITES = 4
"""Sites of mode distributed: one may drop out and one is corrupt, so m = 2."""
STEEPNESS = 1e9
"""K. Logits of records on a tie are K times rounding errors of some 1e-7."""
DIRECTIONS = 10
"""How many random directions v the adversary tries."""
RATE = 1e4
"""Learning rate. It is large so that an update in float32 shows the noised gradient beside values as large as K."""
DEVIATION = 2.0**40
"""Standard deviation of the noise in points of its lattice."""
COMPARED = 50
"""Trials whose releases are compared bit for bit with the exact sum plus the recorded noise."""
_BLOCK = 20_000


@dataclass(frozen=True)
class Arm:
    """What is audited.

    Attributes:
        mode: Privacy mode.
        claim: Epsilon that the study promises.
        rate: Sampling rate.
        noise: Fraction of the noise that the study's plan demands: 1, or less to see whether the audit notices.
    """

    mode: str
    claim: float
    rate: float = 1.0
    noise: float = 1.0

    @property
    def name(self) -> str:
        """The arm in words."""
        sampled = "" if self.rate == 1 else f", q = {self.rate:g}"
        return (
            f"{self.mode}, claim {self.claim:g}{sampled}{'' if self.noise == 1 else f', {self.noise:g} of the noise'}"
        )


class Event(NamedTuple):
    """The ratio lies above the threshold, which is likelier with x; or not above it, which is likelier without x."""

    above: bool
    threshold: float


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon, with 95 % confidence.

    Attributes:
        epsilon: The bound; 0 if the trials show nothing.
        above, threshold: The event: see `Event`.
        having: Trials with x in which the event occurred.
        without: Trials without x in which it did.
        trials: Trials of each side.
    """

    epsilon: float
    above: bool
    threshold: float
    having: int
    without: int
    trials: int


class Watched(SecretRandomness):
    """Secret randomness that remembers what it gave last: what the adversary knows, and what a comparison needs."""

    def __init__(self) -> None:
        super().__init__()
        self.uniforms: Values = np.zeros(0)
        self.variates: Values = np.zeros(0)

    def uniform(self, count: int) -> Values:
        """See `Randomness.uniform`."""
        self.uniforms = super().uniform(count)
        return self.uniforms

    def lattice_normal(self, count: int) -> Values:
        """See `Randomness.lattice_normal`."""
        found = super().lattice_normal(count)
        if count:  # a fixed clip norm draws no count
            self.variates = found
        return found


class Replayed(Randomness):
    """Gives recorded variates once more."""

    def __init__(self, variates: Values) -> None:
        super().__init__(bytes(32))
        self._variates = variates

    def lattice_normal(self, count: int) -> Values:
        """Return the recorded variates."""
        return self._variates


class Silent(Randomness):
    """No noise at all: with it the adversary computes a sum on its own copy of the model."""

    def uniform(self, count: int) -> Values:
        """Return zeros, which draw every unit."""
        return np.zeros(count)

    def lattice_normal(self, count: int) -> Values:
        """Return zeros."""
        return np.zeros(count)


def silent() -> Randomness:
    """Return a stream by which all units are drawn and no noise is added."""
    return Silent(bytes(32))


# --- the study and its data ------------------------------------------------------------------------------------------


def write_base(folder: Path) -> Path:
    """Write a random encoder of two layers, and a tokenizer that nothing uses, into a folder."""
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=200, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    return folder


def document_of(base: Path, arm: Arm) -> dict[str, Any]:
    """Return a study of one round of one step as plain values."""
    local = arm.mode == "local"
    return {
        "name": "audit-epsilon",
        "model": {"base": str(base), "sha256": pins_of(base)},
        "task": {"kind": "text-classification", "labels": ["no", "yes"]},
        "data": {"columns": {"text": "text", "label": "label"}, "max_length": 32},
        "lora": {"rank": 1, "alpha": 1.0, "targets": ["query"], "layers": 1},
        "training": {
            "optimizer": "sgd", "learning_rate": RATE if local else 1.0, "rounds": 1, "local_steps": 1,
            "sampling_rate": arm.rate,
        },
        "aggregation": {"method": "ffa"},
        "privacy": {"mode": arm.mode, "epsilon": arm.claim, "delta": DELTA, "clip_norm": CLIP_NORM},
        "cohort": {"min_sites": 1 if local else SITES - 1},
        "secure_aggregation": {"mode": "plain" if local else "masked"},
    }  # fmt: skip


def records_of(seed: int) -> list[tuple[tuple[int, ...], int]]:
    """Return tokens and label of each record; x is the last one, and the longest by far.

    Without x the records fill one pass of 512 rows, and with x they need 1024. Padded to the longest record, as passes
    once were, all records have 13 tokens without x, and 27 with it.
    """
    generator = np.random.default_rng(seed)
    lengths = [*generator.integers(9, 13, COMPANIONS - 1).tolist(), 13, 27]
    return [(tuple(generator.integers(2, 200, n).tolist()), index % 2) for index, n in enumerate(lengths)]


# --- the adversary's adapter -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """What the attack on an update needs of a version of privet.

    Attributes:
        host: Its model.
        study: Its study, in mode local.
        adapter: The adapter that the study starts from.
        train: Update of a round, by adapter, records, randomness and noise multiplier.
        silent: `silent` of that version.
        secret: Its secret randomness.
    """

    host: Any
    study: Any
    adapter: Any
    train: Callable[[Any, Sequence[int], Any, Any, float], NDArray[np.float32]]
    silent: Callable[[], Any]
    secret: Callable[[], Any]

    def shown(self, update: NDArray[np.float32]) -> Values:
        """Return the noised gradient sum that an update shows."""
        shown: Values = update.astype(np.float64) * (-COMPANIONS / RATE)  # where all are drawn
        return shown

    def sum(self, adapter: Any, rows: Sequence[int]) -> Values:
        """Return the sum of the clipped gradients of records, in float32."""
        return self.shown(self.train(adapter, rows, self.silent(), self.silent(), 1.0))


def pooled(version: Version, rows: Sequence[int]) -> Values:
    """Return the vectors that the head gets of records computed together, in any order [records, WIDTH]."""
    (head,) = (m for n, m in version.host.model.named_modules() if n.endswith("classifier.modules_to_save.default"))
    found: list[Values] = []
    handle = head.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].detach().double().reshape(-1, WIDTH).numpy())
    )
    try:
        version.sum(version.adapter, rows)
    finally:
        handle.remove()
    together: Values = np.concatenate(found)
    kept: Values = together[np.any(together, axis=1)]  # a packed pass has rows of zeros
    return kept


def heads(version: Version, seed: int, directions: int) -> Iterator[tuple[Values, Values]]:
    """Yield weights [2, WIDTH] and biases [2] of heads for which the companions are on a tie, and x is not."""
    before, after = (pooled(version, range(COMPANIONS + more)) for more in (0, 1))
    same = np.argmin(((before[:, None] - after) ** 2).sum(2), axis=1)
    (x,) = np.delete(after, same, axis=0)
    shift = (after[same] - before).mean(0)
    _, _, basis = np.linalg.svd(before)
    free = basis[COMPANIONS:]  # an orthonormal basis of what is orthogonal to all companions
    generator = np.random.default_rng(seed)
    # First the direction in which x moves the companions, if it does.
    tried = [free @ shift, *generator.standard_normal((directions, len(free)))]
    for v in (each @ free for each in tried if np.any(each)):
        v *= np.sign(v @ x) / np.linalg.norm(v)  # of the classes "no" and "yes", x gets the first, and is the second
        margins = before @ v.astype(np.float32).astype(np.float64)
        for tie in (0.0, float(margins.min()), float(np.median(margins)), float(margins.max())):
            yield STEEPNESS * np.stack([v, -v]), STEEPNESS * np.array([-tie, tie])


def choose_adapter(version: Version, seed: int, directions: int = DIRECTIONS) -> tuple[Any, float]:
    """Return the adapter that the adversary chose, and the norm of S(D + x) - S(D) with it in multiples of C.

    The norm is read from updates in float32, and is off by up to 0.1.
    """
    best, most = version.adapter, -1.0
    everyone = list(range(COMPANIONS))
    for weight, bias in heads(version, seed, directions):
        for keep in (1.0, 0.0):  # without A, all of the gradient is the head's
            values = {}
            for name, value in version.adapter.values.items():
                chosen = weight if name.endswith("classifier.weight") else bias if "classifier" in name else value
                values[name] = (chosen * keep if "lora_A" in name else chosen).astype(np.float32)
            adapter = replace(version.adapter, values=values)
            moved = version.sum(adapter, [*everyone, COMPANIONS]) - version.sum(adapter, everyone)
            size = float(np.linalg.norm(moved)) / CLIP_NORM
            best, most = (adapter, size) if size > most else (best, most)
    return best, most


# --- trials ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """One arm's site.

    Attributes:
        arm: What is audited.
        host: The model.
        study: The study; its plan is for all of the noise.
        adapter: What the adversary chose.
        features: The records; x is the last one.
        multiplier: Noise multiplier in use.
        shares: The noise of mode distributed.
        terms: Each record's term in points of the noise's lattice [records, P].
        lattice: Size of a point.
    """

    arm: Arm
    host: ModelHost
    study: Study
    adapter: Adapter
    features: Sequence[Feature]
    multiplier: float
    shares: SharedNoise | None
    terms: Integers
    lattice: float

    @property
    def helpers(self) -> int:
        """Honest sites whose noise is in a release."""
        return 1 if self.shares is None else self.shares.helpers

    def data(self, with_x: bool) -> TrainingSet:
        """Return the site's records with or without x. The declared count is the same."""
        count = COMPANIONS + with_x
        return TrainingSet(self.features[:count], [[row] for row in range(count)], COMPANIONS)

    def ratio(self, beyond: Values) -> Values:
        """Return the log likelihood ratio of releases if x is drawn, given their excess over S(D) in points [n, P].

        If x is drawn with a probability below 1, the ratio is a growing function of this one: tests are the same.
        """
        term = self.terms[-1].astype(np.float64) / DEVIATION
        ratio: Values = (beyond / DEVIATION) @ term / self.helpers - self.mean**2 / 2
        return ratio

    @property
    def mean(self) -> float:
        """Norm of x's term in deviations of the noise."""
        return float(np.linalg.norm(self.terms[-1])) / DEVIATION / math.sqrt(self.helpers)

    def companions(self, uniforms: Values) -> Integers:
        """Return S(D) for the companions that were drawn, in points [P]."""
        drawn = uniforms[:COMPANIONS] < self.arm.rate
        total: Integers = self.terms[:COMPANIONS][drawn].sum(0)
        return total


def terms_of(
    host: ModelHost, study: Study, adapter: Adapter, features: Sequence[Feature], clipping: Clipping
) -> Integers:
    """Return each record's term [records, P], computed alone.

    Raises:
        AssertionError: The sum over all records, or over all but x, is not that of their terms.
    """
    host.mount(adapter)
    parameters = [parameter for _, parameter in host.train_only(adapter.spec.trained(study.aggregation.method))]
    data = TrainingSet(features, [[row] for row in range(len(features))], COMPANIONS)
    steps = Steps(host, study, data, parameters, 64)
    collecting = per_sample_gradients(host.model, parameters, packed=host.shape.packed)
    with host.passing(training=True), collecting as per_sample, quiet_warnings():

        def total(rows: Sequence[int]) -> Integers:
            found: Integers = term_sum(steps, {row: [row] for row in rows}, per_sample, clipping).total.numpy()
            return found

        terms = np.stack([total([row]) for row in range(len(features))])
        for count in (len(features) - 1, len(features)):
            if not np.array_equal(total(range(count)), terms[:count].sum(0)):
                raise AssertionError("a record's term depends on other records")
    return terms


def world_of(arm: Arm, study: Study, host: ModelHost, adapter: Adapter, features: Sequence[Feature]) -> World:
    """Return an arm's site."""
    mechanism = plan(study)
    assert mechanism is not None  # noqa: S101 - the study is private
    z = arm.noise * mechanism.training.noise_multiplier
    shares = None
    if arm.mode == "distributed":
        agreed = shared_noise(study, SITES)
        shares = replace(agreed, noise_multiplier=arm.noise * agreed.noise_multiplier)
    clipping = Clipping(CLIP_NORM, shares.lattice) if shares else clipping_of(study.privacy, CLIP_NORM, z)
    terms = terms_of(host, study, adapter, features, clipping)
    return World(arm, host, study, adapter, features, z, shares, terms, clipping.lattice)


def step(world: World, with_x: bool, compare: bool) -> tuple[Values, bool]:
    """Take one whole step. Return the release's excess over S(D) in points [P], and whether it is not as expected.

    Expected is the sum of the drawn records' terms plus the noise that was drawn, where `compare` asks for it.
    """
    sampling, noise = Watched(), Watched()
    draws, data = Draws(sampling, noise), world.data(with_x)
    if world.shares is None:
        event = PrivacyEvent(world.multiplier, world.arm.rate, 1, "record")
        update = train_round(
            world.host, world.study, world.adapter, data, draws, first_step=0, mechanism=event, physical_batch=64
        )
        shown = update.astype(np.float64) * (-COMPANIONS * world.arm.rate / RATE / world.lattice)
    else:
        share = release_step(
            world.host, world.study, world.adapter, data, draws, shares=world.shares, physical_batch=64
        )
        shown = others(world, share, 1)
    beyond = shown - world.companions(sampling.uniforms)
    if not compare:
        return beyond, False
    exact = world.terms[: len(sampling.uniforms)][sampling.uniforms < world.arm.rate].sum(0)
    if world.shares is None:
        return beyond, not np.array_equal(update, expected_update(world, exact, noise.variates))
    return beyond, not np.array_equal(share, contribute(exact, world.shares, Replayed(noise.variates)))


def others(world: World, found: Integers, count: int) -> Values:
    """Add the shares of the other honest sites to `count` contributions, and return the sums in points.

    Their gradients are known, and so can be zero.
    """
    assert world.shares is not None  # noqa: S101 - mode distributed
    total = found.copy()
    for _ in range(world.helpers - 1):
        total += contribute(np.zeros(count * world.terms.shape[1], np.int64), world.shares, SecretRandomness())
    return total.astype(np.float64) * (world.shares.level / world.lattice)


def expected_update(world: World, exact: Integers, variates: Values) -> NDArray[np.float32]:
    """Return the update of a step whose sum and noise are known."""
    trained = world.host.train_only(world.adapter.spec.trained(world.study.aggregation.method))
    copies = [
        (spec, torch.nn.Parameter(torch.from_numpy(np.array(world.adapter.values[spec.name])))) for spec, _ in trained
    ]
    noised = noisy(torch.from_numpy(exact), world.lattice, variates)
    set_gradients([parameter for _, parameter in copies], noised / (COMPANIONS * world.arm.rate))
    local_optimizer(world.study.training, copies).step()
    moved = [p.detach() - torch.from_numpy(np.array(world.adapter.values[spec.name])) for spec, p in copies]
    update: NDArray[np.float32] = torch.cat([part.flatten() for part in moved]).numpy()
    return update


def steps(world: World, with_x: bool, trials: int) -> tuple[Values, int]:
    """Return the log likelihood ratios of whole steps, and how many of the first were not exactly as expected."""
    beyond, different = [], 0
    for trial in range(trials):
        found, other = step(world, with_x, trial < COMPARED)
        different += other
        beyond.append(found)
    return world.ratio(np.stack(beyond)), different


def noises(world: World, with_x: bool, trials: int) -> Values:
    """Return the log likelihood ratios of trials that draw the noise alone, and whether x is drawn."""
    found = []
    for first in range(0, trials, _BLOCK):
        count = min(_BLOCK, trials - first)
        sampling, noise = SecretRandomness(), SecretRandomness()
        known = world.companions(sampling.uniform(COMPANIONS))
        drawn = (sampling.uniform(count) < world.arm.rate) & with_x
        points = (known + np.outer(drawn, world.terms[-1])).ravel()
        if world.shares is None:
            released = noisy(torch.from_numpy(points), world.lattice, noise.lattice_normal(points.size))
            shown = released.numpy() / world.lattice
        else:
            shown = others(world, contribute(points, world.shares, noise), count)
        found.append(world.ratio(shown.reshape(count, -1) - known))
    return np.concatenate(found)


# --- the bound -------------------------------------------------------------------------------------------------------


def choose_event(mean: float, rate: float, trials: int) -> Event:
    """Return the event that shows most where the noise is Gaussian, before any trial is seen.

    The ratio of Gaussians is N(-m²/2, m²) without x, and N(m²/2, m²) where x was drawn.

    Args:
        mean: m, how far x moves the sum, in deviations of the noise.
        rate: Sampling rate.
        trials: Trials of each side.
    """
    found = []
    for sign in (1, -1):
        for edge in np.linspace(0.0, 6.0, 121):
            threshold = sign * mean * edge
            absent, drawn = (norm.sf(threshold, side * mean**2 / 2, mean) for side in (-1, 1))
            above = (1 - rate) * absent + rate * drawn, absent
            having, without = above if sign > 0 else (1 - above[0], 1 - above[1])
            event = Event(sign > 0, float(threshold))
            found.append((_epsilon(event, round(trials * having), round(trials * without), trials), event))
    return max(found, key=lambda each: each[0])[1]


def lower_bound(having: Values, without: Values, event: Event) -> Bound:
    """Return the lower bound on epsilon that an event shows, with 95 % confidence.

    If a step is (epsilon, delta)-private, any event's probability is at most exp(epsilon) times that of the other
    side, plus delta.

    Args:
        having: Log likelihood ratios of trials with x [n].
        without: Of as many trials without it [n].
        event: Chosen without these trials.
    """
    one, other = (int(np.count_nonzero((side > event.threshold) == event.above)) for side in (having, without))
    return Bound(_epsilon(event, one, other, len(having)), event.above, event.threshold, one, other, len(having))


def _epsilon(event: Event, having: int, without: int, trials: int) -> float:
    likelier, rarer = (having, without) if event.above else (without, having)
    least, most = clopper_pearson(likelier, trials)[0] - DELTA, clopper_pearson(rarer, trials)[1]
    return max(0.0, math.log(least / most)) if least > 0 else 0.0


# --- the audit -------------------------------------------------------------------------------------------------------


def present(folder: Path, seed: int) -> tuple[Version, list[Feature]]:
    """Return the version in use with its records, for the choice of the adapter."""
    study = Study.parse(document_of(folder, Arm("local", 1.0)))
    host = open_host(study, Resources(device="cpu", precision="fp32", threads=1))
    features = [Feature(*record) for record in records_of(seed)]

    def train(adapter: Any, rows: Sequence[int], sampling: Any, noise: Any, z: float) -> NDArray[np.float32]:
        data = TrainingSet([features[row] for row in rows], [[i] for i in range(len(rows))], COMPANIONS)
        event = PrivacyEvent(z, 1.0, 1, "record")
        return train_round(
            host, study, adapter, data, Draws(sampling, noise), first_step=0, mechanism=event, physical_batch=64
        )

    return Version(host, study, initial_adapter(study, host), train, silent, SecretRandomness), features


@contextmanager
def earlier(root: Path) -> Iterator[None]:
    """Import `privet` from a checkout of commit 88891e7 inside the context, beside the one in use."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "privet"}
    for name in ours:
        del sys.modules[name]
    with TemporaryDirectory() as folder:
        package = Path(folder) / "privet"
        package.mkdir()
        (package / "__init__.py").touch()
        for part in ("client", "common", "server", "simulations"):
            (package / part).symlink_to((root / part).resolve())
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "privet"]:
                del sys.modules[name]
            sys.modules.update(ours)


def past(root: Path, folder: Path, seed: int) -> Version:
    """Return the version of commit 88891e7. Call it inside `earlier`."""
    model, train, tasks, resources, studies, noise, privacy = (
        import_module(f"privet.{name}")
        for name in (
            "client.model", "client.train", "client.tasks", "common.resources", "common.study", "common.noise",
            "common.privacy",
        )
    )  # fmt: skip
    study = studies.Study.parse(document_of(folder, Arm("local", 1.0)))
    host = model.open_host(study, resources.Resources(device="cpu", precision="fp32", threads=1))
    features = [tasks.Feature(*record) for record in records_of(seed)]

    def trained(adapter: Any, rows: Sequence[int], sampling: Any, noise: Any, z: float) -> NDArray[np.float32]:
        data = train.TrainingSet([features[row] for row in rows], [[i] for i in range(len(rows))], COMPANIONS)
        event = privacy.PrivacyEvent(z, 1.0, 1, "record")
        update: NDArray[np.float32] = train.train_round(
            host, study, adapter, data, train.Draws(sampling, noise), first_step=0, mechanism=event, physical_batch=64
        )
        return update

    return Version(host, study, model.initial_adapter(study, host), trained, silent, noise.SecretRandomness)


def audit_update(version: Version, adapter: Any, z: float, trials: int) -> Bound:
    """Return the bound that whole steps of a version show at q = 1, by sums that it computes itself."""
    everyone = list(range(COMPANIONS))
    before, after = (version.sum(adapter, rows) for rows in (everyone, [*everyone, COMPANIONS]))
    moved, variance = after - before, (z * CLIP_NORM) ** 2

    def ratios(rows: Sequence[int]) -> Values:
        found = []
        for _ in range(trials):
            shown = version.shown(version.train(adapter, rows, version.secret(), version.secret(), z))
            found.append(float((shown - before) @ moved - moved @ moved / 2) / variance)
        return np.array(found)

    event = choose_event(float(np.linalg.norm(moved)) / (z * CLIP_NORM), 1.0, trials)
    return lower_bound(ratios([*everyone, COMPANIONS]), ratios(everyone), event)


def audit(world: World, step_trials: int, noise_trials: int) -> dict[str, Any]:
    """Return the bounds of both phases as plain values; the trials are those of each side."""
    result: dict[str, Any] = {
        "noise_multiplier": world.multiplier,
        "helpers": world.helpers,
        "moved": float(np.linalg.norm(world.terms[-1] * world.lattice)) / CLIP_NORM,
    }
    if step_trials:
        (having, wrong), (without, more) = (steps(world, with_x, step_trials) for with_x in (True, False))
        bound = lower_bound(having, without, choose_event(world.mean, world.arm.rate, step_trials))
        result["steps"] = {**vars(bound), "compared": 2 * min(COMPARED, step_trials), "different": wrong + more}
    having, without = (noises(world, with_x, noise_trials) for with_x in (True, False))
    event = choose_event(world.mean, world.arm.rate, noise_trials)
    result["noise"] = vars(lower_bound(having, without, event))
    return result


def checks_of(arm: Arm, result: dict[str, Any]) -> list[Check]:
    """Return the figures of one arm against their targets."""
    checks = []
    for phase in ("steps", "noise"):
        if phase not in result:
            continue
        found = result[phase]["epsilon"]
        target, met = (
            (f"<= {arm.claim:g}", found <= arm.claim) if arm.noise == 1 else (f"> {arm.claim:g}", found > arm.claim)
        )
        if phase == "steps" and arm.noise < 1:
            continue  # too few to show it
        checks.append(Check(f"epsilon at least, {arm.name} ({phase})", found, "", target, met))
    if "steps" in result:
        different = result["steps"]["different"]
        checks.append(Check(f"releases that are not sum + noise, {arm.name}", different, "", "= 0", different == 0))
    return checks


def arms(quick: bool) -> list[tuple[Arm, int, int]]:
    """Return what to audit: arms, whole steps and draws of the noise alone on each side."""
    draws = 40_000 if quick else 400_000
    found = []
    for mode in MODES:
        for claim in CLAIMS:
            many = 4000 if claim == 1 else 1000
            found += [(Arm(mode, claim), 100 if quick else many, draws)]
            found += [(Arm(mode, claim, noise=0.5), 0 if quick else 100, draws)]
    for claim in CLAIMS:
        found += [(Arm("local", claim, rate=0.5), 100 if quick else 500, draws)]
        found += [(Arm("local", claim, rate=0.5, noise=0.5), 0, draws)]
    return found


def run(bench: Bench, base: Path) -> tuple[list[Check], dict[str, Any]]:
    """Choose the adapter, and audit every arm."""
    version, features = present(base, bench.seed)
    adapter, _ = choose_adapter(version, bench.seed)
    checks: list[Check] = []
    details: dict[str, Any] = {"values": sum(tensor.size for tensor in adapter.spec.trained("ffa")), "delta": DELTA}
    for arm, step_trials, noise_trials in arms(bench.quick):
        world = world_of(arm, Study.parse(document_of(base, arm)), version.host, adapter, features)
        result = audit(world, step_trials, noise_trials)
        if not checks:
            moved = result["moved"]
            checks += [Check("|S(D + x) - S(D)|, adapter chosen", moved, "C", "<= 1", moved <= 1)]
        bench.say(f"{arm.name}: {result}")
        details[arm.name] = result
        checks += checks_of(arm, result)
    return checks, details


def run_before(bench: Bench, base: Path, root: Path) -> tuple[list[Check], dict[str, Any]]:
    """Attack commit 88891e7 in mode local at a claim of 1, by whole steps."""
    mechanism = plan(Study.parse(document_of(base, Arm("local", 1.0))))
    assert mechanism is not None  # noqa: S101 - the study is private
    with earlier(root):
        version = past(root, base, bench.seed)
        adapter, moved = choose_adapter(version, bench.seed)
        bound = audit_update(version, adapter, mechanism.training.noise_multiplier, 200 if bench.quick else 1000)
    checks = [
        Check("|S(D + x) - S(D)|, adapter chosen, 88891e7", moved, "C", "", None),
        Check("epsilon at least, local, claim 1, 88891e7 (steps)", bound.epsilon, "", "> 1", bound.epsilon > 1),
    ]
    return checks, {"88891e7, local, claim 1": {"moved": moved, "steps": vars(bound)}}


def main() -> None:
    """Run the audit and print its checks."""
    bench = start("audit_epsilon", __doc__, against="checkout of commit 88891e7, to attack its training too")
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        base = write_base(Path(folder))
        checks, details = run(bench, base)
        if bench.against is not None:
            more, further = run_before(bench, base, bench.against)
            checks, details = checks + more, details | further
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
