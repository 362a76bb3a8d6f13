"""From the settings of a run to its order of samples: what training reads, and what `inspect --sample` shows."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.ordering.config import MixturePhaseConfig, OrderConfig
from data_pipeline.ordering.mixture import MixtureConfig, Phase
from data_pipeline.reading.stream import Lanes, SampleStream


def mixture_of(order: OrderConfig, global_batch_size: int, windows: int = 1) -> MixtureConfig:
    """The mixture in samples: phases of the configuration may begin at a step of `global_batch_size` samples.

    `windows`: consecutive samples that lanes take together, and that the mixture then counts as one.
    """

    def start_of(phase: MixturePhaseConfig) -> int:
        if phase.from_step is not None:
            return phase.from_step * global_batch_size
        assert phase.from_sample is not None  # `validate_order` asks for one of the two.
        return phase.from_sample

    phases = tuple(Phase(start_of(phase) // windows, phase.weights, phase.temperature) for phase in order.phases)
    return MixtureConfig(order.weights, order.temperature, order.epoch_caps, phases)


def open_order(
    corpus: Corpus,
    order: OrderConfig,
    sequence_length: int,
    seed: int,
    global_batch_size: int,
    *,
    on_corrupt: str = "fail",
    pin: bool = False,
    lanes: Lanes | None = None,
) -> SampleStream:
    """The samples of a run with these settings; the last three as in `SampleStream`, whose errors it raises."""
    return SampleStream(
        corpus,
        order.split,
        sequence_length,
        seed,
        mixture_of(order, global_batch_size, lanes.windows if lanes else 1),
        packing=order.packing,
        packing_directory=None if order.packing_directory is None else Path(order.packing_directory),
        lanes=lanes,
        window_shards=order.window_shards,
        on_corrupt=on_corrupt,
        pin=pin,
    )
