"""An unsound merge: it drops a trained layer, so another network would be certified."""

from dataclasses import dataclass

from torch import Tensor, nn

from bench.interface import Access, Defense, Draw, Schedule


class Forgets(Defense):
    access = Access.GRADIENT

    @dataclass(frozen=True)
    class Config(Schedule):
        epochs: float = 1

    def build(self) -> None:
        self.extra, self.on = nn.Linear(self.context.classes, self.context.classes), True

    def merge(self) -> None:
        self.on = False

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        z = self.context.base(x)
        return self.extra(z) if self.on else z
