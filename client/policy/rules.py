"""A site's policy: which studies it admits, whatever a coordinator asks. The policy file, and its verdict on a study.

The policy judges the effective study, with every default filled in: before any record is opened, and again before
anything is released. It fails closed. A missing file, an unknown key, a missing key, or a file that other users may
write refuses every study. Clock and counts are arguments, so the verdict is a pure function.

`[scan]` is about the data files, so it is judged apart (`privet.client.policy.scanned`), and what it finds stays at the
site.

Three rules are elsewhere, in the site file. `[limit]` is what a dataset may spend in its lifetime, and the ledger keeps
it. `[floor]` is the least strength of the masks of one round. `patient_column` says who a patient is. A verdict goes to
the coordinator and into the round log. So it holds what the study asks and what the site allows, and nothing that
depends on records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from privet.client.scan.kinds import COUNTED
from privet.common.canonical import canonical_json, digest
from privet.common.errors import Finding, PolicyError, PrivetError, StateError
from privet.common.log.encoding import one_line
from privet.common.log.statements import Digest
from privet.common.masking.groups import corrupt_sites, quorums_meet, smallest_groups, smallest_sum
from privet.common.masking.parameters import suite_of
from privet.common.privacy.accounting import plan
from privet.common.secagg import graph
from privet.common.secagg.terms import Floor, accepted_suites, fraction_of
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Count, Positive, Section, simulation_fields
from privet.common.study.study import Study
from privet.common.study.terms import PERMIT, PERMIT_ALLOWED, permit_asked, permit_ended

_WINDOW = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
ShortText = Annotated[str, Field(min_length=1, max_length=128)]
Window = Annotated[str, Field(pattern=f"^{_WINDOW.pattern}$")]
DAY = timedelta(days=1)
PERSONAL = frozenset({"E_NOT_APPROVED", "E_REFUSED"})
"""Findings that an approval ends."""
PASSING = frozenset({"E_HOURS", "E_STUDIES_PER_DAY"})
"""Findings that pass with time."""


class ModelRules(Section):
    """Adapters that may be trained, and their bases."""

    bases: tuple[Digest, ...] | Literal["any"]
    """Digests of the admitted bases. `privet site check SITE STUDY` prints the digest of a study's base."""
    targets: tuple[ShortText, ...] | Literal["any"]
    """Linear layers that may have an adapter."""
    full_modules: tuple[ShortText, ...]
    """Modules that may be trained in full, besides the task's own head."""
    max_rank: Count
    """Largest rank of the adapter; or of the part that this site trains, where the study gives the site a rank."""


class TaskRules(Section):
    """Tasks that may be learned."""

    allow: tuple[Literal["text-classification", "token-classification", "causal-lm", "preference"], ...]
    """Admitted kinds of task."""


class PrivacyRules(Section):
    """What one study may cost. The dataset's lifetime has its own limit, in the site file."""

    required: bool
    """Whether every study must be private. The rules below apply to private studies."""
    unit: Literal["record", "patient"]
    """Unit of privacy that a study must protect."""
    max_epsilon: Positive
    """Largest epsilon of one study."""
    max_delta: Annotated[float, Field(gt=0, lt=1)]
    """Largest delta of one study."""
    max_epsilon_alone: Positive | Literal["any"]
    """Largest epsilon of this site's part of one study by itself, whatever the other sites do."""
    min_noise_multiplier: Annotated[float, Field(ge=0)]
    """Least noise of every release, in multiples of its sensitivity."""
    max_clip_norm: Positive
    """Largest L2 norm to which a unit's gradient may be clipped."""
    min_units: Count
    """Least count that this site must declare."""
    banded_noise: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether sites may correlate their noise over steps, where they share it. The guarantee then allows for fewer
    corrupt sites: one that is corrupt in any step counts in all. And this site must keep its noise of some steps
    secret."""


class CohortRules(Section):
    """The other sites among which this site's update must be hidden."""

    secure_aggregation: Literal["required", "optional"]
    """Whether updates must be masked."""
    min_sites: Count
    """Least number of sites whose updates are summed: the survivors of the smallest group of any cohort that the study
    admits."""
    min_threshold: Count
    """Least number of sites whose shares unmask a round, in that cohort or group."""


class MetricRules(Section):
    """What may leave besides updates."""

    allow: tuple[Literal["validation", "statistics", "evaluate"], ...]
    """`validation`: the noisy sums of loss and accuracy on held-out units. `statistics`, `evaluate`: the noisy counts
    of a study of this kind, which trains nothing."""


