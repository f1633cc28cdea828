"""The scan of data files: recall and precision by kind on 2,000 generated notes, and its speed on one core.

Half of the notes get one identifier each, in a sentence of its own, with a format drawn per kind. Numbers are made here
by their standards' rules, apart from the code that checks them; about a third of the formats are unusual: other
separators, line breaks, other scripts' digits, no word before the number. A quarter get a hard negative: a laboratory
value, a code of a drug or diagnosis, a dose, a score, a version. The patterns were written before this
generator, and revised once after its first run (seed 0).

A kind is found or not in a record, as `privet scan` counts. Precision counts a record as wrong where the kind was
found and not planted.
"""

from __future__ import annotations

import calendar
import random
import re
import string
import time
from collections import Counter
from collections.abc import Callable

from harness import Bench, Check, start

from privet.client.scan.kinds import KINDS
from privet.client.scan.patterns import kinds_in
from privet.client.scan.twins import Twins
from privet.simulations.data.clinical_notes import HOSPITALS, generate_notes

GOAL = 5000.0
"""Notes a second on one core, by patterns."""
Draw = random.Random
_FIRST = ("Amelia", "Jonas", "Chloé", "Mateo", "Giulia", "Sanne", "Friederike", "Noor", "Björn", "Siobhan", "Luca")
_LAST = ("Whitfield", "Grünwald", "Lefèvre", "Echeverría", "Bianchi", "O'Connell", "Osei", "Nowak", "Sørensen", "Park")
_MONTHS = calendar.month_name[1:]
_MONATE = (
    "Januar",
    "Februar",
    "März",
    "April",
    "Mai",
    "Juni",
    "Juli",
    "August",
    "September",
    "Oktober",
    "November",
    "Dezember",
)


def digits(draw: Draw, count: int) -> str:
    """Return random digits; the first is not 0."""
    return draw.choice("123456789") + "".join(draw.choices(string.digits, k=count - 1))


def grouped(text: str, sizes: tuple[int, ...], separator: str) -> str:
    """Return a text cut into groups."""
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return separator.join(part for part in (*parts, text[at:]) if part)


def _nhs(draw: Draw) -> str:
    while True:
        body = digits(draw, 9)
        check = 11 - sum(int(d) * (10 - i) for i, d in enumerate(body)) % 11
        if check != 10:
            return body + str(check % 11)


def _nir(draw: Draw) -> str:
    body = f"{draw.randint(1, 2)}{draw.randint(0, 99):02}{draw.randint(1, 12):02}{draw.randint(1, 95):02}"
    body += f"{draw.randint(1, 990):03}{draw.randint(1, 999):03}"
    return f"{body}{97 - int(body) % 97:02}"


def _bsn(draw: Draw) -> str:
    while True:
        body = digits(draw, 8)
        check = sum(int(d) * (9 - i) for i, d in enumerate(body)) % 11
        if check < 10:
            return body + str(check)


