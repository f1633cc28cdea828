"""The set-up of a site that has joined: what is missing, and how each part is made. Nothing here asks a question.

Each step can be repeated, and one that was interrupted goes on: it looks at what is there before it makes anything.
"""

from __future__ import annotations

import math
import os
import pwd
from pathlib import Path
from typing import Any

from privet.client.budget.chain import on_one_disk
from privet.client.budget.ledger import Ledger
from privet.client.budget.sealing import key_beside
from privet.client.budget.withdrawals import anchor_withdrawals, withdrawn_key
from privet.client.editing import Changes, change_file
from privet.client.network.enrolment import Enrolment, new_site_file
from privet.client.network.opening import check_migrated
from privet.client.rounds.logbook import WITNESS, create_witness, open_witness
from privet.client.site import SiteConfig, load_site
from privet.client.trust import TRUSTED, Trusted, changing, read_trusted, write_trusted
from privet.common.errors import StateError, StudyError, VerificationError
from privet.common.log.note import NoteKey
from privet.common.pki.keyfile import MLDSA_KEY, public_key, read_key
from privet.common.study.reading import read_toml, validate

_LEDGER_KEY = "keys/ledger.key"
_OTHER_PLACE = "name another file or directory: `privet site setup SITE --anchor PATH`"
_UNUSED = 1
"""Rows of a ledger that has recorded nothing yet."""


def change(file: Path, changes: Changes) -> None:
    """Change a site file, if the result is a valid one. Raises as `change_file`."""
    change_file(file, changes, lambda document: validate(SiteConfig, document, what=f"site file {file.name}"))


def other_owner(directory: Path) -> str:
    """Return the user to whom a site's directory belongs, if that is not the user of this process; otherwise nothing.

    What another user makes there, such as `sudo privet site setup`, the service of the site could not read.
    """
    try:
        owner = directory.stat().st_uid
        return "" if owner == os.geteuid() else pwd.getpwuid(owner).pw_name
    except OSError:
        return ""  # what cannot be read is reported where it is needed
    except KeyError:
        return str(owner)


def restore(file: Path) -> list[str]:
    """Put back what joining made and is missing: the site file, its fixed lines, and this site's own confirmed keys.

    Returns:
        A line for each part that was put back.

    Raises:
        StateError: The site has not joined, or a file cannot be read or written.
        StudyError: The site file is not valid, or is of an earlier version.
    """
    enrolment, done = Enrolment(file.parent), list[str]()
    asked, terms = enrolment.asked, enrolment.terms
    if not file.exists():
        new_site_file(file, asked.keys.site, terms)
        done.append(f"wrote {file} anew")
    document = read_toml(file, what="site")
    log = document.get("log", {})
    if "peers" in document or (isinstance(log, dict) and {"policy", "coordinator"} & log.keys()):
        check_migrated(file)
    lines = {
        "name": asked.keys.site,
        "train": ["data/train.csv"],
        "dataset": "notes",
        "ledger": "state/ledger.db",
        "policy": "policy.toml",
        "approvals": "state/approvals",
        "identity": "keys/identity.pem",
        "trusted": TRUSTED,
        "coordinator.address": terms.fleet,
        "coordinator.root": "consortium/root.pem",
        "coordinator.key": "keys/node",
        "log.state": "state/log",
        "log.key": "keys/witness.pem",
    }
    if NoteKey.parse(asked.keys.witness).pq:
        lines["mldsa"] = f"keys/{MLDSA_KEY}"
    missing: dict[str, Any] = {name: value for name, value in lines.items() if not _has(document, name)}
    if "ledger_key" not in document:
        ledger = file.parent / str(document.get("ledger", lines["ledger"]))
        beside, wanted = key_beside(ledger), file.parent / _LEDGER_KEY
        if beside.exists() and not wanted.exists():
            beside.rename(wanted)
            if (withdrawn := withdrawn_key(beside)).exists():
                withdrawn.rename(withdrawn_key(wanted))
            done.append(f"moved the ledger's key to {wanted}; restart `privet site serve` if it runs")
        missing["ledger_key"] = _LEDGER_KEY
    if _has_key(file.parent / "keys/identity.pem", asked.keys.identity):
        named = file.parent / str(document.get("identity", ""))
        if "identity" in document and not _has_key(named, asked.keys.identity):
            missing["identity"] = "keys/identity.pem"
    if missing:
        change(file, missing)
        done.append(f"put back in {file.name}: {', '.join(missing)}")
    trusted = load_site(file).trusted or file.parent / TRUSTED
    if not trusted.exists():
        write_trusted(trusted, Trusted(members=(asked.keys,)))
        done.append(f"wrote {trusted} anew: confirm the consortium and all members again")
    elif read_trusted(trusted).keys.get(asked.keys.site) != asked.keys:
        with changing(trusted):
            write_trusted(trusted, read_trusted(trusted).with_member(asked.keys, asked.keys.words))
        done.append("confirmed this site's own keys")
    return done


