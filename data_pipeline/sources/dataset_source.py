"""Documents from what the Hugging Face library `datasets` opens: a name on the hub, a folder, a saved data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.passwords import without_passwords
from data_pipeline.errors import BrokenOffError, PrepareError
from data_pipeline.network import REQUESTS, Attempts, GivenUp, Request, is_of_network
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.source import Document, InputFile, OnBytes, Rejection, Source
from data_pipeline.sources.splits import SPLIT_NAMES

_END = object()


class DatasetsSource(Source):
    """Anything that the `datasets` library streams, by name or from a folder (also one of `save_to_disk`)."""

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self._splits = self._open()

    def _open(self) -> dict[str, Any]:
        import datasets

        path = self.config.path
        if path is None:
            raise PrepareError("data.path: kind=datasets needs a name or a folder; set source=datasets:NAME")
        try:
            if any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
                loaded = datasets.load_from_disk(path)
            else:
                loaded = datasets.load_dataset(
                    path, name=self.config.subset, revision=self.config.revision, streaming=True
                )
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise PrepareError(
                f"data.path={path}: the datasets library cannot open it ({type(error).__name__}: {first_line}); "
                "check the name, the network, and data.subset and data.revision"
            ) from None
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}

    def inputs(self) -> list[InputFile]:
        given = self.config.split.rule == "given"
        items = []
        for split in sorted(self._splits):
            count = self._shard_count(split)
            name = SPLIT_NAMES.get(split.lower(), split) if given else None
            items += [InputFile(f"{split}/{i:05d}-of-{count:05d}", 0, name) for i in range(count)]
        return items

    def _shard_count(self, split: str) -> int:
        return getattr(self._splits[split], "num_shards", 1)

    def first_record(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        try:
            records = (record for split in sorted(self._splits) for record in self._splits[split])
            return next(records, None)
        except Exception:
            # Of the library or the network; reading says so.
            return None

    def read(self, item: InputFile, on_bytes: OnBytes) -> Iterator[Document | Rejection]:
        split, part = item.name.rsplit("/", 1)
        dataset = self._splits[split]
        if self._shard_count(split) > 1:
            dataset = dataset.shard(num_shards=self._shard_count(split), index=int(part.split("-")[0]))
        request, position, records = Request(f"{self.config.path}: {item.name}"), 0, iter(dataset)
        attempts = Attempts(request, self.network, lambda error: without_passwords(str(error)))
        while True:
            with REQUESTS.noted(request):
                try:
                    record = next(records, _END)
                except Exception as error:
                    self._try_again(item, position, attempts, error)
                    # What the stream gives once more was used already.
                    records = itertools.islice(iter(dataset), position, None)
                    continue
            if record is _END:
                return
            attempts.succeed()
            position += 1
            yield self.from_record(item, record, position)

    def _try_again(self, item: InputFile, position: int, attempts: Attempts, error: Exception) -> None:
        """Wait, where the network is to blame. Raises BrokenOffError where it is not, or has failed for too long."""
        reason = f"{type(error).__name__}: {error}"
        if is_of_network(error):
            try:
                attempts.fail(error)
                return
            except GivenUp as given_up:
                reason = str(given_up)
        # Stops the unit: a stream that broke may be whole at the next try.
        reason = without_passwords(reason)
        raise BrokenOffError(
            f"{self.config.path}: {item.name}: the stream broke after row {position} ({reason}); run again"
        ) from error
