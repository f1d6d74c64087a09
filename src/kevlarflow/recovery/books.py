"""What an engine has written down of its pipeline's requests: one set of books, which the parts of its core share."""

from __future__ import annotations

import dataclasses

from kevlarflow.recovery.coverage import Generations, IssuedTables
from kevlarflow.recovery.in_flight import InFlight
from kevlarflow.recovery.ledger import Ledger
from kevlarflow.recovery.recompute import Limits


@dataclasses.dataclass(frozen=True, slots=True)
class Books:
    """See the module's text. Who is given them may change what is in them."""

    limits: Limits
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    """Live requests, as of the last completed step."""
    in_flight: InFlight = dataclasses.field(default_factory=InFlight)
    """Steps that were issued since."""
    tables: IssuedTables = dataclasses.field(default_factory=IssuedTables)
    """Block tables, as of the last issued step."""
    generations: Generations = dataclasses.field(default_factory=Generations)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return self.limits.block_size
