"""Cost of secure aggregation, against the AES bound and against Flower's SecAgg+ in the same run.

Every figure is CPU time of this one process (all threads), so that other load on the machine matters little.
For each number of sites n and of values d, with a tenth of the sites dropping out after sharing their keys:

* client: all five steps of one site with quantisation and message encoding; median over the sites measured.
  Where n * d is large, only a few sites build their vectors in full and the others send unmasked words;
  the sum is then not checked, everything else is the same.
* coordinator: decoding and admitting all messages, and unmasking the sum; and its time with the masks removed
  on two threads.
* AES bound: the keystream of as many masks as a client applies, AES-256-CTR in cache-sized blocks, measured
  between the clients.
* Flower: the client's and server's own functions from the installed package, same k and threshold, its
  default ranges. One client per repetition; the server's figure is one secret of each kind, the mean of six
  masks and one addition, times how often it does each. Its network and message classes are left out.

The rows are of the hybrid suite x25519-mlkem768. A second table compares the suites at one n and d: rounds of each in
turn, in an order that changes, and the median of the clients' times in each round.
"""

from __future__ import annotations

import gc
import importlib
import logging
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from harness import Check, start

from privet.common.secagg import encoding, graph, masks, messages, quantize, terms, transcript
from privet.common.secagg.coordinator import Aggregator
from privet.common.secagg.quantize import Segment
from privet.common.secagg.site import Identity, RecordedStep, advertise, confirm, mask, reveal, share
from privet.common.secagg.suites import DEFAULT, Suite

# The package exports a function under the module's name, so the module is imported by its full name.
flower_client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

BLOCK = 256 * 1024
# Masks that Flower's server draws and removes, one after the other as it does, for the mean of one.
MASKS = 6
# Values in all vectors together up to which every site builds its vector in full.
FULL = 300_000_000
HEADER = "   n    k   t      d |    client    coord. B/value /bound   mem |   Flower    coord. |  client  coord."


class Stopwatch:
    """Adds up CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run `work` and book its CPU time under `name`."""
        start = time.process_time()
        result = work(*args, **named)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        return result

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())


class Bytes:
    """Reproducible bytes from AES, as cheap as the system's generator."""

    def __init__(self, seed: int) -> None:
        self._stream = Cipher(AES256(seed.to_bytes(32, "big")), CTR(bytes(16))).encryptor()

    def __call__(self, count: int) -> bytes:
        """Return `count` bytes."""
        return self._stream.update(bytes(count))


def aes_rate() -> float:
    """Return bytes of AES-256-CTR keystream per CPU second, in blocks of 256 KiB."""
    stream = Cipher(AES256(bytes(32)), CTR(bytes(16))).encryptor()
    zeros, out = bytes(BLOCK), bytearray(BLOCK)
    start = time.process_time()
    for _ in range(400):
        stream.update_into(zeros, out)
    return 400 * BLOCK / (time.process_time() - start)


@dataclass
class Setting:
    """One row of the table."""

    sites: int
    values: int
    seed: int
    suite: Suite = DEFAULT

    def __post_init__(self) -> None:
        self.corrupt, self.dropping = self.sites // 5, self.sites // 10
        # 16 bits and 30 sites, or 14 bits and 100, fill lanes of 21 bits.
        self.bits = 16 if self.sites <= 30 else 14
        choice = graph.choose(self.sites, self.corrupt, self.dropping)
        survivors = max(terms.least_survivors(self.sites, self.corrupt), self.sites - self.dropping)
        self.identities = [
            Identity(f"site-{i:03d}", Ed25519PrivateKey.from_private_bytes(bytes([1, i]) + bytes(30)))
            for i in range(self.sites)
        ]
        self.pins = {who.name: who.key.public_key().public_bytes_raw() for who in self.identities}
        self.parameters = messages.Parameters(
            session=bytes(32),
            round=1,
            inputs=bytes(32),
            cohort=tuple(messages.CohortMember(name, key) for name, key in sorted(self.pins.items())),
            degree=choice.degree,
            threshold=choice.threshold,
            corrupt=self.corrupt,
            security=80,
            min_survivors=survivors,
            bits=self.bits,
            segments=(Segment("weight", 1, 1e6, count=True), Segment("update", self.values, 1.0)),
            suite=self.suite,
        )
        self.layout = self.parameters.layout
        self.neighbours = choice.degree or self.sites - 1

    def vector(self, site: int) -> dict[str, Any]:
        """Return a site's values."""
        rng = np.random.default_rng(self.seed + site)
        return {"weight": np.array([site + 1]), "update": 0.1 * rng.standard_normal(self.values, np.float32)}


