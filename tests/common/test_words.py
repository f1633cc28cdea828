"""The words that people compare: distinct to the ear, equal for equal bytes alone."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.pki.words import WORDS, mistyped, same_words, words_of


def apart(one: str, other: str) -> int:
    """Return the least number of letters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        following = [i]
        for j, right in enumerate(other, 1):
            following.append(min(row[j] + 1, following[-1] + 1, row[j - 1] + (left != right)))
        row = following
    return row[-1]


def test_there_is_a_word_for_each_byte_and_no_two_are_alike() -> None:
    assert len(set(WORDS)) == 256
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) >= 5 for word in WORDS)
    assert min(apart(one, other) for one, other in combinations(WORDS, 2)) >= 2


def test_the_words_of_known_bytes() -> None:
    # SHA-256 of "privet-words/1", a zero byte and "abc", taken with sha256sum: 12 bytes, each the number of a word.
    numbers = bytes.fromhex("24076334500a3b1b291639d1")
    assert words_of(b"abc") == " ".join(WORDS[number] for number in numbers)


def test_it_is_said_what_is_wrong_with_typed_words_and_nothing_of_those_expected() -> None:
    words = words_of(b"abc")
    assert mistyped(words) == ""  # twelve of the list: whether they are the right ones is not said here
    assert mistyped(" ".join(words.split()[:11])) == "; expected 12 words, found 11"
    assert mistyped(words.replace(words.split()[0], "bambo")) == "; 'bambo' is no word of the list, bamboo is"
    assert mistyped("xqzw") == "; 'xqzw' is no word of the list"
    assert mistyped("07493 38178") == ""


@given(st.binary(max_size=64))
def test_typed_words_count_however_they_are_written(data: bytes) -> None:
    words = words_of(data)
    assert len(words.split()) == 12
    for told in (words, words.upper(), f"  {words.replace(' ', ', ')}.", words.replace(" ", "\n")):
        assert same_words(told, words)


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: w[::-1], lambda w: [*w, "zebra"], lambda w: []])
def test_any_other_words_do_not(change: object) -> None:
    words = words_of(b"keys").split()
    assert callable(change)
    assert not same_words(" ".join(change(words)), " ".join(words))


def test_one_wrong_word_in_any_place_is_noticed() -> None:
    words = words_of(b"keys").split()
    for place, right in enumerate(words):
        wrong = "acorn" if right != "acorn" else "zebra"
        assert not same_words(" ".join([*words[:place], wrong, *words[place + 1 :]]), " ".join(words))
