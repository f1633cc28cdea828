"""Short authentication strings: words by which two people compare keys over the telephone.

Twelve words stand for 96 bits of SHA-256. Who wants to pass off other keys under the same words has to find them among
2^96 candidates. A person who wrote down a wrong word notices: all words must be equal, and in order.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import re

_CONTEXT = b"privet-words/1\x00"
_COUNT = 12
# 256 words, so that each stands for a byte. No two are alike: at least two letters differ.
_WORDS = """
acorn actor album alpine amber anchor angle apple apron arctic arrow artist aspen atlas autumn avocado badge bakery
ballet bamboo banjo barrel basil basket beacon beaver bedroom beetle bicycle biscuit blanket blossom boiler bonfire
bottle boulder bracelet bridge bronze bubble bucket buffalo button cabin cactus camel campus candle canyon captain
caravan carbon carpet castle catalog cedar cello ceramic chapel cherry chimney cinema circus clarinet climate clover
cobalt coconut coffee comet compass copper coral cottage cradle cricket crystal cucumber curtain cyclone daisy dancer
december dentist desert diamond dinner doctor dolphin domino dragon drawer drummer eagle eclipse elbow elephant
emerald engine envelope ermine estate evening fabric falcon feather ferry fiddle figure filter flamingo flannel
florist flute fossil fountain freckle frigate furnace galaxy garden garlic gazelle giraffe glacier goblet gorilla
granite grocer guitar gypsum habitat hammer harbor hazel helmet heron hickory honey horizon hotel hurdle iceberg igloo
indigo inkwell island ivory jacket jaguar jasmine jelly jigsaw jungle juniper kangaroo kayak kernel ketchup kettle
kitchen koala ladder lantern laurel lavender lemon leopard library lilac lizard lobster lumber magnet mammoth mango
maple marble meadow mercury mirror mitten monsoon morning mosaic museum mustard napkin nectar needle nickel nomad
notebook nugget nutmeg oasis object ocean octopus olive onion opera orange orchard osprey otter oyster paddle palace
panda papaya parrot pebble pelican pencil pepper piano pigeon pilot pirate planet plaza pocket pollen popcorn postman
prairie pretzel pulley pyramid quarry rabbit radio raven ribbon robot rooster sapphire saxophone shadow silver spider
sunset teapot thunder tiger tomato trumpet umbrella velvet violin volcano walnut whistle yogurt zebra
"""
WORDS = tuple(_WORDS.split())
"""The words, by the byte that each stands for."""


def words_of(data: bytes) -> str:
    """Return the words that stand for some bytes: twelve, separated by spaces."""
    return " ".join(WORDS[byte] for byte in hashlib.sha256(_CONTEXT + data).digest()[:_COUNT])


def mistyped(told: str) -> str:
    """Return why typed words are no twelve words, as the end of a sentence; empty where they are twelve of the list.

    Only the list is compared, which is public: nothing is said about the words that were expected.
    """
    if re.search("[0-9]", told):  # a fingerprint
        return ""
    heard = re.findall("[a-z]+", told.lower())
    strange = [word for word in heard if word not in WORDS]
    if strange:
        near = difflib.get_close_matches(strange[0], WORDS, 1, 0.75)
        return f"; {strange[0][:20]!r} is no word of the list" + (f", {near[0]} is" if near else "")
    return "" if len(heard) == _COUNT else f"; expected {_COUNT} words, found {len(heard)}"


def same_words(told: str, expected: str) -> bool:
    """Return whether typed words are the expected ones. Case, and what separates them, do not matter."""
    heard = " ".join(re.findall("[a-z]+", told.lower()))
    return hmac.compare_digest(heard.encode(), expected.encode())