def _has(document: dict[str, Any], dotted: str) -> bool:
    table, _, key = dotted.rpartition(".")
    inside = document.get(table, {}) if table else document
    return isinstance(inside, dict) and key in inside


def _has_key(path: Path, public: str) -> bool:
    """Whether a file holds the private key of a public one. A key with wrong permissions is left to the doctor."""
    try:
        return public_key(read_key(path, "identity")) == public
    except StateError:
        return False


def safe_delta(units: int) -> float:
    """Return a delta for a dataset: a power of ten, at most 1e-5, and at most a tenth of 1 / units."""
    return float(f"1e-{max(5, math.ceil(math.log10(10 * units)))}")


def relative_to(file: Path, path: Path) -> str:
    """Return a path as a site file names it: relative to its directory where it lies there, otherwise absolute."""
    path, root = path.absolute(), file.parent.absolute()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def anchor_file(config: SiteConfig, given: str) -> Path:
    """Return the file that an answer about the anchor means, which this site may use. Nothing is made.

    A directory, also one that does not exist yet, gets a file of the site's name, so that sites may share it. A name
    that ends with a slash, or has no suffix and is no file, is that of a directory.

    Raises:
        StudyError: The file is the anchor of another ledger, or a directory above it is a file or cannot be written.
    """
    path, ledger = Path(given).expanduser(), _ledger_of(config)
    if given.endswith("/") or path.is_dir() or not (path.suffix or path.is_file()):
        path = path / f"{config.name}-ledger-head.json"
    above = _existing(path.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        fault = "cannot be written" if above.is_dir() else "is a file, not a directory"
        raise StudyError(f"{above} {fault}", _OTHER_PLACE)
    if path.exists() and not _is_anchor_of(config, ledger, path):
        raise StudyError(f"the file {path} exists already, and is not the anchor of this site's ledger", _OTHER_PLACE)
    return path


def _is_anchor_of(config: SiteConfig, ledger: Path, path: Path) -> bool:
    if not ledger.exists():
        return False
    try:
        Ledger.open(ledger, path, config.ledger_key).close()
    except (StateError, VerificationError):
        return path == config.anchor  # what is wrong with it is said where it is used
    return True


def check_anchor(config: SiteConfig, anchor: Path) -> bool:
    """Check a place for the anchor, and return whether it is on the ledger's file system.

    Nothing is made. A directory that does not exist yet counts as where it would be made.

    Raises:
        StudyError: It is in the ledger's directory. StateError: Its directory cannot be looked at.
    """
    ledger = _ledger_of(config)
    if anchor.resolve().parent == ledger.resolve().parent:
        raise StudyError(
            f"the anchor {anchor} is in the ledger's directory; restored together from one backup, it could not reveal "
            "an old ledger",
            "choose a path on another disk, or at least in another directory",
        )
    try:
        return on_one_disk(*(_existing(path.absolute().parent) / path.name for path in (ledger, anchor)))
    except OSError as error:
        raise _unusable(anchor, error) from None


def _existing(directory: Path) -> Path:
    """Return a directory, or the nearest one above it that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _make_place(anchor: Path) -> None:
    try:
        anchor.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(anchor, error) from None


def _unusable(anchor: Path, error: OSError) -> StateError:
    return StateError(
        f"the directory of the anchor {anchor} cannot be used ({error.strerror})",
        "choose a path that this user may write, or have the directory made",
    )


def move_anchor(file: Path, anchor: Path, *, same_disk: bool) -> None:
    """Name another place for the anchor in a site file; where there is a ledger, its last head goes there first.

    Args:
        file: The site file.
        anchor: The new place, which `check_anchor` has checked.
        same_disk: Whether the site accepts an anchor on the ledger's file system.

    Raises:
        StateError, VerificationError: The ledger cannot be read, was changed, or is older than its anchor.
    """
    config = load_site(file)
    ledger = _ledger_of(config)
    _make_place(anchor)
    if ledger.exists():
        old = config.anchor if config.anchor is not None and config.anchor.exists() else None
        if anchor.exists():  # an interrupted attempt has made it
            Ledger.open(ledger, anchor, config.ledger_key).close()
        opened = Ledger.open(ledger, old, config.ledger_key)
        try:
            if not anchor.exists():
                opened.start_anchor(anchor)
        finally:
            opened.close()
    # Before the site file names the new place: until then, the old one counts.
    anchor_withdrawals(config, anchor)
    accepted = {"anchor_same_disk": True} if same_disk else {}
    change(file, {"anchor": relative_to(file, anchor), **accepted})


def create_books(config: SiteConfig) -> list[str]:
    """Create what is missing of witness, ledger and anchor, and return a line for each.

    What was in use and is lost is not made again: it could not say what was spent, or what was cosigned.

    Raises:
        StateError: There was a ledger, a witness or an anchor before, or a file cannot be written.
        VerificationError: The charter of the consortium is not confirmed.
    """
    ledger, anchor, done = _ledger_of(config), config.anchor, list[str]()
    if anchor is None:
        raise StudyError("the site file names no anchor", "name one: `privet site setup SITE --anchor PATH`")
    for path in (ledger, anchor, config.ledger_key or ledger):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(ledger, config)
    if config.log is not None and not _in_use(config.log.state / WITNESS):
        if rows > _UNUSED:
            raise StateError(
                f"the site has taken part in rounds, but what its witness cosigned is missing in {config.log.state}",
                "restore the newest copy of the directory; without one, have the site revoked, and join anew in a new "
                "directory: `privet site join @TOKEN DIRECTORY`",
            )
        config.log.state.parent.mkdir(parents=True, exist_ok=True)
        create_witness(config)
        done.append(f"witness  {config.log.state}")
    elif config.log is not None and not rows and open_witness(config, config.log).last.size:
        raise StateError(
            f"the site has cosigned checkpoints of the round log, but its ledger {ledger} is missing",
            f"restore the newest copy of the ledger, `cp BACKUP {ledger}`; never create a second one for the same data",
        )
    if not rows:
        Ledger.create(ledger, anchor, config.ledger_key).close()
        done += [f"ledger   {ledger}", f"anchor   {anchor}"]
    elif not anchor.exists():
        if rows > _UNUSED:
            raise StateError(
                f"the anchor {anchor} of a ledger of {rows} rows is missing",
                "restore it; if it is lost and the ledger is the newest, start another: `privet site init SITE "
                "--anchor`",
            )
        start_anchor(config, anchor)
        done.append(f"anchor   {anchor}")
    return done


def start_anchor(config: SiteConfig, anchor: Path) -> int:
    """Start the anchor of a ledger that has none, and return the ledger's rows. Raises as `Ledger.start_anchor`."""
    _make_place(anchor)
    opened = Ledger.open(_ledger_of(config), None, config.ledger_key)
    try:
        opened.start_anchor(anchor)
        return opened.head[0]
    finally:
        opened.close()


def _rows(ledger: Path, config: SiteConfig) -> int:
    """Return the number of rows of a ledger; 0 if there is none."""
    if not ledger.exists():
        return 0
    opened = Ledger.open(ledger, None, config.ledger_key)
    try:
        return opened.head[0]
    finally:
        opened.close()


def _in_use(directory: Path) -> bool:
    return directory.exists() and any(directory.iterdir())


def _ledger_of(config: SiteConfig) -> Path:
    if config.ledger is None or config.dataset is None:
        raise StudyError(
            f"the site file names no {'ledger' if config.ledger is None else 'dataset'}, which a privacy ledger needs",
            "run `privet site setup SITE`, which puts the lines back",
        )
    return config.ledger
