"""Opacus's accountants, loaded without Opacus."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import prv, rdp

from privet.common.privacy import accountants


def test_they_are_the_installed_ones() -> None:
    assert list(accountants.ORDERS) == RDPAccountant.DEFAULT_ALPHAS
    for own, real in ((accountants.rdp(), rdp), (accountants.prv(), prv)):
        assert own is not real
        assert own.__file__ == real.__file__
    found = [library.compute_rdp(q=0.1, noise_multiplier=0.9, steps=7, orders=accountants.ORDERS)
             for library in (accountants.rdp(), rdp)]  # fmt: skip
    np.testing.assert_array_equal(*found)


def test_an_epsilon_is_computed_without_torch_and_opacus_can_be_imported_afterwards() -> None:
    code = (
        "import sys; from privet.common.privacy.accounting import PrivacyEvent, epsilon\n"
        "found = epsilon([PrivacyEvent(1.0, 0.1, 10, 'record')], 1e-5)\n"
        "print(0 < found < 9, {'torch', 'opacus'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True set()\n", "")