def _dni(draw: Draw) -> str:
    number = draw.randint(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def _nie(draw: Draw) -> str:
    first, number = draw.randint(0, 2), draw.randint(0, 9_999_999)
    return f"{'XYZ'[first]}{number:07}{'TRWAGMYFPDXBNJZSQVHLCKE'[(first * 10_000_000 + number) % 23]}"


def _kvnr(draw: Draw) -> str:
    letter, body = draw.choice(string.ascii_uppercase), digits(draw, 8)
    total = 0
    for i, d in enumerate(f"{string.ascii_uppercase.index(letter) + 1:02}{body}"):
        product = int(d) * (2 if i % 2 else 1)
        total += sum(map(int, str(product)))
    return f"{letter}{body}{total % 10}"


def _iban(draw: Draw) -> str:
    country, length = draw.choice((("DE", 22), ("NL", 18), ("FR", 27), ("GB", 22), ("AT", 20)))
    bank = "".join(draw.choices(string.ascii_uppercase, k=4)) if country in ("NL", "GB") else ""
    body = bank + digits(draw, length - 4 - len(bank))
    number = "".join(str(string.digits.find(c)) if c.isdigit() else str(ord(c) - 55) for c in f"{body}{country}00")
    return f"{country}{98 - int(number) % 97:02}{body}"


def _card(draw: Draw) -> str:
    body = "4" + digits(draw, 14)
    total = sum(sum(map(int, str(int(d) * (2 if i % 2 == 0 else 1)))) for i, d in enumerate(body))
    return body + str(-total % 10)


_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_FISCAL_ODD = dict(zip(string.ascii_uppercase, _ODD, strict=True)) | dict(zip(string.digits, _ODD[:10], strict=True))


def _fiscal(draw: Draw) -> str:
    letters = "".join(draw.choices("BCDFGLMNPRSTV", k=6))
    body = f"{letters}{draw.randint(20, 99)}{draw.choice('ABCDEHLMPRST')}{draw.randint(1, 71):02}"
    body += f"{draw.choice('ABCDEFGHIL')}{draw.randint(1, 999):03}"
    even = {c: int(c) if c.isdigit() else ord(c) - 65 for c in string.digits + string.ascii_uppercase}
    total = sum(even[c] if i % 2 else _FISCAL_ODD[c] for i, c in enumerate(body))
    return body + string.ascii_uppercase[total % 26]


def _vin(draw: Draw) -> str:
    signs = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"
    values = {c: int(c) if c.isdigit() else int("12345678012345070923456789"[ord(c) - 65]) for c in signs}
    body = draw.choices(signs, k=17)
    weights = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
    check = sum(values[c] * w for c, w in zip(body, weights, strict=True)) % 11
    body[8] = "X" if check == 10 else str(check)
    return "".join(body)


def _date(draw: Draw) -> str:
    d, m, y = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1931, 2026)
    month, german = _MONTHS[m - 1], _MONATE[m - 1]
    return draw.choice(
        (
            f"{d:02}/{m:02}/{y}",
            f"{y}-{m:02}-{d:02}",
            f"{d}.{m}.{y}",
            f"{d}.{m}.{y % 100:02}",
            f"{month} {d}, {y}",
            f"{d} {month} {y}",
            f"{d}. {german} {y}",
            f"{month[:3]} {d}",
            f"{d}-{month[:3]}-{y % 100:02}",
            f"{m:02}/{y}",
            f"{d} / {m} / {y}",
            f"{d:02}{m:02}{y}",
            f"the {d}th of {month}",
            f"{d:02}|{m:02}|{y}",
            f"{month.upper()} {y}",
            f"{y}{m:02}{d:02}",
            f"{d}/{m}",
        )
    )


def _phone(draw: Draw) -> str:
    local = f"{draw.randint(200, 989)}-{draw.randint(200, 999)}-{draw.randint(0, 9999):04}"
    us = tuple(local.split("-"))
    return draw.choice(
        (
            "({}) {}-{}".format(*us),
            "{}.{}.{}".format(*us),
            "+1 {} {} {}".format(*us),
            "call {}{}{}".format(*us),
            "0{} / {}{}".format(*us),
            f"+44 20 7{digits(draw, 3)} {digits(draw, 4)}",
            f"0049-{digits(draw, 3)}-{digits(draw, 7)}",
            f"06 {digits(draw, 2)} {digits(draw, 2)} {digits(draw, 2)} {digits(draw, 2)}",
            f"+49 (0)89 {digits(draw, 7)}",
            "{}{}{}".format(*us),
            f"phone:\n{local}",
            f"mob {digits(draw, 5)} {digits(draw, 6)}",
            "{} - {} - {}".format(*us),
            f"ext. {digits(draw, 4)}",
        )
    )


def _mail(draw: Draw) -> str:
    user, host = draw.choice(_FIRST[:2]).lower() + digits(draw, 2), draw.choice(("mail.example", "clinic.example.org"))
    spelled = host.replace(".", " dot ")
    return draw.choice(
        (
            f"{user}@{host}",
            f"{user}.x@{host}",
            f"<{user}@{host}>",
            f"{user} (at) {host}",
            f"{user} AT {spelled}",
            f"{user}[at]{host}",
            f"{user} @ {host}",
            f"{user}\uff20{host}",
        )
    )


