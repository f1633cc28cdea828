"""Every error that privet raises on purpose, and the exit code each one ends a command with.

::

    PrivetError                      1
    |-- StudyError                   2   a study file, or data, that cannot mean what it says
    |   `-- DataError                2   a site's data does not fit the study's data contract
    |-- RefusedError                 3   a site or a rule said no
    |   |-- PolicyError              3   the site's policy does not admit it
    |   `-- BudgetExhaustedError     3   the privacy budget does not cover it
    |-- ProtocolError                4   a message that the protocol does not allow
    |   `-- TooFewSitesError         4   fewer sites delivered than the study demands
    |-- VerificationError            5   a digest or signature does not match
    `-- StateError                   6   what is on disk, or in training, cannot be continued
        `-- DivergedError            6   a loss, an update or an adapter is not finite

A message says what was expected and what was found; the hint says what to do. Neither ever carries a
record, a label found in data, a token or a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class PrivetError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: What was expected and what was found.
        hint: What the reader can do about it; may be empty.
        exit_code: What a command that ends with this error returns to the shell.
        private: Whether, raised at a site, the text is the site's own affair and must not be sent to others.
    """

    exit_code: ClassVar[int] = 1
    private: bool = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class StudyError(PrivetError):
    """A study file that cannot mean what it says."""

    exit_code = 2


class DataError(StudyError):
    """A site's data does not fit the study's data contract."""

    private = True


class RefusedError(PrivetError):
    """A site or a rule said no.

    Attributes:
        code: The rule in one word, as the round log names it.
        rule: Where it stands.
        asked: What was asked for.
        allowed: What is allowed. None of these depends on data.
    """

    exit_code = 3
    code: str = "E_REFUSED"
    rule: str = ""
    asked: str = ""
    allowed: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that a site's policy has against a study; shown verbatim at both ends, so it tells nothing of data.

    Attributes:
        code: As `E_RANK`.
        rule: The policy's key.
        asked: What the study asks.
        allowed: What the policy allows.
    """

    code: str
    rule: str
    asked: str
    allowed: str


class PolicyError(RefusedError):
    """The site's policy does not admit it.

    Attributes:
        code, rule, asked, allowed: Of the first finding, as a `refusal` in the round log states it.
        findings: Everything that it has against it; none where the error was read back from a log.
        policy: Digest of the site's rules.
    """

    def __init__(self, message: str, hint: str = "", findings: tuple[Finding, ...] = (), policy: str = "") -> None:
        super().__init__(message, hint)
        for first in findings[:1]:
            self.code, self.rule, self.asked, self.allowed = first.code, first.rule, first.asked, first.allowed
        self.findings = findings
        self.policy = policy


class BudgetExhaustedError(RefusedError):
    """The privacy budget does not cover what was asked."""

    private = True
    code = "E_BUDGET"
    rule = "limit.epsilon"


class ProtocolError(PrivetError):
    """A message that the protocol does not allow."""

    exit_code = 4


class TooFewSitesError(ProtocolError):
    """Fewer sites delivered than the study demands."""


class VerificationError(PrivetError):
    """A digest or signature does not match what was agreed."""

    exit_code = 5


class StateError(PrivetError):
    """What is on disk, or in training, cannot be continued from."""

    exit_code = 6
    private = True


class DivergedError(StateError):
    """A loss, an update or an adapter is not finite."""
