"""What a serving site logs of each round, in plain sentences: received, trained, sent, and what it cost.

The sentences are the same whatever the records are: no count of records, no loss and no duration is in them. Only the
times of a private round's lines show about how many records it drew, so the log stays at the site. A coordinator
decides how often it asks, so the process limits how often each sentence is written (`privet.common.refusals.sparing`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from privet.common.log.statements import Charge
from privet.common.secagg.encoding import is_kind
from privet.common.secagg.messages import Masked, Reveal
from privet.common.study.messages import Consent, Contribution, Message, Offer, RoundOpen, Secured
from privet.common.study.study import Study

ROUNDS = logging.getLogger("privet.site.rounds")
"""Where the sentences go."""


@dataclass
class Diary:
    """Logs the rounds of a site. One message is answered at a time.

    Attributes:
        site: Name of the site.
        dataset: Name of the dataset whose budget is spent.
    """

    site: str
    dataset: str
    _sending: int = 0
    _paid: set[tuple[str, int]] = field(default_factory=set)

    def asked(self, message: Message) -> None:
        """Log that a round has come, before anything is checked."""
        if isinstance(message, RoundOpen):
            study, sites = Study.parse(dict(message.study)), len(message.cohort)
            sentence = "received: round %d of %d of study %s, for %d sites"
            self._say(message.round, sentence, message.round, study.rounds, study.name, sites)

    def answered(self, asked: Message, reply: Message) -> None:
        """Log what the site has done, before the answer is sent."""
        if isinstance(asked, Offer) and isinstance(reply, Consent):
            name = Study.parse(dict(asked.study)).name
            self._say(0, "consented: study %s, run %s", name, asked.run)
        elif isinstance(reply, Contribution):
            self._trained(reply.round, "trained: round %d; the update is ready to be sent")
        elif isinstance(reply, Secured) and is_kind(Masked, reply.body):
            self._trained(reply.round, "trained: round %d; the masked update is ready to be sent")
        elif isinstance(reply, Secured) and is_kind(Reveal, reply.body):
            sentence = "done: round %d; the coordinator can compute the sum over the sites"
            self._say(reply.round, sentence, reply.round)

    def charged(self, study: Study, number: int, charge: Charge | None) -> None:
        """Log what a round cost."""
        if charge is None:
            sentence = "cost: none; round %d of study %s promises no differential privacy"
            self._say(number, sentence, number, study.name)
            return
        self._paid.add((study.digest, number))
        limit = "" if charge.limit is None else f" of at most {charge.limit:g}"
        sentence = "cost: with round %d of study %s, dataset %s has spent epsilon %.3f%s at delta %g"
        self._say(number, sentence, number, study.name, self.dataset, charge.epsilon, limit, charge.delta)

    def lost(self, study: Study, numbers: Collection[int]) -> None:
        """Log which rounds that were paid for led to nothing, each once."""
        for number in sorted(numbers):
            if (study.digest, number) in self._paid:
                self._paid.remove((study.digest, number))
                sentence = "lost: round %d of study %s was aborted; no model came of it, and what it cost stays spent"
                self._say(number, sentence, number, study.name)

    def arrived(self) -> None:
        """Log that an update has arrived at the coordinator, if the last answer carried one."""
        number, self._sending = self._sending, 0
        if number:
            self._say(number, "sent: the update of round %d has arrived at the coordinator", number)

    def _trained(self, number: int, sentence: str) -> None:
        self._sending = number
        self._say(number, sentence, number)

    def _say(self, number: int, sentence: str, *values: object) -> None:
        extra = {"site": self.site, "round": number or None, "event": sentence.partition(":")[0]}
        ROUNDS.info(sentence, *values, extra=extra)
