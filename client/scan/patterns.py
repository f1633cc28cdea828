"""Find direct identifiers in a text by patterns, check digits and words before them. Only names of kinds come back.

Each pattern has bounded repetitions, and is tried where a number or a word begins: the time is linear in the text. A
number gets one kind: first the kinds that check, then the kind that a word before it says, then shapes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from functools import partial
from ipaddress import ip_address
from typing import Final, NamedTuple

from privet.client.scan import checks

# Letters that look like ASCII letters, in Cyrillic and Greek. Accents stay: they are spelling, not disguise.
_ALIKE = str.maketrans(
    "аеорсухіјѕԁһкмтвнАЕОРСУХІЈЅКМТВНοανρυχκΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijsdhkmtbhAEOPCYXIJSKMTBHoavpuxkABEZHIKMNOPTYX",
)


class _Plain(dict[int, int | str | None]):
    """Characters as a pattern expects them, each worked out when it is first met."""

    def __missing__(self, code: int) -> int | str | None:
        sign = chr(code)
        found: int | str | None = _ALIKE.get(code, code)
        digit, category = unicodedata.decimal(sign, None), unicodedata.category(sign)
        if digit is not None:
            found = str(digit)
        elif category == "Pd" or sign == "\u2212":
            found = "-"
        elif category in ("Zs", "Zl", "Zp") or sign in "\r\n\t\v\f\x85":
            found = " "
        elif category == "Cf":
            found = None
        self[code] = found
        return found


_PLAIN = _Plain()
_PIECE: Final = 128
_BREAKS: Final = str.maketrans("\r\n\t\v\f", "     ")


def plain(text: str) -> str:
    """Return a text with ASCII digits, hyphens and spaces for all their kinds, and without what looks like ASCII."""
    if text.isascii():
        return text.translate(_BREAKS)
    return "".join(unicodedata.normalize("NFKC", piece) for piece in _pieces(text)).translate(_PLAIN)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces: normalising sorts a run of combining marks in a time that is quadratic in its length.

    A piece ends before a sign that begins a new one, but in a run of marks that no language has.
    """
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        last = min(end + _PIECE, len(text))
        while end < last and unicodedata.combining(text[end]):
            end += 1
        yield text[start:end]
        start = end


# --- words that say what follows ---------------------------------------------------------------------------

_MONTHS = (
    "january|february|march|april|may|june|july|august|september|october|november|december|jan|feb|mar|apr|jun|jul|aug"
    "|sept?|oct|nov|dec|januar|februar|märz|mai|juni|juli|oktober|dezember|janvier|février|mars|avril|juin|juillet"
    "|août|septembre|octobre|novembre|décembre|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre"
    "|noviembre|diciembre|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre|januari|februari"
    "|maart|mei|augustus|okt|dez"
)
_WORDS = {
    "fax": "fax|telefax|télécopie",
    "phone": "phone|telephone|tel|telefon|mobile|mobil|mob|cell|call|contact|handy|téléphone|teléfono|telefono|telefoon"
    "|pager|bleep|whatsapp|ph",
    "us_ssn": "ssn|social security",
    "uk_nhs": "nhs",
    "nl_bsn": "bsn|burgerservicenummer|sofi",
    "account": "account|acct|a/c|konto|kontonr|compte|cuenta|conto|rekening|invoice|rechnung|rechnungsnr",
    "health_plan": "policy|member|subscriber|beneficiary|insurance|medicare|medicaid|plan|versichertennummer|versnr"
    "|vers\\.-nr|versicherungsnr|krankenkasse|mutuelle|póliza|polizza|polis",
    "licence": "licen[cs]e|certificate|dea|npi|gmc|lanr|approbation|rpps|colegiado|big-nummer|big",
    "vehicle": "plate|licen[cs]e plate|registration|reg|vrn|kennzeichen|kfz|immatriculation|plaque|matrícula|targa"
    "|kenteken|vin",
    "device": "serial|s/n|sn|udi|imei|device|seriennummer|serien-nr|n° de série|número de serie|matricola",
    "record_number": "mrn|medical record|record|hospital|patient|patienten|patientennummer|pat\\.-nr|pat\\.|chart|case"
    "|fallnummer|fall|aufnahmenummer|encounter|visit|accession|specimen|ipp|nip|historia clínica|nhc|cartella"
    "|patiëntnummer|unit|hosp|urn|pid|study",
    "code": "snomed(?:[ -]ct)?|icd(?:-10)?|loinc|ndc|atc|pzn|pmid|isbn|ean|nct|batch|lot|charge|rxnorm|omim",
    "age": "aged?|alter|âge|edad|età|leeftijd",
    "version": "version|ver|v|section|chapter|figure|table|grade|stage|score",
    "month": _MONTHS,
}
_FOLLOWED = r"(?:[ .:#-]{0,3}(?:no|nr|num|number|nummer|numéro|n°|nº|id|identifier|code|is|#)(?![a-zà-ÿ]))?"
_LABELS = re.compile(
    "(?<![a-zà-ÿ0-9])(?:"
    + "|".join(f"(?P<{kind}>{words})" for kind, words in _WORDS.items())
    + f")(?![a-zà-ÿ]){_FOLLOWED}{_FOLLOWED}"
)
_GAP = 11
"""Most characters between such a word and its number, such as those of `: +(0` or `: ABC-`."""
_WEAK = frozenset({"record_number", "vehicle", "device", "licence", "health_plan", "account"})
"""Labels that need a number of some length: `patient 62`, `stage 2` and `unit 3` identify nobody."""


