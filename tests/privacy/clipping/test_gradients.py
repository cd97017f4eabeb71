"""What the book holds while it makes sums: a model's peak memory is there."""

import weakref

import torch

from privzoo.privacy.clipping.gradients import Book

R, T, WIDTH, WORDS = 2, 3, 4, 50


class Watched(dict):
    """Sums that note, of each that comes in, how many of `kept` still live."""

    def __init__(self, kept: list[weakref.ref]) -> None:
        self.kept, self.alive = kept, {}

    def __setitem__(self, name, value):
        self.alive[name] = sum(each() is not None for each in self.kept)
        super().__setitem__(name, value)


def test_a_table_is_made_when_nothing_else_is_kept():
    """The largest sum does not stand beside the activations of all layers, whichever came first."""
    wide = torch.Size([9, 9])  # too large to be instantiated
    shapes = {"table": (torch.Size([WORDS, WIDTH]), torch.float32), "dense": (wide, torch.float32)}
    for order in (("table", "dense"), ("dense", "table")):
        book = Book(shapes, R, None, R, torch.device("cpu"))
        for name in order:
            if name == "table":
                book.add_pair(name, torch.zeros(R, T, dtype=torch.long), torch.randn(R, T, WIDTH), transposed=True)
            else:
                book.add_pair(name, torch.randn(R, T, 9), torch.randn(R, T, 9))
        kept = [weakref.ref(each) for pair in book.pairs["dense"] for each in pair.factors()]
        assert all(each() is not None for each in kept)
        sums = Watched(kept)
        book.add_clipped(sums, torch.ones(R))
        assert sums.alive["table"] == 0
        assert list(sums) == ["dense", "table"]
