"""Windows of random numbers, with the interface of qa.data.windows.Windows.

They are for tests that need many windows, unusual ones, or windows of known lengths.
"""
import numpy


class SyntheticWindows:
    """Windows of `lengths` tokens, of which the context runs from a random one to the last but one.

    Each example has at least one window, and on average at least `windows_per_example`.
    """

    def __init__(self, lengths, seed=0, windows_per_example=1):
        random = numpy.random.default_rng(seed)
        self.lengths = numpy.asarray(lengths, numpy.int32)
        count = len(self.lengths)
        self.example = numpy.sort(random.integers(0, max(1, count // windows_per_example),
                                                  count)).astype(numpy.int32)
        # Number the examples anew, so that none is without windows.
        self.example = numpy.unique(self.example, return_inverse=True)[1].astype(numpy.int32)
        self.cls_position = random.integers(0, 2, count).astype(numpy.int32) * (self.lengths - 1)
        self.context_start = random.integers(1, numpy.maximum(2, self.lengths // 2)).astype(
            numpy.int32)
        self.second_text = self.context_start
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
        """The (start, end) characters of each context token.

        Some tokens have no characters, like SentencePiece's space mark when it stands alone.
        """
        return self._characters[:max(0, self.lengths[window] - 1 - self.context_start[window])]
