"""The steps and questions of `privet site setup`, from membership to a site that can serve.

Each step goes on with what is not done yet. Each answer is written to the site file at once, so that the command may be
stopped at any question.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import click
import typer

from privet.client.commands.enrolment import newest_terms
from privet.client.editing import toml_value
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, confirm
from privet.client.network.rotation import confirm_charter
from privet.client.policy.rules import load_policy
from privet.client.policy.text import first_policy
from privet.client.setup import anchor_file, change, check_anchor, create_books, move_anchor, relative_to, safe_delta
from privet.client.site import IdRule, SiteConfig, load_site
from privet.client.trust import read_trusted
from privet.common.clock import now
from privet.common.errors import DataError, PrivetError, StateError, StudyError, VerificationError
from privet.common.files import write_new
from privet.common.progress import number_of, printable

_Answer = TypeVar("_Answer")
_ATTEMPTS = 3
_EPSILON = 8.0
_ANCHOR = "ledger-head.json"


@dataclass(frozen=True)
class Guide:
    """The questions of one set-up.

    Attributes:
        file: The site file.
        yes: Whether to take defaults instead of asking.
    """

    file: Path
    yes: bool

    @property
    def site(self) -> SiteConfig:
        """The site file as it is now."""
        return load_site(self.file)

    def put(self, **values: object) -> None:
        """Write values to the site file, at once."""
        change(self.file, values)
        for name, value in values.items():
            typer.echo(printable(f"  {name} = {toml_value(value) if isinstance(value, Mapping) else value}"))

    def explain(self, title: str, text: str) -> None:
        """Print what a choice means."""
        typer.echo(f"\n{title}")
        self.say(text)

    def say(self, text: str) -> None:
        """Print a text, indented."""
        width = max(min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
        typer.echo(
            textwrap.fill(
                text, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        )

    def ask(self, question: str, option: str, read: Callable[[str], _Answer], default: str | None = None) -> _Answer:
        """Return an answer: the default under --yes, otherwise what a person types, who is asked again if it is wrong.

        Args:
            question: What is asked.
            option: The option that answers it.
            read: Returns the answer that a text means; raises `StudyError` if it means none.
            default: What an empty line means.

        Raises:
            StudyError: There is no default, and --yes forbids to ask; or the third answer is wrong too.
            StateError: The person, or the end of the input, stopped the set-up.
        """
        for left in reversed(range(_ATTEMPTS)):
            answer = self._typed(question, option, default)
            try:
                if not answer and default is None:
                    raise StudyError(f"{question}: this question has no default", f"add the option {option}")
                return read(answer)
            except StudyError as error:
                if self.yes or not left:
                    raise
                self.say(f"{error.message}. Answer again.")
        raise AssertionError("the last attempt returns or raises")

    def _typed(self, question: str, option: str, default: str | None) -> str:
        if self.yes:
            if default is None:
                raise StudyError(
                    f"{question}: there is no safe default",
                    f"add the option {option} to the command, or leave out --yes to be asked",
                )
            return default
        try:
            return str(typer.prompt(f"  {question}", default=default or "", show_default=bool(default))).strip()
        except click.Abort:
            raise self._stopped(question, option) from None

    def confirm(self, question: str, option: str, *, default: bool = False) -> bool:
        """Return whether a person agrees; the default under --yes."""
        if self.yes:
            return default
        return self.ask(f"{question} (y/n)", option, _agreed, "y" if default else "n")

    def _stopped(self, question: str, option: str) -> StateError:
        return StateError(
            f"the set-up stopped at: {question}. All answers before it are in {self.file}",
            f"run `privet site setup {self.file}` again to go on"
            + (f", or answer with the option {option}" if option else ""),
        )


def _agreed(answer: str) -> bool:
    if answer.lower() not in ("y", "yes", "n", "no"):
        raise StudyError(f"expected y or n, found {answer!r}", "type y or n")
    return answer.lower().startswith("y")


def ask_machine(guide: Guide, device: str | None, bases: Sequence[str]) -> None:
    """Write what the site trains on, and where its bases are, if options say so."""
    if device is not None:
        guide.put(**{"resources.device": device})
    for name, path in pairs_of("--base", bases).items():
        guide.put(**{f"resources.bases.{name}": relative_to(guide.file, Path(path))})


def ask_trust(guide: Guide, charter: str | None, members: dict[str, str]) -> None:
    """Confirm the consortium and each member that is not confirmed."""
    directory, terms = guide.file.parent, newest_terms(guide.file.parent)
    path = guide.site.trusted
    trusted = None if path is None else read_trusted(path)
    if trusted is None:
        return
    names = [keys.site for keys in terms.members]
    if unknown := sorted(members.keys() - set(names)):
        raise StudyError(
            f"--member: expected another member of the consortium ({', '.join(names) or 'it has no other'}), found "
            f"{', '.join(unknown)}",
            f"run `privet site roster {guide.file}`, which lists the members",
        )
    if trusted.charter is None or charter is not None:
        guide.explain(
            "Trust: the consortium",
            "The coordinator's operator reads you twelve words over the telephone (`privet coordinator charter`). They "
            "stand for the keys of consortium and round log; this site believes nothing else about them.",
        )
        _confirm(guide, directory, None, terms.consortium, charter, "--charter")
    for keys in terms.members:
        if trusted.keys.get(keys.site) != keys or keys.site in members:
            guide.explain(
                f"Trust: site {keys.site}",
                f"The operator of {keys.site} reads you twelve words over the telephone (`privet site roster`). Masks "
                "are agreed with these keys. Ask the other site, not the coordinator.",
            )
            told = members.get(keys.site)
            _confirm(guide, directory, keys.site, keys.site, told, f"--member {keys.site}=WORDS")


def _confirm(guide: Guide, directory: Path, name: str | None, what: str, told: str | None, option: str) -> None:
    for left in reversed(range(_ATTEMPTS)):
        words = told or guide.ask(f"Twelve words of {what} (Enter: later)", option, str, "")
        if not words:
            typer.echo(f"  {what} is not confirmed yet; the site takes part in no round before")
            return
        try:
            if name is None:
                confirm_charter(guide.file, ConsortiumClient(Enrolment(directory), now), words)
            else:
                confirm(directory, name, words)
        except VerificationError as error:
            if told or not left:
                raise
            guide.say(f"{error.message}. Have them read out again.")
            continue
        typer.echo(f"  confirmed: {what}")
        return


def ask_data(guide: Guide, train: list[Path] | None, test: list[Path] | None) -> None:
    """Name the files of training and test data."""
    if train is None and guide.site.train and all(path.is_file() for path in guide.site.train):
        typer.echo(f"data: {number_of(len(guide.site.train), 'file')} of training data")
    else:
        if train is None:
            guide.explain(
                "Data files",
                "Your files stay here; nothing but updates of a model leaves. CSV, JSON Lines or Parquet, several "
                "separated by commas.",
            )
            guide.put(train=guide.ask("Files of training data", "--train FILE", lambda given: _listed(guide, given)))
        else:
            guide.put(train=_files(guide, train, "--train"))
    if test is not None:
        guide.put(test=_files(guide, test, "--test"))
    _take_formats(guide)


def _listed(guide: Guide, given: str) -> list[str]:
    return _files(guide, [Path(part.strip()).expanduser() for part in given.split(",") if part.strip()], "--train")


def _take_formats(guide: Guide) -> None:
    """Write how the files seem to be written, where that is the same for all of them and a person agrees."""
    from privet.client.training.proposals import letters_of, proposed

    site = guide.site
    files = [path for path in (*site.train, *site.test) if path.is_file()]
    first, *others = [proposed(path, (), site.form_of(path)) for path in files] or [{}]
    if not first or any(other != first for other in others):
        return
    settings = ", ".join(f"{name} = {value}" for name, value in first.items())
    names = ", ".join(path.name for path in files)
    guide.explain("How the files are written", f"Without a setting, {names} cannot be read. What fits: {settings}.")
    if "encoding" in first:
        letters = letters_of(files[0], first["encoding"])
        guide.say(f"Encodings look alike. Most frequent letters beyond ASCII in {files[0].name}: {letters}")
    if guide.confirm("Is this how they are written?", "", default=True):
        guide.put(**{f"format.{name}": value for name, value in first.items()})


def _files(guide: Guide, files: Sequence[Path], option: str) -> list[str]:
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise StudyError(
            f"{option}: there is no file {', '.join(missing) or 'named'}",
            f"check the path, then run `privet site setup {guide.file}` again, or add {option} FILE",
        )
    return [relative_to(guide.file, path) for path in files]


def ask_patients(guide: Guide, unit: str | None, column: str | None, rule: IdRule | None) -> None:
    """Say which column identifies patients, and how its ids are written."""
    from privet.client.training.glance import units_under

    site = guide.site
    by_record = unit == "record" or (unit is None and site.limit is not None and site.limit.unit == "record")
    if column is not None or (site.patient_column is None and not by_record):
        column = _column(guide, column)
    elif site.patient_column is not None:
        try:
            _one_of_columns(guide, site.patient_column)
        except StudyError as error:
            if guide.yes:
                raise
            guide.say(error.message)
            column = _column(guide, None)
    if column is not None and column != site.patient_column:
        guide.put(patient_column=column)
        site = guide.site
    if site.patient_column is not None and rule is None and site.patient_ids is None:
        counts = units_under(site, site.patient_column)
        proposed = "number" if counts.get("number") is not None else "text"
        guide.explain(
            "How ids are written",
            'number: whole numbers, so 101, "0101" and 101.0 are one patient. text: upper and lower case do not '
            "matter. case: they matter. If in doubt, choose what joins more: one patient taken for two breaks the "
            "promise.",
        )
        rule = guide.ask(
            "number, text or case", "--patient-ids", lambda answer: _id_rule(guide, answer, counts), proposed
        )
    elif rule is not None and site.patient_column is not None and (doubt := split_by(rule, counts_of(site))):
        guide.say(f"WARNING: {doubt}.")
    if rule is not None:
        guide.put(patient_ids=rule)


def counts_of(site: SiteConfig) -> dict[IdRule, int | None]:
    """Return the number of patients under each rule; nothing where the files do not say."""
    from privet.client.training.glance import units_under

    try:
        return {} if site.patient_column is None else units_under(site, site.patient_column)
    except DataError:
        return {}


def split_by(rule: IdRule, counts: Mapping[IdRule, int | None]) -> str:
    """Return why a rule may take one patient for two: another rule joins more ids. Empty if none does."""
    own = counts.get(rule)
    fewest = min((count, other) for other, count in counts.items() if count is not None) if own is not None else None
    if own is None or fewest is None or fewest[0] >= own:
        return ""
    least, other = fewest
    return (
        f"under {rule} the ids are {own} patients, under {other} {least}: some differ only in how they are written. A "
        "patient taken for two is protected less"
    )


def _column(guide: Guide, given: str | None) -> str | None:
    """Return the column that identifies patients: the given one, or what a person chooses; None if there is none."""
    if given is not None:
        return _one_of_columns(guide, given)
    from privet.client.training.glance import columns_named, columns_of

    site = guide.site
    found = columns_named(site, site.train[0], columns_of(site, site.train[0]))
    guide.explain(
        "Who a patient is",
        "A promise to a patient covers all rows of that patient, so the site has to know which rows these are. "
        "Choose the column that identifies patients. If no column does, type - : each row then counts by itself, "
        "and a patient with many rows is protected less.",
    )
    guide.say(f"Columns of {site.train[0].name}: {found}")
    return guide.ask(
        "Column of patients",
        "--patient-column COLUMN, or --unit record",
        lambda answer: None if answer == "-" else _one_of_columns(guide, answer),
    )


def _one_of_columns(guide: Guide, column: str) -> str:
    """Return a name if it is that of a column of every training file. Raises `StudyError` otherwise."""
    from privet.client.training.glance import check_column

    site = guide.site
    for path in site.train:
        check_column(site, path, column, f"run `privet site setup {guide.file} --patient-column COLUMN`")
    return column


def _id_rule(guide: Guide, answer: str, counts: Mapping[IdRule, int | None]) -> IdRule:
    for rule in get_args(IdRule):
        if answer != rule:
            continue
        if doubt := split_by(rule, counts):
            guide.say(f"{doubt}.")
            if not guide.confirm("Are they different patients?", "--patient-ids"):
                hint = f"run `privet site setup {guide.file} --patient-ids number`"
                raise StudyError(f"{rule} joins fewer ids than another rule", hint)
        return rule  # type: ignore[no-any-return]
    raise StudyError(
        f"expected number, text or case, found {answer!r}", f"run `privet site setup {guide.file} --patient-ids text`"
    )


def ask_count(guide: Guide, count: int | None) -> None:
    """Declare a count."""
    site = guide.site
    if count is None and site.declared_count is not None:
        return
    if count is not None and (found := _counted(site)) and not found <= 2 * count <= 4 * found:
        typer.echo(f"WARNING: this site declares {count} units, and its files have about {found}", err=True)
    if count is None:
        proposed = _counted(site)
        guide.explain(
            "Declared count",
            "The number of units (patients, or rows) that this site declares. It is the site's weight in the sum, it "
            "is public, and it stays the same over a study. Give a round number.",
        )
        default = None if proposed is None else str(proposed)
        count = guide.ask("Declared count", "--declared-count NUMBER", lambda answer: _count(guide, answer), default)
    guide.put(declared_count=count)


def _count(guide: Guide, answer: str) -> int:
    if not answer.isdecimal() or not int(answer):
        raise StudyError(
            f"expected a whole number from 1 up, found {answer!r}",
            f"run `privet site setup {guide.file} --declared-count NUMBER`",
        )
    return int(answer)


def _counted(site: SiteConfig) -> int | None:
    """Return the number of units in the training files, rounded; None where the files do not say."""
    from privet.client.training.examination import proposed_count
    from privet.client.training.glance import count_units

    try:
        return proposed_count(count_units(site))
    except DataError as error:
        typer.echo(f"  the units were not counted: {error.message}")
        return None


def ask_limit(guide: Guide, unit: str | None, epsilon: float | None, delta: float | None) -> None:
    """Set what the dataset may spend in its lifetime."""
    site = guide.site
    if site.limit is not None and unit is None and epsilon is None and delta is None:
        return
    unit = unit or (site.limit.unit if site.limit else "patient" if site.patient_column else "record")
    before = (
        (_EPSILON, safe_delta(site.declared_count or 1))
        if site.limit is None
        else (site.limit.epsilon, site.limit.delta)
    )
    if site.limit is None and epsilon is None:
        guide.explain(
            "Limit",
            f"What this dataset may spend in its lifetime, over all studies: an epsilon for each {unit}. Smaller "
            f"protects more. One example study of privet costs {_EPSILON:g}, at the upper end of common use: a limit "
            "of the same size admits one such study, and then none ever again. What is spent is never given back.",
        )
        epsilon = _number(guide, "Largest epsilon", "--epsilon", before[0])
    if site.limit is None and delta is None:
        guide.explain(
            "Delta",
            "Roughly the chance that the promise fails. It lies well below 1 / units, as the default does.",
        )
        delta = _number(guide, "Delta", "--delta", before[1])
    epsilon, delta = (old if new is None else new for old, new in zip(before, (epsilon, delta), strict=True))
    guide.put(**{"limit.unit": unit, "limit.epsilon": epsilon, "limit.delta": delta})


def _number(guide: Guide, question: str, option: str, default: float) -> float:
    def read(answer: str) -> float:
        try:
            found = float(answer.replace(",", "."))
        except ValueError:
            found = math.nan
        if not found > 0 or (option == "--delta" and found >= 1):
            raise StudyError(
                f"expected a number above 0{' and below 1' if option == '--delta' else ''}, found {answer!r}",
                f"run `privet site setup {guide.file}` again, or add {option} NUMBER",
            )
        return found

    return guide.ask(question, f"{option} NUMBER", read, f"{default:g}")


def ask_anchor(guide: Guide, given: str | None, same_disk: bool) -> None:
    """Find a place for the ledger's anchor: a file, or a directory for it."""
    site = guide.site
    if given is None and site.anchor is not None and not same_disk:
        return
    if given is None and site.anchor is not None:
        anchor, same_disk = _accepted(guide, site.anchor, same_disk)
    elif given is None:
        guide.explain(
            "Anchor",
            "A small file with the last head of the privacy ledger. A ledger that is restored from an old backup "
            "forgets what was spent since. The site detects this, as the restored ledger does not match the anchor. So "
            "keep the anchor on another disk, which no backup restores together with the ledger. If there is no other "
            "disk, name a path on this one: the command states the risk, and asks whether you accept it.",
        )
        default = str(guide.file.parent / "anchor" / _ANCHOR) if same_disk else None
        anchor, same_disk = guide.ask(
            "File or directory on another disk",
            "--anchor PATH",
            lambda answer: _accepted(guide, anchor_file(site, answer), same_disk),
            default,
        )
    else:
        anchor, same_disk = _accepted(guide, anchor_file(site, given), same_disk)
    move_anchor(guide.file, anchor, same_disk=same_disk)
    typer.echo(f"  anchor = {anchor}")


