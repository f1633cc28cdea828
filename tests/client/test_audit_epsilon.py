"""The audit of epsilon tells half of the noise from all of it, and releases are an exact sum plus noise, bit for bit.

The full audit, over both modes and two claims, is `benchmarks/audit_epsilon.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_epsilon import (
    COMPANIONS,
    Arm,
    Version,
    World,
    choose_adapter,
    choose_event,
    document_of,
    lower_bound,
    noises,
    present,
    step,
    steps,
    world_of,
    write_base,
)

from privet.client.training.features import Feature
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study

CLAIM, TRIALS = 4.0, 60_000

Attack = tuple[Path, Version, list[Feature], Adapter]


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    threads = torch.get_num_threads()
    base = write_base(tmp_path_factory.mktemp("audit"))
    version, features = present(base, 0)
    yield base, version, features, choose_adapter(version, 0, directions=1)[0]
    torch.set_num_threads(threads)


def world(attack: Attack, arm: Arm) -> World:
    base, version, features, adapter = attack
    return world_of(arm, Study.parse(document_of(base, arm)), version.host, adapter, features)


@pytest.mark.parametrize(("noise", "caught"), [(1.0, False), (0.5, True)])
def test_half_of_the_noise_is_caught_and_all_of_it_is_not(attack: Attack, noise: float, caught: bool) -> None:
    # Randomness is secret. The bounds are about 2.35 and 4.66, and stayed within 2.0..2.8 and 4.1..5.6 in 20,000 draws
    # of the two counts. Events chosen for fewer trials are less rare, so that their counts vary less.
    audited = world(attack, Arm("local", CLAIM, noise=noise))
    having, without = (noises(audited, with_x, TRIALS) for with_x in (True, False))
    bound = lower_bound(having, without, choose_event(audited.mean, 1.0, TRIALS // 6))
    assert (bound.epsilon > CLAIM) == caught
    assert bound.epsilon > 1.0


@pytest.mark.parametrize("arm", [Arm("local", CLAIM), Arm("distributed", CLAIM), Arm("local", CLAIM, rate=0.5)])
def test_a_release_is_the_sum_of_the_drawn_terms_plus_noise(attack: Attack, arm: Arm) -> None:
    audited = world(attack, arm)  # which compares sums over all with those of records alone
    for with_x in (True, False):
        ratios, different = steps(audited, with_x, 10)
        assert different == 0
        assert np.all(np.isfinite(ratios))


def test_a_release_with_other_terms_is_noticed(attack: Attack) -> None:
    audited = world(attack, Arm("distributed", CLAIM))
    audited.terms[0, -1] += 1 << 40
    assert step(audited, with_x=True, compare=True)[1]


def test_the_adapter_puts_the_companions_on_a_tie_and_moves_the_sum_by_x_alone(attack: Attack) -> None:
    audited = world(attack, Arm("local", CLAIM))
    norms = np.linalg.norm(audited.terms * audited.lattice, axis=1)
    assert norms.max() <= 1
    assert norms[-1] > 0.999
    learning = np.count_nonzero(norms[:COMPANIONS] > 0.9)
    assert 3 < learning < COMPANIONS - 3  # those that a last bit put into the wrong class
