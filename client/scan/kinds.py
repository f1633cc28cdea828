"""What a scan counts, by name: kinds of direct identifiers, and faults of texts.

The identifiers follow the 18 kinds of HIPAA's Safe Harbor (45 CFR 164.514(b)(2)(i)), as far as patterns can, with
national numbers of Europe. Biometric identifiers and photographs (kinds P and Q) are not text.
"""

from __future__ import annotations

from typing import Final

KINDS: Final[dict[str, str]] = {
    "name": "name after a salutation or a label, or of the operator's list",
    "address": "street with house number",
    "postcode": "postal code",
    "date": "date finer than a year",
    "age-over-89": "age of 90 or more",
    "phone": "telephone number",
    "fax": "fax number",
    "email": "e-mail address",
    "us-ssn": "US social security number",
    "uk-nhs": "UK NHS number, with check digit",
    "uk-nino": "UK national insurance number",
    "fr-nir": "French social security number (NIR), with key",
    "de-insurance": "German health insurance number (KVNR), with check digit",
    "es-dni": "Spanish DNI or NIE, with check letter",
    "nl-bsn": "Dutch BSN, with check digit",
    "it-cf": "Italian codice fiscale, with check letter",
    "iban": "IBAN, with check digits",
    "card": "payment card number, with check digit",
    "record-number": "number of a patient, case or record",
    "health-plan": "number of a health plan",
    "account": "account number",
    "licence": "certificate or licence number",
    "vehicle": "vehicle number or plate",
    "device": "serial number or address of a device",
    "url": "web address",
    "ip": "IP address",
    "long-number": "other number of seven digits or more",
}
"""Kinds of direct identifiers, each with a short description."""

ANY: Final = "any-identifier"
"""A record with an identifier of one kind or more."""

FAULTS: Final[dict[str, str]] = {
    "empty": "no text",
    "near-duplicate": "text much like that of another unit's record",
    "train-test": "training text much like a test text",
    "label-noise": "text much like one with another label",
    "templated": "text of which most is in most records (of a sample)",
}
"""Faults of texts, each with a short description."""

COUNTED: Final = (*KINDS, ANY, *FAULTS)
"""All names that a rule of the site's policy may limit."""
