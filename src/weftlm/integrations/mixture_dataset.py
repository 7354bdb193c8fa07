"""A training dataset without examples: what fills a slot of a batch is drawn when the trainer reaches for the batch.

Trainers read ahead. `accelerate` fetches the batch after the one in use, and workers fetch several; weights that change
after a step would reach those batches late. Here a fetched batch is only a promise (`Coming`). It becomes tokens when
it is moved to the device, which `accelerate` does at the moment the training loop asks for the batch, so the weights in
force then are those it is drawn under. What was fetched and never used has cost nothing and drawn nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from weftlm.errors import ConfigError

Collate = Callable[[list[dict[str, NDArray[np.int64]]]], Any]
"""A data collator: examples of `input_ids` and `labels` in, the keyword arguments of a model out."""


@dataclass(eq=False)
class Feed:
    """What draws the rows of a dataset, and the trainer's own data collator.

    Attributes:
        take: gives this process's next micro-batch, int64 of shape (B, T + 1).
        collate: the data collator.
    """

    take: Callable[[], Tensor]
    collate: Collate


feeds: weakref.WeakValueDictionary[str, Feed] = weakref.WeakValueDictionary()
"""Feeds by the key of their dataset, so that a promise made in a worker process holds nothing but the key."""


class Coming:
    """A micro-batch to come, drawn when it is moved to a device.

    With its first argument bound, the collator of a data loader over a `SlotDataset`: whatever the slots are.
    """

    def __init__(self, key: str, slots: Sequence[int]) -> None:
        self.key = key
        self._tokens_BT1: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        """Draw the rows, collate them and move them.

        Raises:
            ConfigError: the collator does not keep one row per sequence.
        """
        feed = feeds[self.key]
        if self._tokens_BT1 is None:  # a second attempt must not draw again
            self._tokens_BT1 = feed.take()
        rows = self._tokens_BT1.numpy()
        batch = feed.collate([{"input_ids": row, "labels": row.copy()} for row in rows])
        shape = tuple(batch["input_ids"].shape)
        if shape[:1] != (len(rows),):
            raise ConfigError(
                f"the data collator made input_ids of shape {shape} from {len(rows)} sequences; the domains of a batch "
                "are known by row: use a collator that keeps one row per sequence (no packing, no padding_free)"
            )
        return send_to_device(batch, device, non_blocking=non_blocking)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    """Preparing, reordering and selecting would have to happen before there is anything.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "the dataset of an online mixture cannot be mapped, filtered, shuffled or selected from: its examples are "
        "drawn during training; under TRL set dataset_kwargs={'skip_prepare_dataset': True} in SFTConfig"
    )


class SlotDataset(datasets.Dataset):  # type: ignore[misc]
    """As many slots as an epoch has, each to be filled by the mixture; a `datasets.Dataset`, as TRL insists on.

    It holds one example, the first sequence of the first domain, for code that looks at a dataset before training.

    Args:
        key: key of the feed that fills it.
        example: token ids.
        slots: an epoch's length in sequences, before `fit`.
    """

    def __init__(self, key: str, example: NDArray[np.int64], slots: int) -> None:
        row = [example.tolist()]
        super().__init__(pa.table({"input_ids": row, "labels": row}), fingerprint=key)
        self.key = key
        self.slots = self.sequences = slots
        self.fed = False

    def fit(self, batch: int) -> None:
        """Make an epoch a whole number of batches."""
        self.slots = max(1, self.sequences // batch) * batch

    map = filter = shuffle = select = sort = shard = train_test_split = with_transform = _refuse

    @property
    def num_rows(self) -> int:
        """Slots of an epoch."""
        return self.slots

    def __len__(self) -> int:
        return self.slots

    def __getitems__(self, keys: list[int]) -> list[int]:
        """The slots themselves; called by data loaders only."""
        if not self.fed:
            raise ConfigError(
                "the dataset of an online mixture is drawn by its callback, and the trainer has none: give it "
                "callbacks=[MixtureCallback(mixture)]"
            )
        return keys
