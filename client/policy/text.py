"""A site's policy in words, and a first policy."""

from __future__ import annotations

from collections.abc import Sequence

from privet.client.editing import changed
from privet.client.policy.rules import MOST_LOST, AdapterRules, ScanRules, SitePolicy
from privet.client.site import SiteConfig

EXAMPLE = """\
# The studies that this site admits. Every key is mandatory: a missing or unknown key refuses every study.
# `privet site policy SITE` explains this file in words; `privet site check SITE STUDY` applies it to a study.
version = 1
approval = "person"              # a person also approves each study; "rule": the rules alone decide

[model]
bases = "any"                    # or a list of digests of bases, which `privet site check` prints
targets = ["query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
full_modules = []                # modules that may be trained in full, besides the task's head
max_rank = 16

[tasks]
allow = ["text-classification", "token-classification", "causal-lm", "preference"]

[privacy]
required = true
unit = "patient"                 # unit of privacy of every study: "record" or "patient"
max_epsilon = 8.0                # of one study; for the dataset's lifetime, set `[limit]` in the site file
max_delta = 1e-5
max_epsilon_alone = 8.0          # of this site's part alone; "any" admits noise that is shared among sites
min_noise_multiplier = 0.5
max_clip_norm = 1.0
min_units = 100                  # least count that this site must declare

[cohort]
secure_aggregation = "required"
min_sites = 3                    # least number of sites whose updates are summed
min_threshold = 3                # least number of sites whose shares unmask a round

[metrics]
allow = []                       # "validation": noisy sums of loss and accuracy on held-out units; "statistics",
                                 # "evaluate": noisy counts of studies that train nothing

[limits]
max_rounds = 50
max_studies_per_day = 2
max_upload_bytes = 67108864
hours_utc = ["00:00-00:00"]      # all day; at night only: ["18:00-06:00"]
max_lost_rounds = 5              # rounds in a row without a result that this site pays for

# [adapters]                     # released adapters that this site receives; without the table, all that terms admit
# purposes = "any"               # or a list of purposes, as studies state them
# private = true                 # only adapters of private studies
# own = false                    # only adapters with this site's records

# [scan]                         # a scan of the training files must be on record; without the table, none
# max_rate = { email = 0.0 }     # largest share of records with each kind, as `privet site scan` names them
"""

_MOST_EPSILON = 8.0


def first_policy(site: SiteConfig, *, shared_noise: bool = False, validation: bool = True) -> str:
    """Return a first policy for a site: it admits privet's example studies, once a person has approved one.

    Unit, epsilon and delta follow from the site file's `[limit]`, and the least count from its declared count.

    Args:
        site: The site file.
        shared_noise: Whether to admit studies whose noise the sites share.
        validation: Whether to admit noisy sums of loss and accuracy on held-out units, which `privet new` proposes.
    """
    limit, declared = site.limit, site.declared_count
    changes: dict[str, object] = {}
    if limit is not None:
        epsilon = min(limit.epsilon, _MOST_EPSILON)
        changes |= {"privacy.unit": limit.unit, "privacy.max_epsilon": epsilon, "privacy.max_delta": limit.delta}
        changes["privacy.max_epsilon_alone"] = epsilon
    if shared_noise:
        changes["privacy.max_epsilon_alone"] = "any"
    if validation:
        changes["metrics.allow"] = ["validation"]
    if declared is not None and declared < 100:
        changes["privacy.min_units"] = declared
    return changed(EXAMPLE, changes, "policy.toml")


def explain_policy(policy: SitePolicy) -> list[str]:
    """Return a policy in words, one sentence for each rule."""
    model, privacy, cohort, limits = policy.model, policy.privacy, policy.cohort, policy.limits
    person = policy.approval == "person"
    masked = cohort.secure_aggregation == "required"
    people = "A person" if policy.persons == 1 else f"{policy.persons} people, each with a key of their own,"
    approve = f"{people} at this site approve{'s' if policy.persons == 1 else ''} each study."
    return [
        approve if person else "These rules alone decide about each study.",
        f"Admitted bases: {_listed(model.bases)}.",
        f"Adapters have rank {model.max_rank} or less, on these layers: {_listed(model.targets)}.",
        f"Modules trained in full, besides the task's head: {_listed(model.full_modules)}.",
        f"Admitted tasks: {_listed(policy.tasks.allow)}.",
        "Every study must be private." if privacy.required else "Studies WITHOUT privacy are admitted too.",
        f"A private study protects each {privacy.unit}. It has epsilon {privacy.max_epsilon:g} or less, delta "
        f"{privacy.max_delta:g} or less, noise multiplier {privacy.min_noise_multiplier:g} or more and clip norm "
        f"{privacy.max_clip_norm:g} or less.",
        f"Private studies run only if this site declares {privacy.min_units} units or more.",
        "Sites may share the noise of a private study: the guarantee then depends on several sites."
        if privacy.max_epsilon_alone == "any"
        else f"This site's part of a study alone costs epsilon {privacy.max_epsilon_alone:g} or less.",
        *(["Sites may correlate the noise that they share over steps (banded noise)."] if privacy.banded_noise else []),
        "Updates are always masked." if masked else "Updates may be sent in the CLEAR: the coordinator sees them.",
        f"Each round sums the updates of at least {cohort.min_sites} sites. The sum can be unmasked only if at least "
        f"{cohort.min_threshold} sites reveal their shares.",
        f"Releases besides updates: {_listed(policy.metrics.allow)}.",
        f"A study has at most {limits.max_rounds} rounds.",
        f"At most {limits.max_studies_per_day} studies begin within 24 hours.",
        f"An update has at most {limits.max_upload_bytes} bytes.",
        f"It pays for at most {limits.max_lost_rounds or MOST_LOST} rounds in a row that lead to no result.",
        f"This site takes part in these hours (UTC): {_listed(limits.hours_utc)}.",
        *_adapters(policy.adapters),
        *_scan(policy.scan),
    ]


def _adapters(rules: AdapterRules | None) -> list[str]:
    if rules is None:
        return []
    private = " of private studies" if rules.private else ""
    own = " that its own records are in" if rules.own else ""
    purposes = "any purpose" if rules.purposes == "any" else f"these purposes: {_listed(rules.purposes)}"
    return [f"It receives adapters{private}{own}, for {purposes}."]


def _scan(rules: ScanRules | None) -> list[str]:
    if rules is None:
        return []
    limits = ", ".join(f"{name} in {rate:.2%}" for name, rate in sorted(rules.max_rate.items()))
    return [
        "It trains only on files that `privet site scan` has scanned as they are"
        + (f", and only if at most this share of records has: {limits}." if limits else ".")
    ]


def explain_patients(site: SiteConfig) -> str:
    """Return in one line which column identifies a site's patients, and how its ids are compared."""
    if site.patient_column is None:
        return "No column identifies patients, so studies that protect patients are refused."
    rules = {
        "number": 'Ids are whole numbers: 101, "0101" and 101.0 are one patient.',
        "text": "Ids are text, in which upper and lower case do not matter.",
        "case": "Ids are text, in which upper and lower case matter.",
        None: "No patient_ids is set: files with two spellings that may be one patient are refused.",
    }
    return f"Patients are identified by the column {site.patient_column}. {rules[site.patient_ids]}"


def _listed(values: Sequence[str]) -> str:
    return values if isinstance(values, str) else ", ".join(values) or "none"