def _name(draw: Draw) -> str:
    first, last = draw.choice(_FIRST), draw.choice(_LAST)
    return draw.choice(
        (
            f"Mr {last}",
            f"Mrs. {last}",
            f"Dr {first} {last}",
            f"Frau {last}",
            f"Patient: {first} {last}",
            f"Mme {last}",
            f"Name: {last}, {first}",
            f"Sra. {last}",
            f"mr {last.lower()}",
            f"MR {last.upper()}",
            f"{first} {last}",
            f"{last}, {first[0]}.",
            f"his wife {first}",
            f"Herr Dr. {last}",
        )
    )


def _address(draw: Draw) -> str:
    n = draw.randint(1, 280)
    return draw.choice(
        (
            f"{n} Maple Street",
            f"{n} Old Mill Road",
            f"{n}B Queens Ave",
            f"Lindenstraße {n}",
            f"Am Markt {n}",
            f"{n} rue des Lilas",
            f"via Garibaldi {n}",
            f"Calle Mayor, {n}",
            f"Keizersgracht {n}",
            f"Flat 2, {n} Hill Rise",
            f"{n} W. Elm St.",
            f"Gartenweg {n}a",
        )
    )


def _ip(draw: Draw) -> str:
    four = [str(draw.randint(1, 254)) for _ in range(4)]
    return draw.choice(
        (".".join(four), "[.]".join(four), f"{'.'.join(four)}:8080", "2001:db8:0:1::7a", "fe80::1ff:fe23")
    )