def _record(entry: RecordedStep) -> None:
    """Stand in for the site's durable record."""


def _unmasked(words: quantize.Words, plus: object, minus: object, *, workers: int = 1) -> None:
    """Stand in for the masks of a site that does not build its vector in full."""


def ours(setting: Setting, between: Callable[[], None]) -> dict[str, Any]:
    """Run one round; call `between` after each site that builds its vector in full."""
    n, floor = setting.sites, terms.Floor(classical=True)
    server, coordinator = Stopwatch(), Aggregator(setting.parameters)
    clients = [Stopwatch() for _ in range(n)]
    random = [Bytes(1000 * setting.seed + i) for i in range(n)]
    everyone = n * setting.values <= FULL
    full = set(range(n)) if everyone else {0, n // 2, n - 2}
    dropped = set(range(1, n, n // setting.dropping)) if setting.dropping else set()
    full -= dropped

    def send(i: int, message: Any) -> None:
        parts = clients[i]("messages", encoding.encode_parts, message)
        data = b"".join(parts)
        sent[i] += len(data)
        server("admit", lambda: coordinator.admit(encoding.decode(type(message), data)))

    def receive(i: int, message: Any) -> Any:
        # What all sites receive alike is encoded once.
        data = broadcast if message is roster else server("encode messages", encoding.encode, message)
        return clients[i]("messages", encoding.decode, type(message), data)

    sent = [0] * n
    states: dict[int, Any] = {}
    for i, who in enumerate(setting.identities):
        states[i], out = clients[i](
            "advertise", advertise, who, setting.parameters, setting.parameters.inputs, setting.pins, floor, random[i]
        )
        send(i, out)
    roster = server("roster", coordinator.roster)
    broadcast = server("encode messages", encoding.encode, roster)
    for i in states:
        states[i], out = clients[i]("share", share, states[i], receive(i, roster))
        send(i, out)
    deliveries = server("deliveries", coordinator.deliveries)
    expected = np.zeros(setting.layout.words, quantize.WORD)
    alive = [i for i in states if i not in dropped]
    spare = quantize.quantise(setting.layout, setting.vector(0), random[0]).words
    for i in alive:
        if i in full:
            values = setting.vector(i)
            words = clients[i]("encode", quantize.quantise, setting.layout, values, random[i]).words
            if everyone:
                np.add(expected, words, out=expected)
            states[i], out = clients[i]("mask", mask, states[i], receive(i, deliveries[i]), words, _record)
        else:
            with mock.patch.object(masks, "apply", _unmasked):
                states[i], out = mask(states[i], deliveries[i], spare.copy(), _record)
        send(i, out)
        del out
        if i in full:
            between()
    lists = server("survivors", coordinator.survivors)
    for i in alive:
        states[i], out = clients[i]("confirm", confirm, states[i], receive(i, lists[i]))
        send(i, out)
    proofs = server("proofs", coordinator.proofs)
    for i in alive:
        out = clients[i]("reveal", reveal, states[i], receive(i, proofs[i]), _record)
        send(i, out)
    began = time.perf_counter(), time.process_time()
    total = server("unmask", lambda: coordinator.total(workers=2))
    # The masks are removed on two threads, which costs no less time of the processor.
    saved = time.process_time() - began[1] - (time.perf_counter() - began[0])
    if everyone and not np.array_equal(total.words, expected):
        raise SystemExit(f"the sum is wrong at n = {n}, d = {setting.values}")
    if everyone:
        server("decode", quantize.dequantise, setting.layout, total.words, len(alive))
    else:
        # The words still bear what was not masked; decoding costs the same.
        limited = np.bitwise_and(total.words, np.uint64(0))
        server("decode", quantize.dequantise, setting.layout, limited, len(alive))
    measured = [clients[i] for i in sorted(full)]
    steps = {name: statistics.median(c.seconds[name] for c in measured) for name in measured[0].seconds}
    return {
        "client": statistics.median(c.total for c in measured),
        "client_steps": steps,
        "coordinator": server.total,
        "coordinator_two_threads": server.total - max(0.0, saved),
        "coordinator_steps": server.seconds,
        "bytes_per_value": max(sent) / setting.values,
        "sum_checked": everyone,
        "clients_measured": len(measured),
    }


def flower(setting: Setting, repeats: int) -> Callable[[], None]:
    """Return what measures one Flower client; its results gather in the function's attribute `results`."""
    results: list[dict[str, float]] = []
    n, k = setting.sites, setting.neighbours + 1
    k += 1 - k % 2 if k < n else 0
    threshold = setting.parameters.threshold
    alive = n - setting.dropping
    configs = {
        "sample_num": n,
        "share_num": k,
        "threshold": threshold,
        "clipping_range": 8.0,
        "target_range": 1 << 22,
        "mod_range": 1 << 32,
        "max_weight": 1000.0,
    }

    def once() -> None:
        if len(results) >= repeats:
            return
        client, server = Stopwatch(), Stopwatch()
        state = flower_client.SecAggPlusState()
        state.nid = 0
        own = client("setup", flower_client._setup, state, configs)
        others = {i: (generate_key_pairs(), generate_key_pairs()) for i in range(1, k)}
        keys: dict[str, Any] = {"0": (own["pk1"], own["pk2"])}
        for i, ((_, pk1), (_, pk2)) in others.items():
            keys[str(i)] = (public_key_to_bytes(pk1), public_key_to_bytes(pk2))
        client("share", flower_client._share_keys, state, keys)
        seed_share, key_share = state.rd_seed_share_dict[0], state.sk1_share_dict[0]
        sources = list(others)
        sealed = []
        for i in sources:
            shared = generate_shared_key(others[i][1][0], flower_client.bytes_to_public_key(state.pk2))
            sealed.append(encrypt(shared, share_keys_plaintext_concat(i, 0, seed_share, key_share)))
        vector = setting.vector(0)["update"]
        fit = ndarrays_to_parameters([vector])
        inbox = {"ctxts": sealed, "srcs": sources}
        out = client("mask", flower_client._collect_masked_vectors, state, inbox, 500, fit)
        client("unmask", flower_client._unmask, state, {"active_nids": list(range(k - 1)), "dead_nids": [k - 1]})
        sent = sum(len(part) for part in out["masked_params"])

        shares = [flower_client.create_shares(secret, threshold, k) for secret in (state.rd_seed, state.sk1)]
        for name, parts, count in (("seeds", shares[0], alive), ("keys", shares[1], setting.dropping)):
            server(name, combine_shares, parts[:threshold])
            server.seconds[name] *= count
        total = [np.zeros((1,), np.int64), np.zeros(vector.shape, np.int64)]
        shapes = [array.shape for array in total]
        drawn = total
        for _ in range(MASKS):
            drawn = server("draw", pseudo_rand_gen, state.rd_seed, 1 << 32, shapes)
            total = server("apply", parameters_subtraction, total, drawn)
        pair_masks = setting.dropping * min(k - 1, alive)
        for name in ("draw", "apply"):
            server.seconds[name] *= (alive + pair_masks) / MASKS
        total = server("sum", parameters_addition, total, drawn)
        server.seconds["sum"] *= alive - 1
        total = server("mod", parameters_mod, total, 1 << 32)
        _, rest = factor_extract(total)
        server("dequantize", dequantize, rest, 8.0, 1 << 22)
        results.append({"client": client.total, "coordinator": server.total, "bytes_per_value": sent / setting.values})

    once.results = results  # type: ignore[attr-defined]
    return once


def peak_memory(setting: Setting) -> float:
    """Return a client's peak memory from encoding to the masked message, over the size of its float32 vector.

    The vector itself counts.
    """
    tracemalloc.start()
    try:
        values = setting.vector(0)
        tracemalloc.reset_peak()
        words = quantize.quantise(setting.layout, values, Bytes(1)).words
        masks.apply(words, [bytes([i]) * 32 for i in range(setting.neighbours + 1)], [])
        sent = masks.pack(words) if setting.parameters.packed else words
        message = messages.Masked(bytes(32), 0, bytes(32), (), sent, suite=setting.suite)
        transcript.signed_bytes(message, transcript.Binding(bytes(32), 1, bytes(32)))
        encoding.encode_parts(message)
        return tracemalloc.get_traced_memory()[1] / (4 * setting.values)
    finally:
        tracemalloc.stop()


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Measure one row: our clients, the AES bound and Flower's clients in turn."""
    rates: list[float] = [aes_rate()]
    other = flower(setting, repeats)

    def between() -> None:
        if len(rates) < 12:
            rates.append(aes_rate())
        other()

    row = ours(setting, between)
    results = other.results  # type: ignore[attr-defined]
    theirs = {name: statistics.median(r[name] for r in results) for name in results[0]}
    rate = statistics.median(rates)
    bound = (setting.neighbours + 1) * 8 * setting.layout.words / rate
    return {
        "n": setting.sites,
        "d": setting.values,
        "k": setting.neighbours,
        "t": setting.parameters.threshold,
        "bits": setting.bits,
        "lane_bits": setting.layout.lane_bits,
        **row,
        "aes_bytes_per_second": rate,
        "aes_bound": bound,
        "client_over_bound": row["client"] / bound,
        "memory_over_vector": peak_memory(setting),
        "flower": theirs,
        "flower_client_over_ours": theirs["client"] / row["client"],
        "flower_coordinator_over_ours": theirs["coordinator"] / row["coordinator"],
        "flower_coordinator_over_ours_two_threads": theirs["coordinator"] / row["coordinator_two_threads"],
    }


def compare(sites: int, values: int, seed: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each suite, from rounds of all suites in turn."""
    runs: dict[Suite, list[dict[str, Any]]] = {suite: [] for suite in Suite}
    order = list(Suite)
    for _ in range(repeats):
        for suite in order:
            gc.collect()
            runs[suite].append(ours(Setting(sites, values, seed, suite), lambda: None))
        order = [*order[1:], order[0]]
    rows = []
    for suite, found in runs.items():
        classical = runs[Suite.X25519]
        ratios = [one["client"] / other["client"] for one, other in zip(found, classical, strict=True)]
        rows.append(
            {
                "suite": suite.value,
                "n": sites,
                "d": values,
                "client": statistics.median(one["client"] for one in found),
                "client_over_classical": statistics.median(ratios),
                "client_steps": {
                    name: statistics.median(one["client_steps"][name] for one in found)
                    for name in found[0]["client_steps"]
                },
                "coordinator": statistics.median(one["coordinator"] for one in found),
                "bytes_per_value": found[0]["bytes_per_value"],
                "bytes_over_classical": found[0]["bytes_per_value"] / classical[0]["bytes_per_value"],
            }
        )
    return rows


def suite_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Compare the suites with their targets."""
    result = []
    for row in rows:
        if row["suite"] == Suite.X25519.value:
            continue
        at = f"{row['suite']} over x25519, n={row['n']} d={row['d']:.0e}"
        ratio, size = row["client_over_classical"], row["bytes_over_classical"]
        result.append(Check(f"client, {at}", ratio, "x", "<= 1.15", ratio <= 1.15))
        # Each neighbour gets a ciphertext of 1088 bytes. In lanes of 21 bits, a packed vector saves a 64th.
        result.append(Check(f"bytes sent, {at}", size, "x", "<= 1.01", size <= 1.01))
    return result


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Compare the rows with their targets."""
    result = []
    for row in rows:
        at = f"n={row['n']} d={row['d']:.0e}"
        many, large = row["n"] >= 30, row["d"] >= 1e6
        if many and large:
            ratio = row["client_over_bound"]
            result.append(Check(f"client over AES bound, {at}", ratio, "x", "<= 2", ratio <= 2))
        if row["lane_bits"] == 21 and large:  # below a million values the fixed part of the messages weighs
            size = row["bytes_per_value"]
            result.append(Check(f"bytes sent per value, {at}", size, "B", "<= 2.7", size <= 2.7))
        if row["n"] == 30 and row["d"] == 10_000_000:
            seconds = row["coordinator"]
            result.append(Check(f"coordinator, {at}", seconds, "s CPU", "< 1", seconds < 1))
        if large:
            memory = row["memory_over_vector"]
            result.append(Check(f"client memory over its vector, {at}", memory, "x", "< 3", memory < 3))
        if many:
            client, server = row["flower_client_over_ours"], row["flower_coordinator_over_ours"]
            threads = row["flower_coordinator_over_ours_two_threads"]
            result.append(Check(f"Flower's client over ours, {at}", client, "x", ">= 10", client >= 10))
            result.append(Check(f"Flower's coordinator over ours, {at}", server, "x", ">= 20", server >= 20))
            result.append(Check(f"the same in time, ours on two threads, {at}", threads, "x", "", None))
    return result


def main() -> None:
    """Run, print the table and the checks."""
    bench = start("secagg", __doc__)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # All sites live in this one process; the collector would walk through all of them on each one's time.
    gc.disable()
    sites = [10, 30] if bench.quick else [10, 30, 100]
    sizes = [100_000, 1_000_000] if bench.quick else [100_000, 1_000_000, 10_000_000]
    rows = []
    bench.say(HEADER)
    for n in sites:
        for d in sizes:
            gc.collect()
            row = measure(Setting(n, d, bench.seed), 1 if bench.quick or d >= 1e7 or n >= 100 else 3)
            rows.append(row)
            bench.say(
                f"{n:>4} {row['k']:>4} {row['t']:>3} {d:>6.0e} | {row['client'] * 1e3:>6.1f} ms "
                f"{row['coordinator'] * 1e3:>6.1f} ms {row['bytes_per_value']:>7.3f} "
                f"{row['client_over_bound']:>5.2f}x {row['memory_over_vector']:>4.2f}x | "
                f"{row['flower']['client'] * 1e3:>6.0f} ms {row['flower']['coordinator'] * 1e3:>6.0f} ms | "
                f"{row['flower_client_over_ours']:>6.1f}x {row['flower_coordinator_over_ours']:>6.1f}x"
            )
    # Last, as the rows' times are of a process that has done little else.
    suites = compare(30, 1_000_000, bench.seed, 3 if bench.quick else 9)
    for row in suites:
        bench.say(
            f"{row['suite']:<16} n={row['n']} d={row['d']:.0e} client {row['client'] * 1e3:.1f} ms "
            f"({row['client_over_classical']:.3f}x), coordinator {row['coordinator'] * 1e3:.1f} ms, "
            f"{row['bytes_per_value']:.4f} B/value ({row['bytes_over_classical']:.4f}x)"
        )
    bench.finish([*checks(rows), *suite_checks(suites)], {"rows": rows, "suites": suites})


if __name__ == "__main__":
    main()
