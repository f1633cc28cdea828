"""May the names of a file's columns be printed? Where a file has no line of names, its first record stands in for them.

The same holds of Parquet and JSON that another program made of such a file. No pattern tells a short value from a name,
so names are believed by what is known of names: one of them is a name that the study or the site file gives, or a third
are words that files usually have for names. Other columns are shown by their number, with which a person at the site
finds them.

A first record of which a third are such words is taken for names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

FEWEST = 10
"""Fewest rows with a key of JSON that is shown: a key of fewer may be a value, such as a name."""
MOST = 20
"""Most names that an error lists."""
_LONGEST = 64
_PART = 3
# Words of names of columns in English, German, French, Spanish, Italian and Dutch, without accents. Usual surnames are
# left out: Ward, Case, Day, Street, Key, Page.
_USUAL = frozenset(
    "text texts note notes letter report document sentence comment review abstract description narrative message "  # noqa: SIM905
    "history summary finding findings impression complaint body content label labels category target specialty "
    "speciality diagnosis diagnoses topic intent outcome prompt question query answer response reply chosen rejected "
    "messages conversation turns tokens words tags spans entities instruction input output id ids nr num number code "
    "codes uid uuid hash index patient patients patientid pat patid pid mrn subject subjectid participant encounter "
    "visit episode admission discharge date time datetime month year age sex gender dob name firstname lastname "
    "surname forename phone telephone email mail address zip postcode postal country hospital site centre clinic "
    "department institution physician clinician type status title source language version row record records count "
    "value birth test weight height dose drug medication medications allergies symptoms treatment procedure "
    "icd score result "
    "befund befunde notiz notizen anamnese epikrise arztbrief bericht diagnose diagnosen fach fachgebiet fall fallnr "
    "fallnummer patnr patientin patientennr patientennummer patientenid geburtsdatum datum alter geschlecht vorname "
    "nachname strasse plz ort telefon abteilung klinik kennung nummer kuerzel "
    "texte notes compte rendu diagnostic specialite dossier sejour nom prenom naissance sexe adresse ville telephone "
    "numero texto nota informe diagnostico especialidad paciente historia nombre apellido apellidos fecha sexo edad "
    "direccion ciudad telefono testo referto diagnosi paziente cognome eta indirizzo citta reparto tekst verslag "
    "naam datum geslacht leeftijd afdeling patientnummer".split()
)
_JOINING = frozenset("of de du des der den di del la le les und and et y e van the no".split())  # noqa: SIM905


def believed(names: Collection[str], known: Collection[str] = ()) -> bool:
    """Return whether what stands for the names of a file's columns is names.

    Args:
        names: What stands there.
        known: Names that the study or the site file gives to columns.
    """
    usual = sum(map(_is_usual, names))
    return any(name in known for name in names) or (usual > 0 and _PART * usual >= len(names))


def listed(names: Sequence[str], known: Collection[str] = ()) -> str:
    """Return in words which columns a file has: their names, or how many where these may be values of a record."""
    if not names:
        return "none"
    if not believed(names, known):
        count = f"{len(names)} name{'' if len(names) == 1 else 's'}"
        return f"{count} not shown here, as they may be contents of a record (is there a line of names?)"
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(name[:_LONGEST] for name in names[:MOST]) + more


def numbered(place: int) -> str:
    """Return what stands for the name of a column, which is counted from 0."""
    return f"(column {place + 1})"


def is_number(name: str) -> bool:
    """Return whether a name is one of `numbered`."""
    return re.fullmatch(r"\(column [0-9]+\)", name) is not None


def _is_usual(name: str) -> bool:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain).lower())
    return len(name) <= _LONGEST and any(word in _USUAL for word in words) and {*words} <= _USUAL | _JOINING
