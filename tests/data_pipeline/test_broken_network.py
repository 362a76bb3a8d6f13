"""A network that drops connections, stalls, says 503, or delivers half a file is read from all the same, up to a limit
that is set; then it is named. Over HTTP on the loopback."""

import http.client
import json

import datasets
import pytest
import torch

from data_pipeline import network
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import CacheSettings
from data_pipeline.errors import BrokenOffError, CorpusError, ReadingError
from data_pipeline.network import REQUESTS, NetworkConfig, is_of_network, validate_network
from data_pipeline.reading.stream import SampleStream
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.dataset_source import DatasetsSource
from tests.documented import keys_and_types, table
from tests.http_store import serving
from tests.runs import TINY_RUN, prepared_corpus, run_train
from train.run_directory import read_events

SECRET = "correct-horse"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(network, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def store(small_corpus):
    with serving(small_corpus) as store:
        yield store


def samples(where, tmp_path=None, **limits):
    cache = None if tmp_path is None else CacheSettings(tmp_path / "cache", 2**26, NetworkConfig(**limits))
    stream = SampleStream(Corpus.open(where, cache=cache), "train", 20, 1)
    return stream.batch(0, stream.samples_per_epoch).tokens


@pytest.mark.parametrize("fault", ["drop", "503", "half", "stall", "altered"])
def test_what_fails_for_a_time_is_read_in_the_end(small_corpus, store, tmp_path, fault):
    # Damage on the way is not to be told from damage at the source, for which nobody should wait long.
    times = 1 if fault == "altered" else 2
    is_hit = (lambda path: path.startswith("shards/")) if fault in ("altered", "stall") else (lambda path: True)
    store.fault = lambda path, before: fault if before < times and is_hit(path) else ""
    assert torch.equal(samples(store.url, tmp_path, attempt_seconds=0.4), samples(small_corpus))
    assert all(count > times for path, count in store.requests.items() if is_hit(path))
    assert not REQUESTS.is_reading and not REQUESTS.trouble


def test_what_fails_for_too_long_is_named_with_what_was_tried(small_corpus, store, tmp_path):
    store.fault = lambda path, before: "503" if path.startswith("shards/") else ""
    secret = store.url.replace("//", f"//me:{SECRET}@")
    with pytest.raises(ReadingError) as caught:
        samples(secret, tmp_path, total_seconds=1)
    shown = f"webhdfs://me:***@127.0.0.1:{store.server_port}/shards/"
    assert str(caught.value).startswith(shown) and "HTTPError: 503" in str(caught.value)
    assert " attempts in " in str(caught.value) and "(corpus.network.total_seconds=1)" in str(caught.value)
    assert SECRET not in str(caught.value) and max(store.requests.values()) > network.ATTEMPTS


def test_an_answer_that_will_not_change_is_not_waited_for(store, tmp_path):
    store.fault = lambda path, before: "403" if path.startswith("shards/") else ""
    with pytest.raises(ReadingError, match=f"cannot be fetched: {network.ATTEMPTS} attempts in .*403"):
        samples(store.url, tmp_path)
    store.fault = lambda path, before: "altered" if path.startswith("shards/") else ""
    with pytest.raises(CorpusError, match="altered: the 4 MiB block 0") as caught:
        samples(store.url, tmp_path)
    assert not isinstance(caught.value, ReadingError)


def test_errors_of_a_network_are_told_from_others():
    refused = ConnectionRefusedError(111, "Connection refused")
    wrapped = RuntimeError("while reading")
    wrapped.__cause__ = refused
    assert is_of_network(refused) and is_of_network(wrapped) and is_of_network(TimeoutError())
    assert is_of_network(http.client.IncompleteRead(b""))
    assert not is_of_network(ValueError("malformed")) and not is_of_network(PermissionError("no"))
    named = type("OfflineModeIsEnabled", (ConnectionError,), {})
    assert not is_of_network(named("HF_HUB_OFFLINE=1"))


def test_limits_that_make_no_sense_are_named():
    assert validate_network(NetworkConfig(), "n") == []
    assert [line.partition(":")[0] for line in validate_network(NetworkConfig(0, -1), "n")] == [
        "n.attempt_seconds",
        "n.total_seconds",
    ]


def streamed(store, path):
    """A source as of a name on the hub, whose rows come over HTTP."""
    # The function is pickled, for its fingerprint.
    port = store.server_port

    def rows():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(30):
            connection.request("GET", f"/webhdfs/v1/{number}.json?op=OPEN&offset=0&length=1000")
            response = connection.getresponse()
            if response.status != 200:
                raise ConnectionError(f"status {response.status}")
            yield json.loads(response.read())

    source = DatasetsSource(DataConfig(kind="datasets", path=str(path)))
    source._splits = {"train": datasets.IterableDataset.from_generator(rows)}
    return source


@pytest.fixture
def rows_store(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.json").write_text(json.dumps({"text": f"text {number}"}))
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "one.jsonl").write_text('{"text": "x"}\n')
    with serving(folder) as store:
        yield store


@pytest.mark.parametrize("fault", ["drop", "503", "half"])
def test_a_stream_goes_on_where_it_broke(rows_store, tmp_path, fault):
    # Twice in a row, and again later.
    rows_store.fault = lambda path, before: fault if path in ("4.json", "17.json") and before < 2 else ""
    source = streamed(rows_store, tmp_path / "named")
    texts = [document.text for document in source.read(source.inputs()[0], lambda count: None)]
    assert texts == [f"text {number}" for number in range(30)]
    assert not REQUESTS.is_reading


def test_a_stream_that_stays_broken_is_named(rows_store, tmp_path):
    rows_store.fault = lambda path, before: "drop" if path == "4.json" else ""
    source = streamed(rows_store, tmp_path / "named")
    source.network = NetworkConfig(total_seconds=0.5)
    words = r"named: train/.*: the stream broke after row 4 \(cannot be fetched: \d+ attempts in .*; run again"
    with pytest.raises(BrokenOffError, match=words):
        list(source.read(source.inputs()[0], lambda count: None))


@pytest.mark.slow
def test_a_run_that_waits_for_its_network_does_not_hang_and_says_so(tmp_path):
    texts = [f"number {n} of some " + "words that go on and on " * 40 for n in range(60)]
    corpus = prepared_corpus(tmp_path, texts, "shard_bytes=8000")
    with serving(corpus) as store:
        shards = []

        def fault(path, before):
            if path.startswith("shards/train/") and path not in shards:
                shards.append(path)
            # What the run begins with is there: it has taken steps when it has to wait.
            return "503" if path in shards[2:3] and before < 3 else ""

        store.fault = fault
        settings = [f"run_root={tmp_path}", f"corpus.directory={store.url}", *TINY_RUN, "name=run"]
        settings += [f"corpus.cache_directory={tmp_path / 'cache'}", "corpus.window_shards=1", "watchdog.seconds=1"]
        done = run_train([*settings, "training.total_steps=30"])
    assert done.returncode == 0, done.stderr
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "network"]
    documented = keys_and_types([row for row in table("training.md", "event") if row[0] == "`network`"])
    assert event.keys() - {"time", "event"} == documented.keys()
    assert "does not arrive (HTTPError: 503" in event["problem"] and event["rank"] == 0
    # It has read before: this is no phase that may take long because it is the first of its kind.
    assert 0 < event["step"] < 30
    assert f"WARNING    rank 0 on {event['host']}: {store.url.rstrip('/')}/shards/" in done.stderr
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "attempt 3; the next in" in log
