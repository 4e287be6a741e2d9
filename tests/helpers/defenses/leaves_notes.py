"""A defense that stores its input on itself while it computes: sound alone, unsound in two threads at once."""

import time

from torch import Tensor

from bench.interface import Access, Defense, Draw


class LeavesNotes(Defense):
    access = Access.QUERY
    note: Tensor | None

    def build(self) -> None:
        self.note = None

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        kept, self.note = self.note, x
        time.sleep(1e-4)
        left, self.note = self.note, kept
        assert left is not None
        return self.context.base(left)
