"""Random draws that are paid for: the cost of a round is spent before its first variate exists.

Everything of a round that is random and looks at records (which units a step draws, the noise of training and of
validation) comes from `Paid` streams that share one `Payment`. The payment is made by the streams themselves. So
no order of calls, no failure and no new code path in training can draw before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privet.common.privacy.noise import Randomness


class Payment:
    """A payment that is made once, before the first draw of any of its streams. Threads may share it.

    If it fails, the draw fails with its error, nothing is drawn, and the next draw tries to pay again.
    """

    def __init__(self, pay: Callable[[], None]) -> None:
        self._pay = pay
        self._made = False
        self._lock = threading.Lock()

    def make(self) -> None:
        """Pay, unless it was paid. Raises what `pay` raises."""
        with self._lock:
            if not self._made:
                self._pay()
                self._made = True


class Paid(Randomness):
    """A stream that makes a payment before its first variate, and otherwise is `source`.

    Args:
        source: Where variates come from. Nothing else may use it.
        payment: Is made before the first of them.
    """

    def __init__(self, source: Randomness, payment: Payment) -> None:
        # Without a key of its own: what draws in a way that is not below fails, instead of drawing unpaid.
        self._source = source
        self._payment = payment

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` uniform 64-bit words. Raises what the payment raises."""
        self._payment.make()
        return self._source.words(count)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return `count` uniform variates as `Randomness.uniform`. Raises what the payment raises."""
        self._payment.make()
        return self._source.uniform(count)

    def lattice_normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` variates as `Randomness.lattice_normal`. Raises what the payment raises."""
        self._payment.make()
        return self._source.lattice_normal(count)
