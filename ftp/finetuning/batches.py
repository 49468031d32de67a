"""Batches of examples, in an order that follows from a seed and the number of a pass alone."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset

Data = Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]
"""Pairs of an input and a label: a dataset, a loader of batches, or two tensors. A dataset of torch's tensors is indexed by batches, and
so is one that has a method `batch`, which returns the inputs and labels of a tensor of indices. Its method `prefetch`, if it has one, is
told the indices of the next batch."""

Batch = tuple[Any, Tensor]


def seed_all(*key: object) -> None:
    """Seed torch's random numbers from a key, on all devices."""
    if _accelerated():
        torch.manual_seed(_number(*key))
    else:
        torch.default_generator.manual_seed(_number(*key))  # a hundredth of the time


@functools.cache
def _accelerated() -> bool:
    return torch.accelerator.is_available()


def _number(*key: object) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Batches:
    """Data in batches.

    Attributes:
        data: the data.
        size: examples in a batch; of a loader, its own counts.
        workers: processes that read a dataset which is not of tensors.
    """

    data: Data
    size: int
    workers: int = 0

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError("there are no examples")

    def __len__(self) -> int:
        """Batches of a pass in order."""
        return len(self.data) if isinstance(self.data, DataLoader) else -(-examples(self.data) // self.size)

    @property
    def full(self) -> int:
        """Batches of a pass in random order: a last one that is smaller is left out, if there is another."""
        return len(self.data) if isinstance(self.data, DataLoader) else max(1, examples(self.data) // self.size)

    def identity(self) -> str:
        """What tells data from others, in words: what they say of themselves, or their number."""
        return str(getattr(self.data, "identity", f"{examples(self.data):,} examples"))

    def in_order(self) -> Iterator[Batch]:
        """One pass, in order."""
        if isinstance(self.data, DataLoader):
            yield from self.data
            return
        order = torch.arange(examples(self.data), device=_device_of(self.data))
        yield from self._read(_chunks(order, self.size), ("in order",))

    def endless(self, seed: int, first: int = 0) -> Iterator[Batch]:
        """Batches of one pass in random order after another.

        What is drawn at random for a batch, its augmentation too, follows from the seed and the batch's number, whichever is the first.

        Args:
            seed: of all passes.
            first: number of the first batch that is returned.
        """
        number, skip = divmod(first, self.full)
        while True:
            yield from self._shuffled(("pass", seed, number), skip)
            number, skip = number + 1, 0

    def _shuffled(self, key: tuple[object, ...], skip: int) -> Iterator[Batch]:
        if isinstance(self.data, DataLoader):
            seed_all(*key)
            for generator in {self.data.generator, getattr(self.data.sampler, "generator", None)} - {None}:
                generator.manual_seed(_number(*key))
            read = iter(self.data)
            for index in range(self.full):
                seed_all(*key, index)
                batch = next(read)
                if index >= skip:
                    yield batch
            return
        order = torch.randperm(examples(self.data), generator=torch.Generator().manual_seed(_number(*key)))
        chunks = _chunks(order.to(_device_of(self.data)), self.size)[: self.full]
        yield from self._read(chunks[skip:], key, skip)

    def _read(self, chunks: list[Tensor], key: tuple[object, ...], skip: int = 0) -> Iterator[Batch]:
        assert not isinstance(self.data, DataLoader)
        read = _reader(self.data)
        if read is None:
            keyed = [[(int(i), _number(*key, number, int(i))) for i in chunk] for number, chunk in enumerate(chunks, start=skip)]
            yield from DataLoader(_Keyed(self.data), batch_sampler=keyed, num_workers=self.workers)
            return
        prefetch = getattr(self.data, "prefetch", None)
        for number, (chunk, following) in enumerate(zip(chunks, [*chunks[1:], None], strict=True), start=skip):
            seed_all(*key, number)
            batch = read(chunk)
            if prefetch is not None and following is not None:
                prefetch(following)
            yield batch


class _Keyed(Dataset[Any]):
    """A dataset whose random numbers are seeded for each example, so that it does not matter which process reads it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, keyed: tuple[int, int]) -> Any:
        index, seed = keyed
        torch.default_generator.manual_seed(seed)
        return self.data[index]


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    return [order[first : first + size] for first in range(0, len(order), size)]


def examples(data: Data) -> int:
    """How many examples there are.

    Raises:
        TypeError: the data do not say so.
    """
    if isinstance(data, tuple):
        return len(data[0])
    counted: Any = data.dataset if isinstance(data, DataLoader) else data
    if not hasattr(counted, "__len__"):
        raise TypeError(f"{type(counted).__name__} has no length: give a dataset whose examples can be counted and indexed")
    return len(counted)


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Hold a random share of data out.

    Args:
        data: what to split.
        share: of examples to hold out, in (0, 1); at least one is held out, and one kept.
        seed: of the choice.

    Returns:
        What is kept, and what is held out.

    Raises:
        ValueError: there are fewer than two examples, or a loader has a sampler of its own, which cannot be split.
    """
    count = examples(data)
    if count < 2:
        raise ValueError(f"{count} example cannot be split: give more, or a method that holds nothing out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_number("hold out", seed)))
    held = min(max(1, round(share * count)), count - 1)
    kept, out = order[held:].sort().values, order[:held].sort().values
    if isinstance(data, DataLoader):
        if data.batch_size is None or not isinstance(data.sampler, (RandomSampler, SequentialSampler)):
            raise ValueError("a loader with a sampler of its own cannot be split: give the dataset, or a method that holds nothing out")
        return _loader(data, kept), _loader(data, out)
    return _subset(data, kept), _subset(data, out)


def _subset(data: Any, indices: Tensor) -> Data:
    if isinstance(data, tuple):
        return data[0][indices], data[1][indices]
    return Subset(data, indices.tolist())


def _loader(loader: DataLoader[Any], indices: Tensor) -> DataLoader[Any]:
    return DataLoader(
        Subset(loader.dataset, indices.tolist()),
        loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def _device_of(data: Any) -> torch.device:
    """Where batches are indexed, without waiting for it in each: with the tensors, if they are what the data are."""
    tensors = data.tensors if isinstance(data, TensorDataset) else data if isinstance(data, tuple) else ()
    return tensors[0].device if tensors else torch.device("cpu")


def _reader(data: Any) -> Callable[[Tensor], Batch] | None:
    """What reads a whole batch at once; None where examples are read one by one."""
    if isinstance(data, tuple):
        return lambda indices: (data[0][indices], data[1][indices])
    if isinstance(data, TensorDataset):
        return lambda indices: _pair(data[indices])
    if isinstance(data, Subset):
        inner, own = _reader(data.dataset), torch.as_tensor(data.indices)
        return inner and (lambda indices: inner(own[indices]))
    batch: Callable[[Tensor], Batch] | None = getattr(data, "batch", None)
    return batch


def _pair(tensors: Sequence[Tensor]) -> Batch:
    if len(tensors) != 2:
        raise ValueError(f"an example has {len(tensors)} tensors; it must have two, the input and the label")
    return tensors[0], tensors[1]
