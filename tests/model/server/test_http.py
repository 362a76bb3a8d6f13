"""What the client library never sends, and what is not for it: raw HTTP against the same server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from model.server.event_stream import event
from tests.model.server.conftest import MAX_NEW_TOKENS, SLOTS
from tests.model.server.serving import SECONDS, head, open_stream


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2", 404, "there is nothing at /v2"),
        ("GET", "/v1/completions", 405, "GET is not answered here"),
        ("DELETE", "/v1/models", 405, "DELETE is not answered here"),
    ],
)
def test_other_paths_and_methods_have_errors_of_the_same_shape(server, method, path, status, message):
    found, headers, body = server.request(method, path)
    error = json.loads(body)["error"]
    assert (found, error["message"], error["type"]) == (status, message, "invalid_request_error")
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "small", "prompt": "\\ud800"}'])
def test_bodies_that_are_no_request_are_refused(server, body):
    status, _, answer = server.post("/v1/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_other_types_of_content_are_refused(server):
    """A page of another site can have a browser send text/plain without asking."""
    body = json.dumps({"model": "small", "prompt": "x"}).encode()
    status, _, answer = server.post("/v1/completions", body, **{"Content-Type": "text/plain"})
    assert (status, answer["error"]["message"]) == (415, "Content-Type must be application/json")


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        for _ in range(4):
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_health_page_and_metrics(server, endless):
    assert server.get("/health") == (200, b'{"status":"ok"}')
    status, headers, page = server.request("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<textarea" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    # One file: nothing of it is asked for elsewhere.
    assert not re.findall(rb"(?:src|href)=\"(?!data:)|url\(|https?://", page)
    before = server.metric("xlstm_generated_tokens_total"), server.metric("xlstm_prompt_tokens_total")
    server.completion(endless, max_tokens=9, n=2)
    assert server.metric("xlstm_generated_tokens_total") - before[0] == 18
    assert server.metric("xlstm_prompt_tokens_total") - before[1] == 1
    status, headers, page = server.request("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=")
    text = page.decode()
    assert re.search(r'xlstm_responses_total{path="/v1/completions",status="200"} \d', text)
    assert re.search(r'xlstm_sequences_total{reason="length"} \d', text)
    assert re.search(r"xlstm_time_to_first_token_seconds_count [1-9]", text)
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z_]+({[^}]*})? [-+.\dNaInfe]+", line), line


def test_metrics_are_what_prometheus_reads(server):
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name for family in text_string_to_metric_families(server.get("/metrics")[1].decode())}
    assert {"xlstm_slots_free", "xlstm_generated_tokens", "xlstm_answer_seconds", "process_open_fds"} <= families


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(server, endless, stream):
    connection = open_stream(server, {"prompt": endless, "n": SLOTS, "max_tokens": MAX_NEW_TOKENS, "stream": stream})
    server.wait_until("xlstm_sequences_running", SLOTS)
    before = server.metric("xlstm_generated_tokens_total")
    connection.close()
    server.wait_until_idle(SLOTS)
    assert server.metric("xlstm_generated_tokens_total") - before < SLOTS * MAX_NEW_TOKENS


def test_a_client_that_is_killed_frees_its_slots(server, endless):
    code = (
        "import sys, openai\n"
        f"client = openai.OpenAI(base_url='{server.url}/v1', api_key='x')\n"
        f"given = dict(prompt={endless}, n={SLOTS}, max_tokens={MAX_NEW_TOKENS}, temperature=0)\n"
        "for part in client.completions.create(model='small', stream=True, **given):\n"
        "    print('got', flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None and client.stdout.readline() == "got\n"
    assert server.metric("xlstm_sequences_running") == SLOTS
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    server.wait_until_idle(SLOTS)


def test_a_reader_that_does_not_read_holds_up_nobody(server, alone, endless):
    """Its sequences end and free their slots; others are answered; what it reads later is whole."""
    body = {"prompt": endless, "n": SLOTS, "max_tokens": MAX_NEW_TOKENS, "logprobs": 20}
    with open_stream(server, body, receive_buffer=4096) as connection:
        server.wait_until("xlstm_sequences_admitted", SLOTS)
        server.wait_until("xlstm_sequences_admitted", 0)
        assert server.metric("xlstm_requests_open") == 1
        assert server.completion("def f(", max_tokens=5)["choices"][0]["text"] == alone.text("def f(", 5)
        received = b""
        while b"data: [DONE]" not in received[-100:]:
            received += connection.recv(1 << 20)
    chunks = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
    expected = alone.text(endless, MAX_NEW_TOKENS)
    for index in range(SLOTS):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == expected


def test_one_connection_serves_many_requests(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b'"ok"}' not in received:
                received += connection.recv(4096)
            assert received.startswith(b"HTTP/1.1 200 OK")


def test_events_are_one_line_whatever_is_in_them():
    assert event({"text": "a\n\n\u2028data: [DONE]\r"}).count(b"\n") == 2
