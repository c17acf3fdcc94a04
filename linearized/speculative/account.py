"""Whether drafting pays, by what it gave. Knows rounds; knows neither times nor guesses.

All is counted in rounds without drafts: a round with drafts that gave as many tokens as three of
those, and took as long as two, has gained one. So much may be lost as is in credit: a little at the
start, what was gained before, up to a limit, and a small share of the rounds without drafts. What
trying costs is bounded by that, whatever the drafter and however clocks err for a while.
"""

from __future__ import annotations

START = 2.0
"""Rounds that may be lost to find out."""
MOST = 6.0
"""Rounds that a drafter who was good may lose until it is left alone. Chance alone seldom takes
them from one who gains a tenth of a round in each."""
SHARE = 0.01
"""Of the rounds without drafts, what trying again may cost."""
TRIAL = 3
"""Rounds of a try. The first is an expensive one: a drafter reads what it has missed."""
FIRST_REST, LAST_REST = 16, 512
"""Rounds without drafts until they are tried again. Each try that shows nothing doubles them."""
FIRST_TURN, LAST_TURN = 128, 1024
"""Rounds with drafts until there are some without, to know what those take by now. They double."""
PLAIN = 3
"""Such rounds. The first finds the processor's caches full of something else."""


class Account:
    """Of one drafter, in rounds of about so many texts."""

    def __init__(self) -> None:
        self._credit = START
        self.drafts = True
        """Otherwise it rests."""
        self._trial = 0
        """Rounds left in which drafts are tried, whatever they promise."""
        self._rest = FIRST_REST
        self._wait = 0
        """Rounds until the next try."""
        self._turn = FIRST_TURN
        self._same = 0
        """Rounds with drafts, one after the other; below 0: left of those without."""

    def begin(self, *, promising: bool, price: float) -> bool:
        """A round begins: are there to be drafts? `promising`: they should gain, by what is known;
        `price`: what a round with the cheapest ones loses if none is right."""
        if self.drafts:
            if self._trial:
                promising, self._trial = True, self._trial - 1
            if promising and self._credit > 0:
                return self._takes_turn()
            self.drafts, self._wait = False, self._rest
            self._rest = min(2 * self._rest, LAST_REST)
        self._wait -= 1
        needed = TRIAL * price
        self._credit = min(self._credit + SHARE, max(START, needed))
        if self._wait > 0 or self._credit < needed:
            return False
        self.drafts, self._trial, self._same = True, TRIAL - 1, 0
        return True

    def gained(self, rounds: float) -> None:
        """By a round with drafts; below 0: lost."""
        self._credit = max(min(self._credit + rounds, MOST), -MOST)
        if self._credit == MOST:
            self._rest = FIRST_REST

    def _takes_turn(self) -> bool:
        self._same += 1
        if self._same > self._turn:
            self._same, self._turn = -PLAIN, min(2 * self._turn, LAST_TURN)
        return self._same > 0
