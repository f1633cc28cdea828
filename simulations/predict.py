"""Apply the adapter of a run directory to texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privet.client.bases.names import kept_bases
from privet.client.site import Resources
from privet.client.training.model import open_host
from privet.client.training.tasks import generate_answers, predict_classes, predict_tags
from privet.server.rounds.state import RunDirectory

_RESOURCES = Resources()


def predict_text(run: Path, texts: Sequence[str], resources: Resources = _RESOURCES) -> list[dict[str, Any]]:
    """Return one result per text: `probabilities` by label, `words` and `tags`, or an `answer`.

    Raises:
        StateError: `run` is not a run directory.
        VerificationError: The base on this machine does not have the digest in the study.
    """
    directory = RunDirectory.open(run)
    study, adapter = directory.study, directory.load().adapter
    host = open_host(study, resources.knowing(kept_bases(run)), begun=True)
    with host.lock:
        host.mount(adapter)
        if study.task.kind == "text-classification":
            return [{"probabilities": row} for row in predict_classes(host, study, texts)]
        if study.task.kind == "token-classification":
            return [{"words": t.split(), "tags": predict_tags(host, study, t.split())} for t in texts]
        return [{"answer": answer} for answer in generate_answers(host, study, texts)]