def _accepted(guide: Guide, anchor: Path, same_disk: bool) -> tuple[Path, bool]:
    """Return the anchor's file, and whether it may lie on the ledger's disk. Raises `StudyError` if it must not."""
    site = guide.site
    if check_anchor(site, anchor) and not (same_disk or site.anchor_same_disk):
        fault = f"{anchor} is on the ledger's disk"
        if not anchor.parent.exists():
            fault = f"{anchor.parent} does not exist (is a disk not mounted?); made now, it is on the ledger's disk"
        guide.say(f"{fault}. One backup, or one snapshot, may then restore both.")
        same_disk = guide.confirm("Accept this?", "--anchor-same-disk")
        if not same_disk:
            raise StudyError(
                fault,
                f"name a path on another disk, `privet site setup {guide.file} --anchor PATH`, or accept this with "
                "--anchor-same-disk",
            )
    return anchor, same_disk


def ask_books(guide: Guide) -> None:
    """Create what is missing of ledger and witness."""
    site = guide.site
    if site.trusted is None or read_trusted(site.trusted).charter is None:
        typer.echo("ledger and witness are created once the consortium is confirmed")
        return
    for line in create_books(site):
        typer.echo(line)


def ask_policy(guide: Guide, shared_noise: bool, validation: bool | None) -> None:
    """Write a first policy where there is none."""
    site = guide.site
    if site.policy is None:
        return
    if site.policy.exists():
        try:
            load_policy(site.policy)
        except PrivetError as error:
            typer.echo(error.message)  # the checks below say what to do
        if shared_noise or validation is not None:
            typer.echo(
                f"WARNING: {site.policy} exists, and --shared-noise, --validation and --no-validation say what a first "
                f"policy admits. Nothing was changed; `privet site policy {guide.file} --admit WHAT` changes it",
                err=True,
            )
        return
    if not shared_noise:
        guide.explain(
            "Policy",
            "A first policy admits studies that are private, masked, within your limit, and that you have approved. In "
            "some studies sites share the noise: results are better, and the promise then depends on other sites.",
        )
        shared_noise = guide.confirm("Admit studies with shared noise?", "--shared-noise")
    if validation is None:
        guide.explain(
            "Quality",
            "In most studies, each site measures the model on units that are held out from training. Only the sum over "
            "sites leaves, masked, with noise, and it costs epsilon like training.",
        )
        question = "Admit noisy sums of loss and accuracy on held-out units?"
        validation = guide.confirm(question, "--validation or --no-validation", default=True)
    text = first_policy(site, shared_noise=shared_noise, validation=validation)
    write_new(site.policy, text.encode(), 0o644)
    typer.echo(f"policy   {site.policy}: read it, and change the rules that your site decides differently")


def pairs_of(option: str, values: Sequence[str]) -> dict[str, str]:
    """Return the values of an option of the form NAME=VALUE. Raises `StudyError` if one has another form."""
    pairs = dict(value.partition("=")[::2] for value in values)
    if not all(name and value for name, value in pairs.items()):
        raise StudyError(
            f"{option}: expected NAME=VALUE, found a value without one of both", f"write {option} NAME=VALUE"
        )
    if len(pairs) < len(values):
        raise StudyError(f"{option}: expected each name once, found one twice", f"name each with one {option}")
    return pairs
