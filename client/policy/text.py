"""A site's policy in words, and a first one to start from."""

from __future__ import annotations

from collections.abc import Sequence

from privet.client.policy.rules import SitePolicy

EXAMPLE = """\
# What this site admits. Every key has to be there; what is not said is not allowed.
# `privet site policy SITE` says in words what this means; `privet site check SITE STUDY` tries it on a study.
version = 1
approval = "person"              # someone also approves each study; "rule": what the rules admit is approved

[model]
bases = []                       # digests of bases, as `privet site check` prints a study's; or "any", for a person
targets = ["q_proj", "v_proj", "query", "value"]
full_modules = []                # modules trained in full besides the task's head
max_rank = 16

[tasks]
allow = ["text-classification", "token-classification", "causal-lm"]

[privacy]
required = true
unit = "patient"                 # whom a study must protect: "record" or "patient"
max_epsilon = 2.0                # of one study; the dataset's lifetime is `[limit]` in the site file
max_delta = 1e-6
max_epsilon_alone = 2.0          # whatever other sites do; "any" admits noise that is shared among sites
min_noise_multiplier = 0.6
max_clip_norm = 1.0
min_units = 500                  # least count that this site must have declared

[cohort]
secure_aggregation = "required"
min_sites = 3                    # least number of sites summed
min_threshold = 3                # least number of sites whose shares open a round

[metrics]
allow = []                       # "validation": noisy sums of loss and accuracy on held-out units

[limits]
max_rounds = 50
max_studies_per_day = 2
max_upload_bytes = 67108864
hours_utc = ["00:00-00:00"]      # the whole day; or such as ["18:00-06:00"]
"""


def explain_policy(policy: SitePolicy) -> list[str]:
    """Return what a policy says, one sentence for each thing."""
    model, privacy, cohort, limits = policy.model, policy.privacy, policy.cohort, policy.limits
    person = policy.approval == "person"
    masked = cohort.secure_aggregation == "required"
    return [
        "Someone at this site approves each study." if person else "What these rules admit is approved by itself.",
        f"Bases: {_listed(model.bases)}.",
        f"Adapters of rank {model.max_rank} or less on the layers {_listed(model.targets)}; "
        f"trained in full besides the task's head: {_listed(model.full_modules)}.",
        f"Tasks: {_listed(policy.tasks.allow)}.",
        "Every study is private." if privacy.required else "Studies WITHOUT privacy are admitted too.",
        f"A private study protects each {privacy.unit} with epsilon {privacy.max_epsilon:g} or less at delta "
        f"{privacy.max_delta:g} or less, noise multiplier {privacy.min_noise_multiplier:g} or more and clip norm "
        f"{privacy.max_clip_norm:g} or less, if this site declares {privacy.min_units} units or more.",
        "Its noise may be shared among sites, so that it takes several of them to keep the promise."
        if privacy.max_epsilon_alone == "any"
        else f"Whatever other sites do, what leaves for a study costs epsilon {privacy.max_epsilon_alone:g} or less.",
        "Updates are always masked." if masked else "Updates may travel in the CLEAR: the coordinator then sees them.",
        f"At least {cohort.min_sites} sites are summed, and it takes {cohort.min_threshold} of them to open a round.",
        f"Besides updates there may leave: {_listed(policy.metrics.allow)}.",
        f"At most {limits.max_rounds} rounds for a study, {limits.max_studies_per_day} new studies in 24 hours, and "
        f"{limits.max_upload_bytes} bytes for an update.",
        f"Hours (UTC): {_listed(limits.hours_utc)}.",
    ]


def _listed(values: Sequence[str]) -> str:
    return values if isinstance(values, str) else ", ".join(values) or "none"
