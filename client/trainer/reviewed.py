"""Whether a trainer apart may run at all. Loads nothing of a model: a console asks this too."""

from __future__ import annotations

import os

from privet.client.site import SiteConfig
from privet.common.errors import StateError

UNREVIEWED = "PRIVET_UNREVIEWED_TRAINER"
"""Name of the environment variable that admits trainers apart although their review is not complete: 1."""


def require_reviewed(config: SiteConfig) -> None:
    """Raise `StateError` for a trainer apart, unless whoever serves the site has admitted it as it is."""
    if config.resources.trainer != "inside" and os.environ.get(UNREVIEWED) != "1":
        raise StateError(
            f"resources.trainer: a trainer apart ({config.resources.trainer}) is refused, as its review is not "
            "complete",
            'set trainer = "inside" under [resources] in the site file; to try it on records that need no protection, '
            f"set {UNREVIEWED}=1 in the environment of `privet site serve SITE`",
        )
