"""How the server begins and ends: what it refuses to start with, signals, clients that stall."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from model.__main__ import main
from model.server.limits import Limits
from tests.model.server.conftest import MAX_NEW_TOKENS
from tests.model.server.serving import SECONDS, Server, head, open_stream, serving
from tests.runs import PATIENCE, ROOT, environment


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def chunks_of(received: bytes) -> list[dict]:
    return [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]


def begun_stream(server: Server, prompt: list[int], tokens: int) -> socket.socket:
    connection = open_stream(server, {"prompt": prompt, "max_tokens": tokens})
    server.wait_until("xlstm_sequences_running", 1)
    return connection


@pytest.mark.slow
def test_running_streams_end_and_new_ones_are_refused_after_sigterm(weights, alone, endless, tmp_path):
    with serving(weights, tmp_path / "stderr", "slots=2") as server:
        with begun_stream(server, endless, MAX_NEW_TOKENS) as connection:
            idle = socket.create_connection(("127.0.0.1", server.port))
            server.process.send_signal(signal.SIGTERM)
            while server.get("/health")[0] == 200:
                time.sleep(0.01)
            assert server.get("/health") == (503, b'{"status":"draining"}')
            status, headers, answer = server.post("/v1/completions", {"model": "small", "prompt": "x"})
            assert (status, answer["error"]["message"]) == (503, "the server is shutting down")
            assert int(headers["retry-after"]) > 30 and headers["connection"] == "close"
            received = read_all(connection)
        idle.close()
        assert server.process.wait(PATIENCE) == 0
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(received))
        assert received.count(b"data: [DONE]") == 1 and text == alone.text(endless, MAX_NEW_TOKENS)
        assert server.errors.read_text() == "draining: 1 requests are being answered\n"


@pytest.mark.slow
def test_clients_that_stall_are_given_up_and_what_does_not_end_is_broken_off(weights, endless, tmp_path):
    """One that sends half a body, one that reads nothing: of neither anything is left. Then one outlasts a drain."""
    limits = ["slots=2", "stall_seconds=0.5", "max_new_tokens=1000000", "drain_seconds=0.1"]
    with serving(weights, tmp_path / "stderr", *limits) as server:
        sender = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        sender.sendall(head("Content-Length: 50") + b"{")
        body = {"prompt": endless, "max_tokens": MAX_NEW_TOKENS, "logprobs": 20, "n": 2}
        reader = open_stream(server, body, receive_buffer=4096)
        with sender, reader:
            received = read_all(sender)
            assert received.startswith(b"HTTP/1.1 408 ") and b"nothing of the body came for 0.5 seconds" in received
            server.wait_until("xlstm_prompt_tokens_total", 1)
            # Either the server sees first that nothing is taken, or the system does.
            server.wait_until_idle(2)
            assert b"[DONE]" not in _what_is_left(reader)
        _broken_off(server, endless, [signal.SIGTERM])
    assert "broke off 1 answers that had not ended" in server.errors.read_text()


@pytest.mark.long
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(weights, endless, tmp_path, second):
    with serving(weights, tmp_path / "stderr", "slots=2", "max_new_tokens=1000000") as server:
        _broken_off(server, endless, [signal.SIGINT, second])
    assert "broke off 1 answers that had not ended" in server.errors.read_text()


def _broken_off(server: Server, prompt: list[int], signals: list[signal.Signals]) -> None:
    """Send signals while a stream runs that does not end by itself; it ends with an error, the process with 0."""
    with begun_stream(server, prompt, 1_000_000) as connection:
        for number in signals:
            server.process.send_signal(number)
            time.sleep(0.05)
        received = read_all(connection)
    assert server.process.wait(PATIENCE) == 0
    *_, last = chunks_of(received)
    assert last["error"]["message"] == "the server is shutting down; this answer is not whole"
    assert last["error"]["type"] == "server_error" and b"[DONE]" not in received


def _what_is_left(connection: socket.socket) -> bytes:
    try:
        return read_all(connection)
    except ConnectionResetError:
        return b""


# A step fails as it does where a GPU is out of memory.
FAILING = """
import sys
from model.__main__ import main
from model.generation.batch import ContinuousBatch
step = ContinuousBatch.step
def failing(batch):
    if batch.running == 2:
        raise RuntimeError("CUDA error: out of memory")
    return step(batch)