PLANTED: dict[str, Callable[[Draw], str]] = {
    "name": _name,
    "address": _address,
    "postcode": lambda draw: draw.choice(
        (
            "SW1A 2AA",
            "m1 1ae",
            "EH8 9YL",
            "Boston, MA 02115",
            "90210-1234",
            "1017 XN",
            "D-80331",
            "80331 München",
            "75011 Paris",
        )
    ),
    "date": _date,
    "age-over-89": lambda draw: draw.choice(("{} yo", "{}-year-old", "aged {}", "{}F", "{} Jahre", "{} ans")).format(
        draw.randint(90, 104)
    ),
    "phone": _phone,
    "fax": lambda draw: draw.choice(("fax {}", "Fax: {}", "FAX no. {}", "f: {}")).format(
        f"030 {digits(draw, 3)} {digits(draw, 4)}"
    ),
    "email": _mail,
    "us-ssn": lambda draw: draw.choice(
        ("{}-{}-{}", "SSN {}{}{}", "{} {} {}", "ssn: {}.{}.{}", "{}{}{}", "{}\u2013{}\u2013{}")
    ).format(draw.randint(100, 665), draw.randint(10, 99), draw.randint(1000, 9999)),
    "uk-nhs": lambda draw: grouped(_nhs(draw), (3, 3, 4), draw.choice((" ", "-", "", ".", " - "))),
    "uk-nino": lambda draw: grouped(
        f"{draw.choice(('AB', 'JC', 'PW'))}{digits(draw, 6)}{draw.choice('ABCD')}",
        (2, 2, 2, 2, 1),
        draw.choice((" ", "", "-")),
    ),
    "fr-nir": lambda draw: grouped(_nir(draw), (1, 2, 2, 2, 3, 3), draw.choice((" ", "", ".", "-", "/"))),
    "de-insurance": lambda draw: draw.choice(
        (
            grouped(_kvnr(draw), (4, 3), draw.choice((" ", ""))),
            grouped(_kvnr(draw), (1, 3, 3, 3), " "),
            _kvnr(draw).lower(),
        )
    ),
    "es-dni": lambda draw: draw.choice(
        (
            _dni(draw),
            _nie(draw),
            grouped(_dni(draw), (2, 3, 3), "."),
            grouped(_dni(draw), (8,), "-"),
            grouped(_nie(draw), (1, 7), " "),
        )
    ),
    "nl-bsn": lambda draw: grouped(
        _bsn(draw), draw.choice(((9,), (3, 3), (4, 2, 3), (2, 2, 2, 3))), draw.choice((".", " "))
    ),
    "it-cf": lambda draw: draw.choice(
        (
            _fiscal(draw),
            _fiscal(draw).lower(),
            grouped(_fiscal(draw), (3, 3, 5), " "),
            grouped(_fiscal(draw), (6, 5), "."),
        )
    ),
    "iban": lambda draw: grouped(_iban(draw), (4, 4, 4, 4, 4, 4), draw.choice((" ", "", "-", "  "))),
    "card": lambda draw: grouped(_card(draw), (4, 4, 4), draw.choice((" ", "", "-", "."))),
    "record-number": lambda draw: draw.choice(
        (
            "MRN {}",
            "MRN#{}",
            "Hosp. no: {}",
            "record {}",
            "Fall-Nr. {}",
            "IPP : {}",
            "H{}",
            "patient id={}",
            "chart no\n{}",
            "({})",
            "NHC/{}",
        )
    ).format(digits(draw, draw.randint(6, 8))),
    "health-plan": lambda draw: draw.choice(
        ("member ID {}", "policy no. ABC-{}", "Medicare 1EG4-TE5-MK{:.2}", "subscriber # {}", "plan: {}")
    ).format(digits(draw, 9)),
    "account": lambda draw: draw.choice(("account {}", "acct #{}", "Konto-Nr. {}", "compte n° {}", "a/c {}")).format(
        digits(draw, 8)
    ),
    "licence": lambda draw: draw.choice(
        ("license no. {}", "NPI {}", "GMC {}", "driver's licence {}", "LANR: {}")
    ).format(digits(draw, 9)),
    "vehicle": lambda draw: draw.choice(
        (
            _vin(draw),
            f"plate {digits(draw, 1)}ABC{digits(draw, 3)}",
            f"Kennzeichen M-XY {digits(draw, 4)}",
            "LB52 KRT",
            f"HH-ZK {digits(draw, 3)}",
        )
    ),
    "device": lambda draw: draw.choice(
        ("serial no. SN{}", "S/N: {}-A", "IMEI {}", "pacemaker serial PJN{}", "00:1b:63:84:45:e6", "lot {}")
    ).format(digits(draw, 7)),
    "url": lambda draw: draw.choice(
        (
            "https://portal.example.org/p/{}",
            "www.clinic-{}.example",
            "portal.example.com/{}",
            "example.org",
            "hxxp://x.example/{}",
        )
    ).format(digits(draw, 4)),
    "ip": _ip,
    "long-number": lambda draw: draw.choice(("ref {}", "{}", "no. {}")).format(digits(draw, draw.randint(11, 12))),
}
"""By kind: an identifier in one of its formats."""

NEGATIVES: tuple[Callable[[Draw], str], ...] = (
    lambda draw: f"HbA1c {draw.randint(48, 99)} mmol/mol, CK-MB {draw.randint(5, 40)} U/l",
    lambda draw: f"platelets {draw.randint(90, 450)}000, WBC {draw.randint(3, 14)}.{draw.randint(0, 9)} x10^9/l",
    lambda draw: f"metformin {draw.choice((500, 850, 1000))} mg 1-0-1, ramipril 5 mg 1-0-0",
    lambda draw: f"ATC C09AA05, ICD-10 I21.{draw.randint(0, 9)}, SNOMED {digits(draw, 8)}",
    lambda draw: f"NDC {digits(draw, 5)}-{digits(draw, 4)}-{digits(draw, 2)}",
    lambda draw: (
        f"BP {draw.randint(100, 180)}/{draw.randint(60, 99)}, HR {draw.randint(90, 120)}, SpO2 {draw.randint(90, 99)} %"
    ),
    lambda draw: f"day {draw.randint(1, 21)} of 21, cycle 3/6, dose 2/4 given 8/12 ago",
    lambda draw: f"GCS 15/15, NYHA II, EF {draw.randint(20, 60)}-65 %, score 7/10",
    lambda draw: "MR angiography and MS diagnosis; may 2 tablets, Dr to review, Parkinson disease, Crohn disease",
    lambda draw: f"software version 2.{draw.randint(0, 9)}.10.4, protocol v3.1",
    lambda draw: f"heparin {digits(draw, 1)}5000 IU, insulin {draw.randint(10, 40)} IU at 22:30:00, pH 7.35",
    lambda draw: f"trial NCT{digits(draw, 8)}, batch RO{digits(draw, 7)}",
    lambda draw: (
        f"since {draw.randint(1990, 2024)}, aged {draw.randint(30, 80)}, room {draw.randint(100, 400)}, ward B12"
    ),
    lambda draw: (
        f"troponin {draw.randint(10, 90)} ng/l at 06:15, lactate 1.{draw.randint(0, 9)}, B12 {draw.randint(150, 900)}"
    ),
)
"""Text that looks like identifiers and is none."""


