"""Check digits and check letters of identification numbers. Each function takes a number without separators."""

from __future__ import annotations

from typing import Final

IBAN_LENGTHS: Final = {
    "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18,
    "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "SI": 19, "SK": 24,
}  # fmt: skip
"""Characters of an IBAN by country (ISO 13616 registry)."""
_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"
_VIN = {letter: int(digit) for letter, digit in zip("ABCDEFGHJKLMNPRSTUVWXYZ", "12345678123457923456789", strict=True)}
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
_ODD = {letter: value for value, letter in enumerate("BAKPLCQDREVOSFTGUHMINJWZYX")}


def luhn(digits: str) -> bool:
    """Whether the last digit checks (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban(text: str) -> bool:
    """Whether an IBAN in upper case has its country's length and checks modulo 97 (ISO 13616)."""
    if len(text) != IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def nhs(digits: str) -> bool:
    """Whether a UK NHS number of 10 digits checks modulo 11 (NHS Data Dictionary, "NHS NUMBER")."""
    check = -sum(int(digit) * weight for digit, weight in zip(digits, range(10, 1, -1), strict=False)) % 11
    return check < 10 and int(digits[9]) == check


def nir(text: str) -> bool:
    """Whether a French NIR of 15 characters has the right key, 97 - number mod 97; Corsica is 2A or 2B (INSEE)."""
    number = text[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and int(text[13:]) == 97 - int(number) % 97


def kvnr(text: str) -> bool:
    """Whether a letter with 9 digits is a German KVNR: Luhn with weights from 1, the letter as its number (GKV)."""
    total = 0
    for place, digit in enumerate(f"{ord(text[0]) - 64:02}{text[1:9]}"):
        value = int(digit) * (1 + place % 2)
        total += value // 10 + value % 10
    return total % 10 == int(text[9])


def dni(text: str) -> bool:
    """Whether a Spanish DNI (8 digits) or NIE (X, Y or Z, and 7 digits) ends with the right letter."""
    number = text[:-1].translate({ord("X"): "0", ord("Y"): "1", ord("Z"): "2"})
    return _DNI[int(number) % 23] == text[-1]


def bsn(digits: str) -> bool:
    """Whether 9 digits are a Dutch BSN: weighted 9 to 2 and -1, the sum is a multiple of 11."""
    total = sum(int(digit) * weight for digit, weight in zip(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=True))
    return digits != "000000000" and total % 11 == 0


def codice_fiscale(text: str) -> bool:
    """Whether an Italian codice fiscale of 16 characters ends with the right letter (DM 23 December 1976)."""
    total = 0
    for place, sign in enumerate(text[:15]):
        letter = chr(ord("A") + int(sign)) if sign.isdigit() else sign
        total += ord(letter) - ord("A") if place % 2 else _ODD[letter]
    return chr(ord("A") + total % 26) == text[15]


def vin(text: str) -> bool:
    """Whether a vehicle number of 17 characters checks at its ninth place (49 CFR 565.15(c))."""
    total = sum(
        (int(sign) if sign.isdigit() else _VIN[sign]) * weight for sign, weight in zip(text, _VIN_WEIGHTS, strict=True)
    )
    return "0123456789X"[total % 11] == text[8]


def dea(text: str) -> bool:
    """Whether two letters with 7 digits are a DEA registration number."""
    a, b, c, d, e, f, check = (int(digit) for digit in text[2:])
    return (a + c + e + 2 * (b + d + f)) % 10 == check
