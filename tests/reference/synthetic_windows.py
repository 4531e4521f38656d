"""Windows made up from random numbers, with the interface of qa.windows.Windows: for tests that
need many, odd or known ones.
"""
import numpy


class SyntheticWindows:
    """`lengths` tokens a window; context from a random token on up to the last but one; 1 or more
    windows an example.
    """

    def __init__(self, lengths, seed=0, windows_per_example=1):
        random = numpy.random.default_rng(seed)
        self.lengths = numpy.asarray(lengths, numpy.int32)
        count = len(self.lengths)
        self.example = numpy.sort(random.integers(0, max(1, count // windows_per_example),
                                                  count)).astype(numpy.int32)
        self.example = numpy.unique(self.example, return_inverse=True)[1].astype(
            numpy.int32)  # no example without windows
        self.cls_position = random.integers(0, 2, count).astype(numpy.int32) * (self.lengths - 1)
        self.context_start = random.integers(1, numpy.maximum(2, self.lengths // 2)).astype(
            numpy.int32)
        self.start_position = random.integers(0, self.lengths).astype(numpy.int32)
        self.end_position = random.integers(self.start_position, self.lengths).astype(numpy.int32)
        self._first = numpy.concatenate([[0], numpy.cumsum(self.lengths)])
        self._tokens = random.integers(5, 1000, self._first[-1]).astype(numpy.uint16)
        characters = 3 * numpy.arange(self.lengths.max()) + random.integers(
            0, 2, self.lengths.max())
        self._characters = numpy.stack(
            [characters, characters + random.integers(0, 3, len(characters))], 1).astype(
                numpy.int32)

    def __len__(self):
        return len(self.lengths)

    def input_ids(self, window):
        return self._tokens[self._first[window]:self._first[window + 1]]

    def offsets(self, window):
        """The characters of each context token; some have none, as with SentencePiece's lone space
        mark.
        """
        return self._characters[:max(0, self.lengths[window] - 1 - self.context_start[window])]