class _Near(NamedTuple):
    """A word that says what the next number is, and where it ends."""

    kind: str
    end: int


def _lower(text: str) -> str:
    """Return a text in lower case, of the same length."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(x if len(x := sign.lower()) == 1 else sign for sign in text)


# --- numbers ------------------------------------------------------------------------------------------------

_START = re.compile(r"(?<![A-Za-z0-9])(?:[+(]{1,2}|[A-Za-z]{1,6}|[A-Za-z]{1,2}[ -])?[0-9]")
_END = "(?![A-Za-z0-9])"
_Check = Callable[[re.Match[str], str], bool]


def _joined(match: re.Match[str]) -> str:
    return re.sub("[^A-Za-z0-9]", "", match[0]).upper()


def _checked(check: Callable[[str], bool], match: re.Match[str], _: str) -> bool:
    return check(_joined(match))


def _checked_unless(own: str, check: Callable[[str], bool], match: re.Match[str], label: str) -> bool:
    """Check a number whose digit alone says little (one in eleven passes), unless a word says what else it is."""
    return label in ("", own, "record_number") and check(_joined(match))


def _anything(_: re.Match[str], __: str) -> bool:
    return True


def _labelled(*labels: str) -> _Check:
    return lambda _, label: label in labels


def _dated(match: re.Match[str], _: str) -> bool:
    """Whether three numbers are a day, a month and a year in some order."""
    first, middle, last = match["first"], match["middle"], match["last"]
    if len(first) == 4:
        return 1850 < int(first) < 2100 and 1 <= int(middle) <= 12 and 1 <= int(last) <= 31
    if len(last) == 3 or (len(last) == 2 and match["sep"] == " ") or (len(last) == 4 and not 1850 < int(last) < 2100):
        return False
    return len(first) < 3 and sorted((int(first), int(middle)))[0] in range(1, 13) and max(int(first), int(middle)) < 32


def _basic(match: re.Match[str], _: str) -> bool:
    text = match[0]
    return 1 <= int(text[4:6]) <= 12 and 1 <= int(text[6:8]) <= 31


def _four(match: re.Match[str], label: str) -> bool:
    return label != "version" and all(int(part) < 256 for part in match[0].split("."))


def _card(match: re.Match[str], _: str) -> bool:
    digits = _joined(match)
    return digits[0] in "3456" and len(set(digits)) > 1 and checks.luhn(digits)


def _phone(match: re.Match[str], label: str) -> bool:
    return label in ("", "phone", "vehicle")


def _token(kind: str, match: re.Match[str], label: str) -> bool:
    """Whether a token after a word such as `MRN` is the number that the word announces."""
    return label == kind and (kind not in _WEAK or sum(sign.isdigit() for sign in match[0]) >= 4)


_UNITS = frozenset("MG ML IU UI IE KG CC MM HZ AM PM KJ SA SD SS CM NG DL MS KM".split())  # noqa: SIM905
"""After four digits: units, and what no Dutch postal code ends with."""


def _postal(match: re.Match[str], _: str) -> bool:
    return match[0][-2:] not in _UNITS


def _long(match: re.Match[str], label: str) -> bool:
    """Whether a number has seven digits or more in one piece and is no code. Pieces may be several values."""
    return label != "code" and " " not in match[0] and "." not in match[0]


_SEP = "(?: ?[-./] ?| )?"
_CAP = "[A-Z][A-Za-zà-ÿ'-]{1,20}"
_TOKEN = r"[A-Za-z]{0,6}[-/ ]?[0-9](?:[-/. ]?[0-9A-Za-z]){2,18}" + _END
_ANNOUNCED: Final[tuple[tuple[str, str, _Check], ...]] = tuple(
    (kind.replace("_", "-"), _TOKEN, partial(_token, kind)) for kind in sorted(_WEAK)
)
_SIGNS = "[AC-HJKMNP-RT-Y]"


def _compiled(*rules: tuple[str, str, _Check], end: str = "") -> tuple[tuple[str, re.Pattern[str], _Check], ...]:
    return tuple((kind, re.compile(pattern + end), check) for kind, pattern, check in rules)


_NUMBERS: Final = _compiled(
    ("ip", r"(?<![0-9]\.)(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9.]*[0-9])", _four),
    ("date", r"(?<![0-9]\.)(?P<first>[0-9]{1,4})(?P<spaced> ?)(?P<sep>[-/. ])(?P=spaced)(?P<middle>[0-9]{1,2})"
     r"(?P=spaced)(?P=sep)(?P=spaced)(?P<last>[0-9]{2,4})(?![0-9]|[./-][0-9])", _dated),
    ("date", r"(?:0?[1-9]|1[0-2]) ?[/.-] ?(?:19|20)[0-9]{2}(?![0-9])", _anything),
    ("date", r"(?:19|20)[0-9]{6}(?:T?[0-9]{4,6})?" + _END, _basic),
    ("date", rf"[0-9]{{1,2}}(?:st|nd|rd|th|er|º)?\.?[ /-]{{0,2}}(?:of |de |del )?(?i:{_MONTHS})(?![a-zà-ÿ])",
     _anything),
    ("fr-nir", rf"[12]{_SEP}[0-9]{{2}}{_SEP}[0-9]{{2}}{_SEP}[0-9][0-9AB]{_SEP}[0-9]{{3}}{_SEP}[0-9]{{3}}"
     rf"[ ./-]{{0,3}}[0-9]{{2}}{_END}", partial(_checked, checks.nir)),
    ("card", rf"[0-9]{{4}}{_SEP}[0-9]{{4}}{_SEP}[0-9]{{4}}{_SEP}[0-9]{{1,7}}{_END}", _card),
    ("es-dni", rf"[0-9]{{2}}{_SEP}[0-9]{{3}}{_SEP}[0-9]{{3}}{_SEP}[A-Za-z]{_END}", partial(_checked, checks.dni)),
    ("us-ssn", r"(?!000|666|9)[0-9]{3}([-. ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}" + _END,
     _labelled("", "us_ssn", "record_number")),
    ("us-ssn", rf"[0-9]{{3}}[-. /]{{0,3}}[0-9]{{2}}[-. /]{{0,3}}[0-9]{{4}}{_END}", _labelled("us_ssn")),
    ("uk-nhs", rf"[0-9]{{3}}{_SEP}[0-9]{{3}}{_SEP}[0-9]{{4}}{_END}",
     partial(_checked_unless, "uk_nhs", checks.nhs)),
    ("nl-bsn", rf"(?:[0-9]{{3}}{_SEP}[0-9]{{3}}{_SEP}[0-9]{{3}}|[0-9]{{4}}[. -][0-9]{{2}}[. -][0-9]{{3}}){_END}",
     partial(_checked_unless, "nl_bsn", checks.bsn)),
    ("fax", r"[+(]{0,2}[0-9](?:[ ./()-]{0,3}[0-9]){5,14}", _labelled("fax")),
    ("phone", r"[+(]{0,2}[0-9](?:[ ./()-]{0,3}[0-9]){5,14}", _labelled("phone")),
    ("device", r"\(01\) ?[0-9]{14}", _anything),
    *_ANNOUNCED,
    ("phone", r"\+ ?[1-9](?:[ ./()-]{0,3}[0-9]){7,14}", _phone),
    ("phone", r"00[1-9](?:[ ./()-]{0,3}[0-9]){8,13}" + _END, _phone),
    ("phone", r"\(?(?:1[-. ])?[2-9][0-9]{2}\)?[-. /]{1,3}[2-9][0-9]{2}[-. ]{1,3}[0-9]{4}" + _END, _phone),
    ("phone", r"\(?0[1-9](?:[ ./()-]{0,3}[0-9]){7,10}" + _END, _phone),
    ("postcode", rf"[0-9]{{5}}-[0-9]{{4}}{_END}(?!-[0-9])", _anything),
    ("postcode", rf"[1-9][0-9]{{3}} ?[A-Z]{{2}}{_END}", _postal),
    ("age-over-89", r"(?:9[0-9]|1[0-2][0-9])(?![0-9A-Za-z%]|[.,][0-9])", _labelled("age")),
    ("age-over-89", r"(?:9[0-9]|1[0-2][0-9])[ -]?(?i:-?years?|yrs?|y/?o|y\.o|jahre|jährig|-jährig|ans|años"
     r"|anni|jaar|[fm])(?![a-zà-ÿ])", _anything),
    ("address", rf"[0-9]{{1,5}}[A-Za-z]?,? (?:[NSEW]\.? )?(?:{_CAP} ){{1,3}}(?i:street|st|road|rd|avenue|ave|lane"
     r"|ln|drive|dr|court|ct|way|boulevard|blvd|close|crescent|square|terrace|place)(?![a-z])", _anything),
    ("address", rf"[0-9]{{1,4}}(?: bis| ter)?,? (?i:rue|avenue|boulevard|place|chemin|allée|impasse|quai) "
     rf"(?:(?:de|du|des|la|le|les|l'|d') ?){{0,2}}{_CAP}", _anything),
    ("long-number", rf"[0-9](?:[ .-]?[0-9]){{6,24}}{_END}", _long),
)  # fmt: skip
_LETTERED: Final = _compiled(
    ("de-insurance", r"[A-Za-z][ -]?[0-9]{3}[ .-]?[0-9]{3}[ .-]?[0-9]{3}", partial(_checked, checks.kvnr)),
    ("es-dni", r"[XYZxyz] ?-? ?[0-9][ .]?[0-9]{3}[ .]?[0-9]{3} ?-? ?[A-Za-z]", partial(_checked, checks.dni)),
    ("uk-nino", r"(?i:[A-CEGHJ-PR-TW-Z]{2}(?:[ -]?[0-9]{2}){3}[ -]?[A-D])", _anything),
    ("postcode", r"[A-Z]{1,2}[0-9][0-9A-Z]? ?[0-9][ABD-HJLNP-UW-Z]{2}", _anything),
    ("vehicle", r"[A-Z]{2}[0-9]{2} ?[A-HJ-PR-Z]{3}", _anything),
    *_ANNOUNCED,
    ("licence", r"[A-Za-z]{2}[0-9]{7}", partial(_checked, checks.dea)),
    ("record-number", r"(?i:mrn|pat|pid|case|fall|ipp|nhc)[-#]?[0-9]{4,12}", _anything),
    ("record-number", r"[A-Z]{1,3}-?[0-9]{6,12}", _labelled("", "record_number", "phone")),
    end=_END,
)  # fmt: skip
_VIN = re.compile(rf"(?<![A-Za-z0-9])(?=[A-Z]{{0,16}}[0-9])[A-HJ-NPR-Z0-9]{{17}}{_END}")
_MBI = re.compile(
    rf"(?<![A-Za-z0-9])[1-9]{_SIGNS}(?:{_SIGNS}|[0-9])[0-9]-?{_SIGNS}(?:{_SIGNS}|[0-9])[0-9]-?{_SIGNS}{{2}}[0-9]{{2}}{_END}"
)
_FISCAL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]{3}[ .-]?[A-Za-z]{3}[ .-]?[0-9L-NP-Vl-np-v]{2}[A-EHLMPR-Ta-ehlmpr-t][0-9L-NP-Vl-np-v]{2}"
    r"[ .-]?[A-Za-z][0-9L-NP-Vl-np-v]{3}[ .-]?[A-Za-z]" + _END
)
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|RI"
    "|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|DC"
)
_ZIP = re.compile(rf"(?<![A-Za-z0-9])(?:(?:{_STATES}),? |D-|A-|CH-|F-)[0-9]{{4,5}}{_END}")
_STREET = re.compile(
    r"(?:stra(?:ß|ss)e|str\.|weg|platz|gasse|allee|straat|laan|gracht|plein) {1,2}[0-9]{1,4}(?![0-9])"
    r"|(?<![a-zà-ÿ])(?:via|viale|piazza|corso|calle|avenida|plaza|paseo) [a-zà-ÿ' .]{3,40},? (?:n[°º.] ?)?[0-9]{1,4}"
    r"(?![0-9])"
)
_MAC = re.compile(r"(?<![0-9A-Za-z])[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![0-9A-Za-z])")
_IP6 = re.compile(r"(?<![0-9A-Za-z:])[0-9A-Fa-f:]{4,39}(?![0-9A-Za-z:])")
_PLATE = re.compile(r"[ :.#-]{1,4}[A-ZÄÖÜ0-9]{1,3}[ -]?[A-Z0-9]{1,4}[ -]?[A-Z0-9]{1,4}(?![A-Za-z0-9])")

# --- words --------------------------------------------------------------------------------------------------

_LINK = re.compile(
    r"(?:https?|ftp|hxxps?)://[^ ]{3}|(?<![a-z0-9])www\.[a-z0-9-]{2}"
    r"|(?<![a-z0-9@.-])(?:[a-z0-9-]{2,63}\.){1,4}(?:com|org|net|gov|edu|(?:de|fr|nl|es|it|eu|io|co\.uk)/[a-z0-9])"
    r"(?![a-z])"
)
_DOMAIN = re.compile(r" ?[A-Za-z0-9-]{1,63}(?: ?(?:\.|\(dot\)|\[dot\]| dot ) ?[A-Za-z0-9-]{2,63})")
_AT = re.compile(r"@| ?[(\[{](?:at|AT|@)[)\]}]|(?i: at (?=[a-z0-9-]{2,63} dot ))")
_PARTICLES = r"(?:(?:van|von|de|der|den|la|le|el|di|del|da|ten|zu|zur) ){0,2}"
_SALUTED = re.compile(
    r"(?<![A-Za-z])(?:(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Herrn?|Frau|Mme|Mlle|Monsieur|Madame|Sra?|Señora?|Sig|Sig\.ra|Signora?|Dhr|Mevr"
    r"|Mevrouw|Sir|Nurse|Sister|Schwester|Docteur|Dott|Dottoressa)\.? {0,2}(?:(?:Dr|Prof|med)\.? ){0,2}|M\. )"
    + _PARTICLES
    + r"(?:[A-Z]\. ?){0,2}(?P<name>[A-ZÀ-Þ][A-Za-zà-ÿ'-]{1,30})"
)
_NAMED = re.compile(
    r"(?<![A-Za-z])(?i:patient(?:'s|en)?[ -]?name|full name|surname|first name|last name|forename|nachname|vorname"
    r"|nom|prénom|naam|nombre|apellidos?|cognome|name|signed(?: by)?|dictated by|seen by|next of kin|nok|gez\.|patient)"
    r" ?[:=] {0,3}" + _PARTICLES + r"(?:[A-Z]\. ?){0,2}(?P<name>[A-ZÀ-Þ][A-Za-zà-ÿ'-]{1,30})"
)
_NOT_NAMES = frozenset(
    "The This That Unknown None Not No Yes Male Female Patient Anonymous Removed Redacted Name Doctor Scan "  # noqa: SIM905
    "Consultant".split()
)
_WORD = re.compile(r"[A-ZÀ-Þ][A-Za-zà-ÿ'-]{1,40}")


def kinds_in(text: str, names: Collection[str] = ()) -> set[str]:
    """Return the kinds of direct identifiers in a text.

    Args:
        text: Any text. Line breaks count as spaces.
        names: Names that the operator listed, in lower case; each is one word, and is found where it is capitalised.
    """
    text = plain(text)
    lower = _lower(text)
    found = set[str]()
    named = any(match["name"] not in _NOT_NAMES for each in (_SALUTED, _NAMED) for match in each.finditer(text))
    if named or (names and any(match[0].lower() in names for match in _WORD.finditer(text))):
        found.add("name")
    if ("@" in text or "at" in lower) and _has_mail(text):
        found.add("email")
    if ("." in lower or "://" in lower) and _LINK.search(lower):
        found.add("url")
    if lower.count(":") > 1:
        found.update(_addresses(text))
    if any(digit in text for digit in "0123456789"):
        found.update(_numbered(text, lower))
    return found


def _has_mail(text: str) -> bool:
    """Whether an `@` stands between a name and a domain. Only the signs beside it are looked at."""
    for match in _AT.finditer(text):
        before = text[max(match.start() - 2, 0) : match.start()].rstrip()
        if before and (before[-1].isalnum() or before[-1] in "._+-") and _DOMAIN.match(text, match.end()):
            return True
    return False


def _addresses(text: str) -> set[str]:
    found = {"device"} if _MAC.search(text) else set[str]()
    for match in _IP6.finditer(text):
        if match[0].count(":") > 1:
            try:
                ip_address(match[0])
            except ValueError:
                continue
            return found | {"ip"}
    return found


def _numbered(text: str, lower: str) -> set[str]:
    """Return the kinds of all numbers of a text."""
    found = set[str]()
    if any(checks.vin(match[0]) for match in _VIN.finditer(text)):
        found.add("vehicle")
    for pattern, kind, where in ((_ZIP, "postcode", text), (_STREET, "address", lower), (_MBI, "health-plan", text)):
        if pattern.search(where):
            found.add(kind)

    def codes(match: re.Match[str]) -> str:
        """Take a codice fiscale out of the text, so that its parts are no numbers of other kinds."""
        if not checks.codice_fiscale(_joined(match)):
            return match[0]
        found.add("it-cf")
        return " " * len(match[0])

    text = _FISCAL.sub(codes, text)
    labels = [_Near(str(match.lastgroup), match.end()) for match in _LABELS.finditer(lower)]
    next_label, near = 0, _Near("", -_GAP)
    for label in labels:
        if label.kind == "vehicle" and (plate := _PLATE.match(text, label.end)) and any(map(str.isdigit, plate[0])):
            found.add("vehicle")
    taken = 0
    for match in _START.finditer(text):
        if match.start() < taken:
            continue
        digit = match.end() - 1
        while next_label < len(labels) and labels[next_label].end <= digit:
            near, next_label = labels[next_label], next_label + 1
        kind, taken = _kind_at(text, match.start(), digit, _said(near, text, digit))
        if kind:
            found.add(kind)
    return found


def _said(near: _Near, text: str, digit: int) -> str:
    """Return what the last word before a number says of it; empty if something stands between them."""
    if digit - near.end > _GAP:  # before the text between is copied: the word may be far away
        return ""
    between = text[near.end : digit].strip(" :#=.-(+/")
    return near.kind if not between or (between.isalpha() and between.isupper()) else ""


def _kind_at(text: str, at: int, digit: int, label: str) -> tuple[str, int]:
    """Return the kind of the number that begins at `at`, whose first digit is at `digit`, and where it ends."""
    if label == "month" and _with_month(text, digit):
        return "date", digit + 1
    tried = [(_NUMBERS, at)]
    if text[at] in "+(" and digit > at:
        tried = [(_NUMBERS, at), (_NUMBERS, digit)]
    elif text[at].isalpha():
        if (end := _iban_at(text, at)) is not None:
            return "iban", end
        tried = [(_LETTERED, at), *([(_NUMBERS, digit)] if not text[digit - 1].isalpha() or label else [])]
    for patterns, place in tried:
        for kind, pattern, check in patterns:
            if (match := pattern.match(text, place)) and check(match, label):
                return kind, match.end()
    return "", at


_DAY = re.compile(
    r"(?:[12][0-9]|3[01]|0?[1-9])(?:st|nd|rd|th)?"
    r"(?![0-9]|[.,][0-9]| ?(?:mg|ml|tab|x|mcg|units?|days?|weeks?|times)(?![a-z]))|(?:19|20)[0-9]{2}(?![0-9])"
)


def _with_month(text: str, digit: int) -> bool:
    """Whether a number after a month is its day or its year; `may 2 tablets` is no date."""
    word = text[max(digit - 6, 0) : digit].strip(" .,")[-3:]
    return word not in ("may", "mar") and bool(_DAY.match(text, digit))


def _iban_at(text: str, at: int) -> int | None:
    """Return where the IBAN ends that begins at `at`; None if there is none."""
    length = checks.IBAN_LENGTHS.get(text[at : at + 2].upper())
    if length is None:
        return None
    signs, end = list[str](), at
    for sign in text[at : at + 2 * length]:
        if sign.isalnum() and sign.isascii():
            signs.append(sign.upper())
        elif sign not in " -.":
            break
        end += 1
        if len(signs) == length:
            return end if checks.iban("".join(signs)) else None
    return None
