"""What the labels of a site's files mean in a study: asked by `privet site setup` and `privet site approve`.

A site may spell labels as it likes: J where the study says yes. The site file holds the mapping, in `format.labels`.
It is never guessed: a person says what each label means, and each answer is written at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import typer

from privet.client.commands.guide import Guide
from privet.client.commands.policy import named_study
from privet.client.training.examination import foreign_labels, label_command, labels_of
from privet.common.errors import PrivetError, StudyError
from privet.common.study.study import Study


def ask_labels(guide: Guide, given: Mapping[str, str], study: str | None) -> None:
    """Write what labels mean: what options say, and what a person says of the others that a study does not have.

    Args:
        guide: The set-up.
        given: The label of a study for a label of the files.
        study: A study as `named_study` takes it; without one, the studies count that the coordinator proposes now.

    Raises:
        StudyError: A given label means none of the labels of these studies.
        PrivetError: As `named_study`.
    """
    studies = asked_studies(guide, study)
    known = dict.fromkeys(label for each in studies for label in labels_of(each))
    for label, meant in given.items():
        if known and meant not in known:
            raise _no_label(guide.file, label, meant, list(known))
        if label in known and label != meant:
            raise StudyError(
                f"--label {label}={meant}: expected a label of the files that the study does not have, found {label}, "
                "which the study has",
                "leave this --label out; a label that the study has keeps its meaning",
            )
    if given:
        mapped = {} if guide.site.format is None else guide.site.format.labels
        found = {label for each in studies for label in foreign_labels(each, guide.site)} | mapped.keys()
        if studies and (absent := [label for label in given if label not in found]):
            typer.echo(f"WARNING: no file of this site has the label {', '.join(absent)} now", err=True)
        elif not studies:
            typer.echo("labels   no study is proposed now, so what these labels mean was not compared with one")
        _write(guide, given)
    for each in studies:
        settle(guide, each, known)


def settle(guide: Guide, study: Study, known: Mapping[str, object]) -> bool:
    """Ask what the labels mean that a study does not have, and return whether something was written.

    Args:
        guide: Asks. Under --yes, only what differs in case and blanks alone is written.
        study: The study.
        known: Labels that count as mapped: of this study, and of others that the site is asked for.
    """
    site = guide.site
    mapped = {} if site.format is None else site.format.labels
    found = {label: meant for label, meant in foreign_labels(study, site).items() if mapped.get(label) not in known}
    if not found:
        return False
    labels = labels_of(study)
    guide.explain(
        "How labels are written",
        f"The study {study.name} has the labels {', '.join(labels)}. Your files also have {', '.join(found)}. Say "
        "which label of the study each of these means. The site file keeps it; your data files are not changed.",
    )
    if site.format is not None and any("labels" in own.model_fields_set for own in site.format.files.values()):
        guide.say("[format.files] in the site file sets labels of single files. Complete them there by hand.")
        return False
    wrote = False
    for label, meant in found.items():
        answer = guide.ask(
            f"{label} means ({', '.join(labels)}; Enter: decide later)" if meant == "?" else f"{label} means",
            f"--label {shlex.quote(f'{label}=LABEL')}",
            partial(_one_of, guide.file, label, labels),
            "" if meant == "?" else meant,
        )
        if answer:
            _write(guide, {label: answer})
            wrote = True
    if left := foreign_labels(study, guide.site):
        guide.say(f"Not mapped yet: {', '.join(left)}. Until then the site refuses the study. To map them:")
        guide.say(f"{label_command(guide.file, left, study)}.")
    return wrote


def asked_studies(guide: Guide, study: str | None) -> list[Study]:
    """Return the study that is named, as `named_study` takes it; without one, those that are proposed now."""
    site = guide.site
    if study is not None:
        return [named_study(guide.file, site, study, read=not guide.yes)[0]]
    from privet.client.network.proposals import proposed_studies

    try:
        found = [each.study for each in proposed_studies(guide.file, site) if not each.ended]
    except PrivetError:
        return []  # the checks at the end say what is wrong; `privet site approve` asks again
    # Studies that read the same labels from the same columns are one question.
    questions = {(labels_of(each), tuple(sorted(each.data.columns.items())), each.data.unit): each for each in found}
    return list(questions.values())


def _one_of(file: Path, label: str, labels: Sequence[str], answer: str) -> str:
    if answer and answer not in labels:
        raise _no_label(file, label, answer, labels)
    return answer


def _no_label(file: Path, label: str, meant: str, labels: Sequence[str]) -> StudyError:
    return StudyError(
        f"the label {label}: expected one of {', '.join(labels)}, found {meant}",
        f"run `privet site setup {file} --label {shlex.quote(f'{label}=LABEL')}` with one of these",
    )


def _write(guide: Guide, more: Mapping[str, str]) -> None:
    site = guide.site
    guide.put(**{"format.labels": {**({} if site.format is None else site.format.labels), **more}})
