"""The page at / in a real browser: text streams, figures are shown, and it fits on a phone."""

from __future__ import annotations

import json
import re

import pytest

from tests.model.server.chromium import chromium, find_chromium
from tests.model.server.conftest import MAX_NEW_TOKENS, SLOTS


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """The page as a phone shows it."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed here (apt-get install chromium)")
    with chromium(program, tmp_path_factory.mktemp("profile")) as page:
        page.send("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        page.send("Page.navigate", url=f"{server.url}/")
        page.wait_for("document.readyState === 'complete' && document.getElementById('facts')?.textContent !== ''")
        yield page


def fill(page, prompt: str, tokens: int, mode: str = "completion") -> None:
    values = {"prompt": prompt, "tokens": str(tokens), "temperature": "0", "mode": mode}
    for name, value in values.items():
        page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}; true")


def text(page, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def press(page, name: str) -> None:
    """A real click or tap, at the place of the button."""
    box = page.evaluate(
        f"document.getElementById('{name}').scrollIntoView(), JSON.stringify("
        f"document.getElementById('{name}').getBoundingClientRect())"
    )
    place = json.loads(box)
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    for kind in ("mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def wait_for_the_end(page) -> None:
    page.wait_for("!document.getElementById('go').disabled")


@pytest.mark.slow
def test_it_tells_what_is_served(page, server):
    assert text(page, "model") == "small"
    state = int(server.metric("xlstm_state_bytes_per_sequence"))
    assert f"State of a text: {state / 1000:#.3g} kB" in text(page, "facts").replace(",", "")
    assert "no chat training is known of this model" in text(page, "facts")


@pytest.mark.slow
def test_text_comes_with_its_speed(page, alone):
    fill(page, "def f(", 60)
    press(page, "go")
    wait_for_the_end(page)
    assert text(page, "error") == ""
    assert text(page, "output") == "def f(" + alone.text("def f(", 60)
    shown = text(page, "speed")
    new, prompt_tokens = len(alone.ids("def f(", 60)), 1 + len(alone.tokenizer.encode("def f("))
    assert re.fullmatch(
        rf"{new} tokens, [\d.]+ tokens/s, first after \d+ ms\. The prompt had {prompt_tokens} tokens; "
        r"the state is [\d.]+ kB\.",
        shown,
    ), shown


@pytest.mark.slow
def test_a_chat_shows_the_answer_alone(page, alone):
    fill(page, "hi", 20, mode="chat")
    press(page, "go")
    wait_for_the_end(page)
    assert text(page, "output") == alone.text("User: hi\n\nAssistant:", 20)


@pytest.mark.slow
def test_stop_frees_the_slot_and_keeps_the_text(page, server, alone, endless):
    prompt = alone.tokenizer.decode(endless)
    fill(page, prompt, MAX_NEW_TOKENS)
    press(page, "go")
    page.wait_for("/^[1-9]/.test(document.getElementById('speed').textContent)")
    press(page, "stop")
    wait_for_the_end(page)
    server.wait_until_idle(SLOTS)
    assert text(page, "error") == "" and text(page, "output").startswith(prompt)


@pytest.mark.slow
def test_a_refusal_is_shown(page):
    fill(page, "x", MAX_NEW_TOKENS)
    page.evaluate(
        "document.getElementById('tokens').removeAttribute('max'), document.getElementById('tokens').value = 1e6"
    )
    press(page, "go")
    page.wait_for("document.getElementById('error').textContent !== ''")
    wait_for_the_end(page)
    assert text(page, "error") == "max_tokens: must be from 1 to 500, not 1000000"


@pytest.mark.slow
def test_what_a_model_writes_is_no_html(page, server):
    """Echo and answer are put in as text."""
    fill(page, "<img src=x onerror='document.title=1'>", 1)
    press(page, "go")
    wait_for_the_end(page)
    assert text(page, "output").startswith("<img src=x") and page.evaluate("document.title") == "small"
    assert page.evaluate("document.querySelectorAll('#output img').length") == 0


@pytest.mark.slow
def test_it_fits_on_a_phone_and_asks_nobody_else(page, server):
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("go", "stop", "prompt"):
        assert page.evaluate(f"document.getElementById('{name}').getBoundingClientRect().right") <= 360
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(url.startswith((server.url, "data:")) for url in asked)
    said = [
        event["params"] for event in page.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    # The browser tells of the request that was refused on purpose.
    assert all("400" in json.dumps(entry) for entry in said), said
