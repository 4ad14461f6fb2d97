"""A mixture of training sets: (seed, epoch, index) -> Sample.

Each index has a random generator of its own, so a run repeats exactly, workers do not matter, and ranks that take different
indices see different samples (in the original all ranks drew the same ones, §8-19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from .types import Batch, Sample

ATTEMPTS = 100
"""So many samples in a row may be broken."""


class Drawable(Protocol):
    """A training set: it draws a sample with the generator it is handed."""

    def __len__(self) -> int: ...

    def draw(self, rng: np.random.Generator) -> Sample: ...


class Members:
    """The members of a family, drawn from with even odds whatever their size (§2)."""

    def __init__(self, members: Sequence[Drawable]) -> None:
        self.members = list(members)

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def draw(self, rng: np.random.Generator) -> Sample:
        return self.members[rng.integers(len(self.members))].draw(rng)


class Mixture:
    """Training sets, each drawn from in proportion to its rate."""

    def __init__(
        self, sets: Sequence[Drawable], rates: Sequence[float], seed: int = 0, names: Sequence[str] = ()
    ) -> None:
        if len(sets) != len(rates):
            raise ValueError(f"{len(sets)} data sets but {len(rates)} sample rates")
        if not rates or min(rates) < 0 or sum(rates) <= 0:
            raise ValueError(f"sample rates must not be negative, and one must be above 0: {list(rates)}")
        self.sets, self.seed, self.names = list(sets), seed, list(names)
        self.shares = np.asarray(rates, dtype=float) / sum(rates)

    def __len__(self) -> int:
        """Pictures of all sets together."""
        return sum(map(len, self.sets))

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of a key (epoch, index), always the same one. Workers that outlive an epoch need not be told of the next."""
        return self.sample(*key)

    def sample(self, epoch: int, index: int, attempt: int = 0) -> Sample:
        """The sample of that epoch and index, always the same one.

        Args:
            attempt: from 1 on, a replacement out of the same set, where those before are broken.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        drawn = self.sets[rng.choice(len(self.sets), p=self.shares)]
        return drawn.draw(np.random.default_rng([self.seed, epoch, index, attempt]) if attempt else rng)


class BrokenDataError(ValueError):
    """A sample that cannot be trained on, where it must not be replaced."""


class Batches:
    """Batches of a mixture by the keys of their samples, the map-style data set of a DataLoader.

    A sample that cannot be read or put into a batch (a cut image, a mask of another size, an empty dialogue) is replaced by
    another draw of its set; what was wrong stands in `Sample.meta["skipped"]` of the one that took its place. Which draw is a
    function of seed, epoch, index and attempt, so that ranks, workers and a resumed run agree.
    """

    def __init__(self, mixture: Mixture, collate: Callable[[list[Sample]], Batch], strict: bool = False) -> None:
        self.mixture, self.collate, self.attempts = mixture, collate, 1 if strict else ATTEMPTS

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | BrokenDataError:
        """A batch. An error is handed back, not raised: a DataLoader would wrap its message into a traceback."""
        try:
            samples = [self._draw(key) for key in keys]
            try:
                return self.collate(samples)
            except (ValueError, OSError):  # one of them, which draws without a fault, has one that only the tokeniser finds
                samples = [self._draw(key, try_alone=True) for key in keys]
            return self.collate(samples)
        except BrokenDataError as error:
            return error

    def _draw(self, key: tuple[int, int], try_alone: bool = False) -> Sample:
        skipped: list[str] = []
        for attempt in range(self.attempts):
            try:
                sample = self.mixture.sample(*key, attempt)
                if try_alone:
                    self.collate([sample])
            except (ValueError, OSError) as error:
                skipped.append(str(error))
                continue
            if skipped:
                sample.meta["skipped"] = [*skipped, *sample.meta.get("skipped", ())]
            return sample
        if self.attempts == 1:
            raise BrokenDataError(f"{skipped[0]} (--strict; without it, this sample is skipped and counted)")
        raise BrokenDataError(f"{self.attempts} samples in a row are broken; the last: {skipped[-1]}")


def as_is(batch: Batch) -> Batch:
    """`collate_fn` of a DataLoader over `Batches`, which are collated already."""
    return batch


class EpochSampler:
    """This rank's keys (epoch, index) of the mixture, in order: r, r + size, r + 2 size, ...

    A mixture maps (seed, epoch, index) to a sample, so ranks differ by index, a run repeats, and a run that is resumed
    in mid-epoch goes on with the next sample. The original drew the same samples on every rank (§8-19).
    """

    def __init__(self, batches: int, batch_size: int, rank: int, size: int) -> None:
        self.count = batches * batch_size
        self.batch_size, self.rank, self.size = batch_size, rank, size
        self.epoch = self.skipped = 0

    def start_at(self, epoch: int, batches_done: int) -> None:
        """The next iteration is of this epoch, without its first batches."""
        self.epoch, self.skipped = epoch, batches_done * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(self.skipped, self.count):
            yield self.epoch, self.rank + i * self.size

    def __len__(self) -> int:
        return self.count - self.skipped
