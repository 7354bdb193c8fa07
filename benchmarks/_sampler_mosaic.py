"""mosaicml-streaming as a contestant: a process of its own environment that answers JSON lines.

Started by `benchmarks/sampler.py` as `python _sampler_mosaic.py FOLDER`; FOLDER holds `task.json` and one `.npy` array
of rows per domain. Imports nothing of weftlm.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def without_images() -> None:
    """The package imports torchvision for image data sets; where that does not fit the torch build, leave it out."""
    try:
        if importlib.util.find_spec("torchvision") is not None:
            import torchvision  # noqa: F401

            return
    except (ImportError, RuntimeError):
        pass
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    nothing = type("Nothing", (), {})
    for name, contents in {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": nothing, "CIFAR10": nothing},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": nothing},
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(contents)
        sys.modules[name] = module


without_images()
import streaming  # noqa: E402
from _sampler_behaviour import behaviour, seconds  # noqa: E402


class Mosaic:
    """`StreamingDataset` over one local `Stream` per domain, with its own loader, in this process.

    There is no call to change proportions; they are set on the streams and applied as the data set does at its start.
    """

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        self._streams = [
            streaming.Stream(local=str(folder / f"mds-{index}"), proportion=weight)
            for index, weight in enumerate(task["weights"])
        ]
        self._dataset = streaming.StreamingDataset(
            streams=self._streams, epoch_size=task["epoch_rows"], batch_size=task["batch"], shuffle=True,
            shuffle_algo="py1e", shuffle_seed=task["seed"], num_canonical_nodes=1, predownload=8 * task["batch"],
        )  # fmt: skip
        self._loader = streaming.StreamingDataLoader(
            self._dataset, batch_size=task["batch"], num_workers=0, drop_last=True, collate_fn=_collate
        )
        self._batches: Any = None

    def next(self) -> tuple[Tensor, list[int]]:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self._loader)
            return next(self._batches)

    def set_weights(self, weights: list[float]) -> None:
        for stream, weight in zip(self._streams, weights, strict=True):
            stream.proportion = weight
            del stream.repeat, stream.choose  # derived from it; `apply_weights` derives them anew
        counts = np.array(self._dataset.samples_per_stream)
        streaming.Stream.apply_weights(self._streams, counts, self._dataset.epoch_size, self._dataset.shuffle_seed)

    def state(self) -> Any:
        return json.loads(json.dumps(self._loader.state_dict()))

    def load(self, state: Any) -> None:
        self._loader.load_state_dict(state)


class Copies:
    """Makes contestants on folders of their own: two data sets over one folder disturb each other's shared memory."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        self._folder, self._task = folder, task
        self._made = 0

    def __call__(self) -> Mosaic:
        own = self._folder / f"copy-{self._made}"
        self._made += 1
        for index in range(len(self._task["weights"])):
            shutil.copytree(self._folder / f"mds-{index}", own / f"mds-{index}")
        return Mosaic(own, self._task)


def _collate(samples: list[dict[str, Any]]) -> tuple[Tensor, list[int]]:
    rows = np.stack([sample["tokens"] for sample in samples])
    return torch.from_numpy(rows.astype(np.int64)), [int(sample["domain"]) for sample in samples]


def write(folder: Path, domains: int) -> None:
    for domain in range(domains):
        rows = np.load(folder / f"rows-{domain}.npy", allow_pickle=False)
        columns = {"tokens": f"ndarray:{rows.dtype}:{rows.shape[1]}", "domain": "int"}
        with streaming.MDSWriter(out=str(folder / f"mds-{domain}"), columns=columns) as writer:
            for row in rows:
                writer.write({"tokens": row, "domain": domain})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes to stderr
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if not (folder / "mds-0").exists():
        write(folder, len(task["weights"]))
    streaming.base.util.clean_stale_shared_memory()
    contestant = Mosaic(folder, task)
    contestant.next()
    answers.write(json.dumps({"version": streaming.__version__, "torch": torch.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            answer: Any = seconds(contestant, request["batches"])
        else:
            answer = behaviour(Copies(folder, task), len(task["weights"]))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