MOST_LOST = 5
"""Rounds in a row without a result that a site pays for, unless its policy says otherwise. A search for one site that
spoils sums among thirty costs the others at most as many."""


class LimitRules(Section):
    """Largest amounts, and hours."""

    max_rounds: Count
    """Most rounds of one study."""
    max_studies_per_day: Count
    """Most studies that may begin within 24 hours."""
    max_upload_bytes: Count
    """Largest size of one update before it is masked, at 4 bytes for each value."""
    hours_utc: tuple[Window, ...]
    """Hours in which this site takes part, as `18:00-06:00`. A window may pass midnight. `00:00-00:00` is all day."""
    max_lost_rounds: Count | None = None
    """Most rounds in a row that may cost this site privacy and lead to no adapter; None: `MOST_LOST`."""


class AdapterRules(Section):
    """Released adapters that this site receives, of those that their terms admit. Without the table: all."""

    purposes: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | Literal["any"]
    """Purposes for which it receives adapters, each as a study states it."""
    private: bool
    """Whether it receives only adapters of private studies."""
    own: bool
    """Whether it receives only adapters that its own records are in."""


class ScanRules(Section):
    """What a scan of the training files must find. Without the table, a site needs no scan."""

    max_rate: dict[str, Annotated[float, Field(ge=0, le=1)]]
    """Largest share of records, by kind of identifier or fault of texts (`privet.client.scan.kinds`)."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if unknown := sorted(self.max_rate.keys() - set(COUNTED)):
            raise ValueError(f"max_rate: expected names among {', '.join(COUNTED)}; found {', '.join(unknown)}")
        return self


class SitePolicy(Section):
    """A site's policy. Every key is mandatory, so that a rule which is left out never allows anything."""

    version: Literal[1]
    approval: Literal["person", "rule"]
    """person: a person also approves each study with `privet site approve`. rule: the rules alone decide."""
    persons: Annotated[int, Field(ge=1, le=8, exclude_if=lambda value: value == 1)] = 1
    """Number of people that must approve a study, each with a key of their own (`[approvers]` in the site file)."""
    model: ModelRules
    tasks: TaskRules
    privacy: PrivacyRules
    cohort: CohortRules
    metrics: MetricRules
    limits: LimitRules
    adapters: Annotated[AdapterRules | None, Field(exclude_if=lambda value: value is None)] = None
    scan: Annotated[ScanRules | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _rules_decide(self) -> Self:
        if self.approval == "rule" and "any" in (self.model.bases, self.model.targets):
            raise ValueError('approval: "rule" needs lists for model.bases and model.targets; "any" needs "person"')
        if self.approval == "rule" and self.persons > 1:
            raise ValueError('persons: expected 1 beside approval = "rule", as no person approves then')
        return self


@dataclass(frozen=True)
class Facts:
    """The inputs of a verdict besides policy and study.

    Attributes:
        now: Time, with a time zone.
        approved: Whether a person has approved this very study.
        refused: Whether a person has refused this very study, after any approval.
        declared: The site's declared count.
        began_before: When other studies began at this site in the 24 hours before this one began, or before now; in
            order.
        upload_bytes: Size of the update that is to be released; None while there is no update.
        patient_column: Column that identifies patients at this site; None where the site file names none.
        floor: The site's minima for secure aggregation.
        site: The site's name; empty if a study's ranks of sites do not count.
    """

    now: datetime
    approved: bool
    declared: int | None
    began_before: tuple[datetime, ...]
    upload_bytes: int | None = None
    patient_column: str | None = None
    floor: Floor = field(default_factory=Floor)
    site: str = ""
    refused: bool = False


def judge_adapter(policy: SitePolicy, study: Study, *, own: bool) -> tuple[Finding, ...]:
    """Return the findings of the policy against receiving a released adapter; empty if the policy admits it.

    Args:
        policy: The site's policy.
        study: The study that made it.
        own: Whether this site's records are in it.
    """
    rules, found = policy.adapters, []
    if rules is None:
        return ()
    purpose = None if study.release is None else study.release.purpose
    if rules.purposes != "any" and purpose not in rules.purposes:
        asked = "no stated purpose" if purpose is None else f"the purpose {purpose!r}"
        found.append(_finding("E_ADAPTER_PURPOSE", "adapters.purposes", asked, _listed(rules.purposes)))
    if rules.private and not study.private:
        found.append(_finding("E_ADAPTER_NOT_PRIVATE", "adapters.private", "no privacy", "adapters of private studies"))
    if rules.own and not own:
        asked, allowed = "an adapter without this site's records", "adapters with this site's records"
        found.append(_finding("E_ADAPTER_NOT_OWN", "adapters.own", asked, allowed))
    return tuple(found)


def judge(policy: SitePolicy, study: Study, facts: Facts, *, thorough: bool = True) -> tuple[Finding, ...]:
    """Return the findings of the policy against a study; empty if the policy admits it.

    The noise of a private study is calibrated last: that may take 10 s and 1.5 GB, where all other rules take none.

    Args:
        policy: The site's policy.
        study: The study.
        facts: What else the verdict depends on.
        thorough: Whether to judge the noise and the room for units also of a study that another rule refuses or
            nobody approved, for an operator who looks at it. Whoever else asks gets an answer that costs nothing.

    Raises:
        StudyError: No noise gives the study's epsilon and delta, or the study has too many steps.
    """
    # All of them, not the first: an operator and a coordinator can then correct a study in one step.
    found = [
        *_model(policy.model, study, facts),
        *_tasks(policy.tasks, study),
        *_privacy(policy.privacy, study, facts),
        *_column(study, facts),
        *_real(study),
        *_permit(study, facts),
        *_cohort(policy.cohort, study),
        *_suite(study, facts),
        *_metrics(policy.metrics, study),
        *_limits(policy.limits, study, facts),
    ]
    unapproved = policy.approval == "person" and not facts.approved
    told = thorough or not (found or unapproved or facts.refused)
    if told:
        # To a coordinator only where the consent would declare the count: whoever sends studies could bisect it.
        found = [*_room(study, facts), *found]
    if study.private and told:
        found += _noise(policy.privacy, study)
    if facts.refused:
        found.append(_finding("E_REFUSED", "approval", study.digest, "a study that nobody here has refused"))
    elif unapproved:
        found.append(_finding("E_NOT_APPROVED", "approval", study.digest, "a study that a person has approved"))
    return tuple(found)


def base_digest(study: Study) -> str:
    """Return the digest of a study's base: the digest of the canonical JSON of its files' names and digests."""
    return digest(canonical_json(study.model.sha256))


def _model(rules: ModelRules, study: Study, facts: Facts) -> Iterator[Finding]:
    base = base_digest(study)
    if rules.bases != "any" and base not in rules.bases:
        yield _finding("E_BASE", "model.bases", base, _listed(rules.bases))
    if study.kind == "statistics":  # which has no adapter
        return
    targets = () if rules.targets == "any" else tuple(set(study.lora.targets) - set(rules.targets))
    if targets:
        yield _finding("E_TARGETS", "model.targets", _listed(targets), _listed(rules.targets))
    full = set(study.lora.modules_to_save) - set(rules.full_modules)
    if full:
        yield _finding("E_FULL_MODULES", "model.full_modules", _listed(full), _listed(rules.full_modules))
    yield from _at_most("E_RANK", "model.max_rank", study.rank_at(facts.site), rules.max_rank)


def _tasks(rules: TaskRules, study: Study) -> Iterator[Finding]:
    if study.task.kind not in rules.allow:
        yield _finding("E_TASK", "tasks.allow", study.task.kind, _listed(rules.allow))


def _privacy(rules: PrivacyRules, study: Study, facts: Facts) -> Iterator[Finding]:
    if not study.private:
        if rules.required:
            yield _finding("E_NOT_PRIVATE", "privacy.required", "no privacy", "private studies")
        return
    promise = study.privacy.promise
    if study.privacy.unit != rules.unit:
        yield _finding("E_UNIT", "privacy.unit", study.privacy.unit, rules.unit)
    yield from _at_most("E_EPSILON", "privacy.max_epsilon", promise.epsilon, rules.max_epsilon)
    yield from _at_most("E_DELTA", "privacy.max_delta", promise.delta, rules.max_delta)
    yield from _alone(rules, study)
    if study.privacy.noise == "banded" and not rules.banded_noise:
        yield _finding("E_BANDED", "privacy.banded_noise", "banded noise", "independent noise")
    if study.privacy.noise == "banded" and not quorums_meet(study):
        # The proof needs to know who is in a sum before a later sum is out.
        asked = f"{len(study.cohort.sites)} sites in cohort.sites, and cohorts of {study.cohort.min_sites} of them"
        allowed = "for banded noise, cohort.sites names the sites, and cohort.min_sites is close to their number"
        yield _finding("E_BANDED_COHORT", "privacy.banded_noise", asked, allowed)
    yield from _at_most("E_CLIP_NORM", "privacy.max_clip_norm", largest_clip_norm(study), rules.max_clip_norm)
    if facts.declared is None or facts.declared < rules.min_units:
        # Not even the declared count is told: a refusal must not answer questions about the size of the data.
        yield _finding(
            "E_UNITS", "privacy.min_units", "what this site declares", f"a declared count of at least {rules.min_units}"
        )


def _noise(rules: PrivacyRules, study: Study) -> Iterator[Finding]:
    """Judge the noise, which has to be calibrated first."""
    mechanism = plan(study)
    if mechanism is not None:
        # Training and validation are separate releases; the rule holds for the one with less noise.
        noise = min(event.noise_multiplier for event in mechanism.kinds)
        yield from _at_least("E_NOISE", "privacy.min_noise_multiplier", noise, rules.min_noise_multiplier)


def _column(study: Study, facts: Facts) -> Iterator[Finding]:
    """Judge the column of a study that names patients as its unit: the site says who its patients are."""
    # Compared exactly: `Patient` may be another column of the same file.
    if study.privacy.unit != "patient" or (study.data.unit is not None and study.data.unit == facts.patient_column):
        return
    named = facts.patient_column
    allowed = "no column: the site file names no patient_column" if named is None else f"column {named}"
    asked = "no column" if study.data.unit is None else f"column {study.data.unit}"
    yield _finding("E_UNIT_COLUMN", "patient_column", asked, allowed)


def _room(study: Study, facts: Facts) -> Iterator[Finding]:
    """Judge whether the study has room for the units that the site declares."""
    most = study.aggregation.largest_count
    if facts.declared is not None and facts.declared > most:
        asked = f"at most {most} units of a site (aggregation.largest_count)"
        yield _finding("E_LARGEST_COUNT", "declared_count", asked, "a study with room for what this site declares")


def _real(study: Study) -> Iterator[Finding]:
    fields = simulation_fields(study)
    if fields:
        yield _finding("E_SIMULATION", "simulation", _listed(fields), "no field that is for simulations alone")


def _permit(study: Study, facts: Facts) -> Iterator[Finding]:
    """Judge the study's permit by this site's clock, whatever the policy says."""
    if permit_ended(study, facts.now):
        yield _finding(*PERMIT, permit_asked(study), PERMIT_ALLOWED)


def _alone(rules: PrivacyRules, study: Study) -> Iterator[Finding]:
    """Judge the epsilon of this site's part alone: the study's epsilon where noise is local, else `epsilon_alone`."""
    most = rules.max_epsilon_alone
    alone = study.privacy.epsilon_alone if study.distributed else study.privacy.epsilon
    if most == "any" or (alone is not None and alone <= most):
        return
    asked = "noise that other sites must add" if alone is None else f"{alone:g}"
    yield _finding("E_ALONE", "privacy.max_epsilon_alone", asked, f"at most {most:g}")


def largest_clip_norm(study: Study) -> float:
    """Return the largest clip norm that a private study can reach: an adaptive one changes within a round."""
    clip_norm = study.privacy.promise.clip_norm
    if study.privacy.clipping != "adaptive":
        return clip_norm
    growth = study.privacy.quantile_rate * study.training.steps
    return clip_norm * math.exp(growth) if growth < 700 else math.inf


def _cohort(rules: CohortRules, study: Study) -> Iterator[Finding]:
    yield from _at_least("E_COHORT", "cohort.min_sites", smallest_sum(study), rules.min_sites)
    if study.secure_aggregation.mode == "masked":
        yield from _at_least("E_THRESHOLD", "cohort.min_threshold", opening_threshold(study), rules.min_threshold)
    elif rules.secure_aggregation == "required":
        yield _finding("E_NOT_MASKED", "cohort.secure_aggregation", "plain", "masked")


def _suite(study: Study, facts: Facts) -> Iterator[Finding]:
    """Judge how sites agree on masks. All that `[floor]` says besides is about the parameters of a round."""
    suite, accepted = suite_of(study), accepted_suites(facts.floor)
    if study.secure_aggregation.mode == "masked" and suite not in accepted:
        rule = "floor.fips" if facts.floor.fips else "floor.classical"
        yield _finding("E_SUITE", rule, suite.value, _listed([each.value for each in accepted]))


def opening_threshold(study: Study) -> int:
    """Return the number of sites whose shares unmask a round, in the smallest cohort or group that a study admits."""
    asked, groups = study.secure_aggregation, smallest_groups(study)
    # In a complete graph the threshold grows with the group and with who may be corrupt; a cohort may be any of these.
    pairs = [(corrupt_sites(study, cohort), sites) for sites, cohort in groups]
    complete = [graph.quorum(sites, corrupt) for corrupt, sites in pairs if sites <= graph.COMPLETE_UP_TO]
    if complete:
        return min(complete)
    corrupt, sites = pairs[0]
    return graph.choose(sites, corrupt, fraction_of(asked.dropout_fraction, sites), asked.security).threshold


def _metrics(rules: MetricRules, study: Study) -> Iterator[Finding]:
    if study.data.validation_fraction > 0 and "validation" not in rules.allow:
        yield _finding("E_METRICS", "metrics.allow", "validation", _listed(rules.allow))
    if study.counts and study.kind not in rules.allow:
        yield _finding("E_METRICS", "metrics.allow", study.kind, _listed(rules.allow))


def _limits(rules: LimitRules, study: Study, facts: Facts) -> Iterator[Finding]:
    yield from _at_most("E_ROUNDS", "limits.max_rounds", study.rounds, rules.max_rounds)
    if len(facts.began_before) >= rules.max_studies_per_day:
        again = (facts.began_before[-rules.max_studies_per_day] + DAY).astimezone(UTC)
        within = f"{rules.max_studies_per_day} that begin within 24 hours"
        allowed = f"{within}; the next one from {again:%Y-%m-%d %H:%M} UTC on"
        yield _finding("E_STUDIES_PER_DAY", "limits.max_studies_per_day", "one more study", allowed)
    if facts.upload_bytes is not None:
        yield from _at_most("E_UPLOAD", "limits.max_upload_bytes", facts.upload_bytes, rules.max_upload_bytes)
    now = facts.now.astimezone(UTC)
    if not any(_within(window, now.hour * 60 + now.minute) for window in rules.hours_utc):
        yield _finding("E_HOURS", "limits.hours_utc", f"{now:%H:%M}", _listed(rules.hours_utc))


def _within(window: str, minute: int) -> bool:
    """Return whether a minute of the day is in a window. The end of the window is not part of it."""
    match = _WINDOW.fullmatch(window)
    if match is None:
        return False
    a, b, c, d = (int(part) for part in match.groups())
    start, end = a * 60 + b, c * 60 + d
    return start <= minute < end if start < end else minute >= start or minute < end


def _at_most(code: str, rule: str, asked: float, most: float) -> Iterator[Finding]:
    if not asked <= most:  # written so that NaN is refused
        yield _finding(code, rule, f"{asked:g}", f"at most {most:g}")


def _at_least(code: str, rule: str, asked: float, least: float) -> Iterator[Finding]:
    if not asked >= least:  # written so that NaN is refused
        yield _finding(code, rule, f"{asked:g}", f"at least {least:g}")


def _listed(values: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def _finding(code: str, rule: str, asked: str, allowed: str) -> Finding:
    return Finding(code, rule, one_line(asked), one_line(allowed))


# --- the file --------------------------------------------------------------------------------------------------


def load_policy(path: Path) -> SitePolicy:
    """Read a policy.

    Raises:
        StudyError: The file is missing, not TOML, or not a policy: a key is wrong, unknown or missing.
        StateError: Other users of this machine may write it.
    """
    try:
        if path.exists() and path.stat().st_mode & 0o022:
            raise StateError(
                f"other users of this machine can write to the policy file {path}", f"run `chmod go-w {path}`"
            )
        return validate(SitePolicy, read_toml(path, what="policy"), what=f"policy {path.name}")
    except PrivetError as error:
        error.private = True  # its text quotes the policy file, which stays at the site
        raise


def refuse(site: str, study: Study, policy: str, findings: Sequence[Finding]) -> PolicyError:
    """Return the error with which a site refuses a study. `policy` is the digest of the site's rules."""
    reasons = "; ".join(f"{each.code}: {each.rule}: asked {each.asked}, allowed {each.allowed}" for each in findings)
    if findings[0].code == "E_NOT_APPROVED":
        message = f"site {site} has not approved study {study.name} ({study.digest[:19]})"
        hint = "ask the site's operator to read the study and run `privet site approve SITE STUDY`"
    elif findings[0].code == "E_REFUSED":
        message = f"a person at site {site} has refused study {study.name} ({study.digest[:19]})"
        hint = "ask the site's operator for the reason, which stays at the site; an approval would take it back"
    else:
        message = f"the policy of site {site} refuses study {study.name} ({study.digest[:19]}): {reasons}"
        hint = "change the study, or ask the site's operator to change the policy"
        if all(each.code in PASSING for each in findings):
            hint = "wait, as this passes with time; then go on with `privet coordinator resume RUN`"
    return PolicyError(message, hint, tuple(findings), policy)