_OLD = re.compile("(?<![0-9])9[0-9](?:[FM]|yo| y/o|-year)")
"""An age of 90 or more, which generated notes may have."""


def notes(count: int, draw: Draw, seed: int) -> list[tuple[str, str]]:
    """Return notes, each with the kind that was planted in it; empty where none was."""
    texts = [note.note for each in HOSPITALS for note in generate_notes(each, seed=seed, part="train")]
    texts = [text for text in texts if not _OLD.search(text)]
    kinds, found = list(PLANTED), []
    for number in range(count):
        text, kind = texts[number % len(texts)], ""
        if number % 2:
            kind = kinds[number // 2 % len(kinds)]
            planted = draw.choice(("{}", "Info: {}.", "({})", "{}; see above")).format(PLANTED[kind](draw))
            text = draw.choice((f"{planted} {text}", f"{text}\n{planted}", f"{text} {planted}, stable."))
        elif number % 4:
            text = f"{text} {draw.choice(NEGATIVES)(draw)}."
        found.append((text, kind))
    return found


def run(bench: Bench) -> None:
    """Scan the notes and print the figures."""
    draw = random.Random(bench.seed)  # noqa: S311 - no secret
    made = notes(500 if bench.quick else 2000, draw, bench.seed)
    began = time.process_time()
    answers = [kinds_in(text) for text, _ in made]
    speed = len(made) / (time.process_time() - began)
    planted, hit, wrong = Counter[str](), Counter[str](), Counter[str]()
    for (_, kind), found in zip(made, answers, strict=True):
        planted[kind] += 1
        hit[kind] += kind in found
        wrong.update(found - {kind})
    clean = [found for (_, kind), found in zip(made, answers, strict=True) if not kind]
    anything = sum(bool(found) for (_, kind), found in zip(made, answers, strict=True) if kind)
    checks = [
        Check(f"{measure} {kind}", value, "%", "", None)
        for kind in KINDS
        for measure, value in (
            ("recall", 100 * hit[kind] / planted[kind]),
            ("precision", 100 * hit[kind] / max(hit[kind] + wrong[kind], 1)),
        )
    ]
    twins = Twins()
    began = time.process_time()
    for number, (text, _) in enumerate(made):
        twins.add(text, str(number), None, test=False)
    twins.counts()
    twin_speed = len(made) / (time.process_time() - began)
    total = sum(planted[kind] for kind in KINDS)
    checks += [
        Check("recall, kind as planted", 100 * sum(hit[kind] for kind in KINDS) / total, "%", "", None),
        Check("recall, any kind", 100 * anything / total, "%", "", None),
        Check("clean notes flagged", 100 * sum(map(bool, clean)) / len(clean), "%", "", None),
        Check("patterns, one core", speed, "notes/s", f">= {GOAL:.0f}", speed >= GOAL),
        Check("near-duplicates, one core", twin_speed, "notes/s", "", None),
    ]
    length = sum(len(text) for text, _ in made) / len(made)
    bench.finish(checks, {"notes": len(made), "characters": round(length), "planted": dict(planted)})


if __name__ == "__main__":
    run(start("scan", __doc__))
