"""The errors that privet raises on purpose, and the exit code with which each one ends a command.

::

    PrivetError                      1
    |-- StudyError                   2   a study file or an argument is not valid
    |   `-- DataError                2   a site's data does not fit the study's data contract
    |-- RefusedError                 3   a site or a rule refused a request
    |   |-- PolicyError              3   the site's policy does not admit the study
    |   |-- ScanError                3   the site's policy requires a scan of its files, which is missing or not clean
    |   |-- SpentRoundError          3   the site charged the round, and its update was lost
    |   `-- BudgetExhaustedError     3   the privacy budget does not cover the cost
    |-- ProtocolError                4   the protocol does not allow this message
    |   `-- TooFewSitesError         4   fewer sites delivered than the study demands
    |-- VerificationError            5   a digest or a signature does not match
    `-- StateError                   6   files or training are in a state that cannot be continued
        `-- DivergedError            6   a loss, an update or an adapter is not finite

`privet audit verify` also ends with 7: the log is valid, and there is nothing but a log.

A message says what was expected and what was found. The hint says what to do. Neither ever carries a
record, a label found in data, a token or a private key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

LOG_ALONE = 7
"""Exit code of an audit that verified a log and had nothing else to check."""


class PrivetError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: What was expected and what was found.
        hint: What the reader can do about it; may be empty.
        exit_code: Exit code of a command that ends with this error.
        private: Whether the text must stay at the site that raised the error: it may describe the site's data,
            budget or files.
    """

    exit_code: ClassVar[int] = 1
    private: bool = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a command that says where it stands.

    Attributes:
        standing: What is kept, and how to continue: sentences.
    """

    def __init__(self, standing: str) -> None:
        super().__init__(standing)
        self.standing = standing


_Error = TypeVar("_Error", bound=PrivetError)


def together(errors: Sequence[_Error]) -> _Error:
    """Return one error of several, of the first one's type: each message and each hint once, on a line of its own."""
    if len(errors) == 1:
        return errors[0]
    messages = dict.fromkeys(error.message for error in errors)
    hints = dict.fromkeys(hint for error in errors for hint in error.hint.split("\n  ") if hint)
    found = type(errors[0])("\n  ".join(messages), "\n  ".join(hints))
    found.private = any(error.private for error in errors)
    return found


class StudyError(PrivetError):
    """A study file or an argument is not valid."""

    exit_code = 2


class DataError(StudyError):
    """A site's data does not fit the study's data contract.

    No subclass may be raised: a site answers every data error in the same words, by its type.

    Attributes:
        missing: Columns that a file lacks, where that is what is wrong.
    """

    private = True

    def __init__(self, message: str, hint: str = "", missing: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.missing = missing


class RefusedError(PrivetError):
    """A site or a rule refused a request. No attribute depends on data.

    Attributes:
        code: Code of the rule, as the round log names it.
        rule: Key of the rule in the policy.
        asked: Value that was asked for.
        allowed: Value that is allowed.
    """

    exit_code = 3
    code: str = "E_REFUSED"
    rule: str = ""
    asked: str = ""
    allowed: str = ""


@dataclass(frozen=True)
class Finding:
    """One rule of a site's policy that a study breaks. Site and coordinator both print it, so it never depends on data.

    Attributes:
        code: Code of the rule, such as `E_RANK`.
        rule: Key of the rule in the policy.
        asked: What the study asks for.
        allowed: What the policy allows.
    """

    code: str
    rule: str
    asked: str
    allowed: str


class PolicyError(RefusedError):
    """The site's policy does not admit the study.

    Attributes:
        code, rule, asked, allowed: Those of the first finding, as a `refusal` in the round log states them.
        findings: All rules that the study breaks; empty if the error was read back from a log.
        policy: Digest of the site's rules.
    """

    def __init__(self, message: str, hint: str = "", findings: tuple[Finding, ...] = (), policy: str = "") -> None:
        super().__init__(message, hint)
        for first in findings[:1]:
            self.code, self.rule, self.asked, self.allowed = first.code, first.rule, first.asked, first.allowed
        self.findings = findings
        self.policy = policy


class BudgetExhaustedError(RefusedError):
    """The privacy budget does not cover the cost of what was asked."""

    private = True
    code = "E_BUDGET"
    rule = "limit.epsilon"


class ScanError(RefusedError):
    """The site's policy requires a scan of its data files, and the kept scan does not admit training."""

    private = True
    code = "E_SCAN"
    rule = "scan"


class SpentRoundError(RefusedError):
    """The site charged a round and lost its update, so it sits the round out. Asking again changes nothing."""

    code = "E_SPENT"


class ProtocolError(PrivetError):
    """The protocol does not allow this message.

    Attributes:
        spoiled: The sites of each masked sum that could not be used: one of each spoiled it.
    """

    exit_code = 4
    spoiled: tuple[frozenset[str], ...] = ()


class TooFewSitesError(ProtocolError):
    """Fewer sites delivered than the study demands.

    Attributes:
        final: Whether the same round can never have enough sites, as too many have spent it and lost their updates.
    """

    final: bool = False


class VerificationError(PrivetError):
    """A digest or signature does not match what was agreed."""

    exit_code = 5


class StateError(PrivetError):
    """Files or training are in a state that cannot be continued."""

    exit_code = 6
    private = True


class DivergedError(StateError):
    """A loss, an update or an adapter is not finite."""