ContinuousBatch.step = failing
sys.exit(main())
"""


@pytest.mark.slow
def test_a_model_that_fails_ends_every_answer_and_the_server_with_1(weights, endless, tmp_path):
    with serving(weights, tmp_path / "stderr", "slots=2", program=("-c", FAILING)) as server:
        with begun_stream(server, endless, MAX_NEW_TOKENS) as connection:
            status, _, answer = server.post("/v1/completions", {"model": "small", "prompt": endless})
            assert (status, answer["error"]["message"]) == (500, "the model failed: RuntimeError")
            *_, last = chunks_of(read_all(connection))
            assert last["error"]["message"] == "the model failed: RuntimeError"
        assert server.process.wait(PATIENCE) == 1
    assert "CUDA error: out of memory" in server.errors.read_text()


def test_a_port_in_use_is_said_before_weights_are_read(weights, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", f"checkpoint={weights}", f"port={port}"]) == 2
    assert (
        f"port: {port} of 127.0.0.1 is in use by another process; give another one, or port=0"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (["host=256.0.0.1"], ["host: 256.0.0.1 is no address of this machine"]),
        (["host=192.0.2.1"], ["host: cannot listen at 192.0.2.1, port 8000"]),
        (["port=65536", "slots=0"], ["port: must be between 0 and 65535 (65536)", "slots: must be at least 1 (0)"]),
        (["stall_seconds=0", "queue=-1"], ["stall_seconds: must be positive (0", "queue: must be at least 0 (-1)"]),
        (["prefill_tokens=0"], ["prefill_tokens: must be at least 1 (0)"]),
        (["prefix_cache_mib=-1"], ["prefix_cache_mib: must be at least 0 (-1)"]),
        (["name= "], ["name: must not be empty"]),
        (["slot=3"], ["slot=3: no such setting (did you mean 'slots'?)"]),
        (["slots=many"], ["slots"]),
        (["port=0", "dtype=float16"], ["dtype: unknown value 'float16'"]),
        (["port=0", "device=abacus"], ["device: 'abacus' cannot be used here"]),
        (["port=0", "tokenizer=nowhere"], ["nowhere: no such tokenizer file"]),
    ],
)
def test_settings_that_cannot_be_are_refused(weights, settings, messages, capsys):
    assert main(["serve", f"checkpoint={weights}", *settings]) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error


def test_a_template_that_cannot_be_read_is_named(weights, tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes((weights / "tokenizer" / "tokenizer.model").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    assert main(["serve", f"checkpoint={weights}", f"tokenizer={tmp_path}", "port=0"]) == 2
    assert f"{tmp_path / 'chat_template.jinja'}: chat_template: line 1 cannot be read" in capsys.readouterr().err


def test_without_the_extra_serve_says_what_to_install(weights, tmp_path):
    """In a process that finds none of its packages."""
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "absent = ('starlette', 'uvicorn')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)\n"
        "from model.__main__ import main\n"
        f"sys.exit(main(['serve', 'checkpoint={weights}']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert 'serve needs starlette, uvicorn, not installed here; run: pip install ".[serve]"' in done.stderr


def test_limits_have_names_that_the_command_takes():
    from model.server.command import ServeSettings

    assert ServeSettings().limits == Limits() and ServeSettings().problems() == []


def test_the_help_tells_the_defaults():
    from dataclasses import fields

    from model.server.command import SERVE_HELP, ServeSettings

    for field in fields(ServeSettings):
        shown = "NAME" if field.default == "???" else "PATH" if field.name == "tokenizer" else field.default
        shown = "null" if shown is None else f"{shown:g}" if isinstance(shown, float) else shown
        assert f"  {field.name}={shown} " in SERVE_HELP, field.name
