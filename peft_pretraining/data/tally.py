"""Counting rows: every one that is read is used, or passed over and counted; too many of those are refused."""

from __future__ import annotations

from peft_pretraining.data.json_rows import Unusable
from peft_pretraining.flags import ConfigError

SHARE_ALLOWED = 0.01
"""Of the rows read: what may be an accident. Beyond it these are not the right files, or not the right field."""
_EARLY = 100
"""Rows after which reading ends at once where most are unusable."""
_NAMED = 5


class Tally:
    """Rows of one reading of a split."""

    def __init__(self) -> None:
        self.read = self.unusable = self.blank = 0
        """Rows; those passed over; those used that hold no text, of which only the end token is left."""
        self._named: list[tuple[str, str, Unusable]] = []

    def use(self, text: str) -> None:
        self.read += 1
        if not text or text.isspace():
            self.blank += 1

    def pass_over(self, origin: str, name: str, reason: Unusable) -> None:
        """Count a row that is no document. ConfigError where it is one of far too many."""
        self.read += 1
        self.unusable += 1
        if len(self._named) < _NAMED:
            self._named.append((origin, name, reason))
        if self.unusable > _EARLY and 2 * self.unusable > self.read:
            raise self._too_many()

    def check(self) -> None:
        """At the end: ConfigError where more rows are unusable than may be passed over."""
        if self.unusable > SHARE_ALLOWED * self.read:
            raise self._too_many()

    def notes(self) -> list[str]:
        """What is to be said of rows that were not used, or are empty, one line each."""
        notes = []
        if self.unusable:
            notes.append(f"{self.unusable} of {self.read} rows were passed over: {self._where()}")
        if self.blank:
            notes.append(f"{self.blank} of {self.read} documents hold no text: only their end token is used")
        return notes

    def _too_many(self) -> ConfigError:
        share = f"{self.unusable} of {self.read} rows cannot be used, and only {SHARE_ALLOWED:.0%} may be passed over"
        return ConfigError([f"{self._where()} ({share})"])

    def _where(self) -> str:
        """The first of them with its reason, and the names of a few more."""
        (origin, name, reason), *others = self._named
        said = f"{origin}: {reason.of(name)}"
        if others:
            more = [name if origin == where else f"{where} {name}" for where, name, _ in others]
            rest = self.unusable - len(self._named)
            said += f"; also {', '.join(more)}{f' and {rest} more' if rest else ''}"
        return said
