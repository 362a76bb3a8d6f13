"""Figures that leave their range are told of once, to all that are asked for; healthy ones are not."""

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from conf import compose
from tests.runs import TINY_RUN
from tests.train.plain_runs import run_plainly
from train.alert_rules import AlertRule, Watched, rules_about
from train.callbacks.alerts import WEBHOOK_VARIABLE, Alerts
from train.callbacks.base import Callback
from train.config import RunConfig
from train.run_directory import read_events
from train.validate import validate


def told(rule, values):
    """(index, words) of the values that the rule tells of."""
    watched = Watched.under(rule)
    return [(index, words) for index, value in enumerate(values) if (words := watched.problem(value))]


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (AlertRule("x", above=1), [0, 1, 2, 0.5], [(2, "2 is above 1")]),
        (AlertRule("x", below=-3), [0, -3, -4], [(2, "-4 is below -3")]),
        (AlertRule("x", above=1, times=2), [2, 0, 2, 2, 0], [(3, "2 is above 1")]),
        # Not before there are enough values for a median.
        (AlertRule("x", above_median=3, window=3), [9, 1, 1, 3, 4], [(4, "4 is more than 3 times its median, 1")]),
        (AlertRule("x", above_lowest=1, window=1), [5, 3, 4, 4.5], [(3, "4.5 is more than 1 above its lowest, 3")]),
        # One high value among low ones is no rise of the median.
        (AlertRule("x", above_lowest=1, window=3), [3, 3, 3, 9, 3, 9], [(5, "9 is more than 1 above its lowest, 3")]),
        (AlertRule("x", above=1), [0, float("nan"), float("inf")], [(1, "is not finite"), (2, "is not finite")]),
        (AlertRule("x", above=1, below=-1), [0, 0.5], []),
    ],
)
def test_what_a_rule_tells_of(rule, values, expected):
    assert told(rule, values) == expected


def test_a_figure_goes_on_where_it_was_saved():
    rule = AlertRule("x", above_lowest=1, window=2)
    first = Watched.under(rule)
    for value in (3, 3, 5):
        first.problem(value)
    again = Watched.under(rule)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.problem(5) == first.problem(5) != ""


def test_what_is_known_of_a_figure_outlives_starts_in_which_it_does_not_come():
    config = SimpleNamespace(rules={"rises": AlertRule("loss", above_lowest=1, window=1)}, pause_steps=0)
    trainer = SimpleNamespace(config=SimpleNamespace(alerts=config), step=1)
    first, second, third = Alerts(), Alerts(), Alerts()
    first.on_metrics(trainer, {"loss": 2.0})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert third._watch(trainer, "rises", "loss").problem(3.5) == "3.5 is more than 1 above its lowest, 2"


def test_names_of_figures():
    rules = {"one": AlertRule("blocks.*.output_rms", above=1), "all": AlertRule("*", above=1)}
    assert rules_about("blocks.03.output_rms", rules) == ["one", "all"]
    assert rules_about("loss", rules) == ["all"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+alerts.rules.mine={figure: loss}", "alerts.rules.mine: has no threshold; set one of above, below"),
        ("+alerts.rules.mine={figure: ' ', above: 1}", "alerts.rules.mine.figure: empty"),
        ("+alerts.rules.mine={figure: loss, above_median: 1}", "alerts.rules.mine.above_median: must be above 1 (1.0)"),
        ("+alerts.rules.mine={figure: loss, above: 1, window: 0}", "alerts.rules.mine.window: must be at least 1 (0)"),
        ("+alerts.rules.mine={figure: loss, above: 1, times: 0}", "alerts.rules.mine.times: must be at least 1 (0)"),
        ("alerts.pause_steps=-1", "alerts.pause_steps: must be at least 0 (-1)"),
        ("alerts.webhook=example.org/hook", "alerts.webhook: is no http:// or https:// URL ('example.org/hook')"),
    ],
)
def test_rules_that_cannot_be(override, message):
    given = ["name=x", "corpus.directory=x", *TINY_RUN, "training.total_steps=1", override]
    problems = validate(compose(RunConfig, "train", given), 1)
    assert [problem for problem in problems if message in problem], problems


class Received:
    """What a server on this machine gets by POST."""

    def __init__(self):
        self.messages = []
        received = self.messages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        # Not a word of this file: a run keeps the difference of what is not committed.
        self.secret = uuid.uuid4().hex
        self.url = f"http://127.0.0.1:{self.server.server_port}/{self.secret}"


@pytest.fixture
def received():
    received = Received()
    yield received
    received.server.shutdown()
    received.server.server_close()


class Listener(Callback):
    def __init__(self):
        self.alerts = []

    def on_alert(self, trainer, alert):
        self.alerts.append((alert.step, alert.rule))


class Failure(Callback):
    def on_step_start(self, trainer):
        if trainer.step == 3:
            raise ValueError("the power is out")


@pytest.fixture
def settings(tiny_run):
    return [*tiny_run, "parallel=zero0", "training.total_steps=12", "checkpoint.interval=4", "alerts.pause_steps=8"]


def alerts_of(folder):
    return [event for event in read_events(folder) if event["event"] == "alert"]


def test_an_alert_reaches_everyone_once_in_a_while(settings, tmp_path, received, capsys):
    listener = Listener()
    rule = "+alerts.rules.low={figure: loss, above: 0.1}"
    assert run_plainly([*settings, rule, f"alerts.webhook={received.url}"], [listener]) == 0
    events = alerts_of(tmp_path / "run")
    assert [(event["step"], event["rule"]) for event in events] == [(1, "low"), (9, "low")] == listener.alerts
    assert all(event["words"].startswith("loss: ") and "is above 0.1" in event["words"] for event in events)
    assert [(message["run"], message["step"], message["rule"]) for message in received.messages] == [
        ("run", 1, "low"),
        ("run", 9, "low"),
    ]
    assert received.messages[0]["text"] == f"run, step 1: low: {events[0]['words']}"
    assert capsys.readouterr().err.count("WARNING    low: loss: ") == 2
    # A start that goes on knows when it told last.
    assert run_plainly([*settings, rule, f"alerts.webhook={received.url}", "training.total_steps=16"]) == 0
    assert [event["step"] for event in alerts_of(tmp_path / "run")] == [1, 9]
    assert run_plainly([*settings, rule, f"alerts.webhook={received.url}", "training.total_steps=18"]) == 0
    assert [event["step"] for event in alerts_of(tmp_path / "run")] == [1, 9, 17]


def test_an_injected_fault_is_told_of_and_a_healthy_run_is_not(settings, tmp_path):
    healthy = [*settings, "logging.monitor_interval=2", "evaluation.interval=4", "training.total_steps=60"]
    assert run_plainly([*healthy, "name=healthy", "optimizer.learning_rate=3e-3"]) == 0
    assert not alerts_of(tmp_path / "healthy")
    assert run_plainly([*healthy, "name=faulty", "optimizer.learning_rate=3", "schedule=constant"]) == 0
    rules = {event["rule"] for event in alerts_of(tmp_path / "faulty")}
    assert {"held_out_loss_rises", "gradient_grows", "logits_reach_their_cap"} <= rules, rules


def test_a_run_that_fails_is_told_of_and_the_address_is_nowhere(settings, tmp_path, received, monkeypatch, capsys):
    monkeypatch.setenv(WEBHOOK_VARIABLE, received.url)
    assert run_plainly(settings, [Failure()]) == 1
    (message,) = received.messages
    assert message["text"] == "run, step 3: run_failed: the run failed: the power is out"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if received.secret.encode() in path.read_bytes()]
    assert received.secret not in capsys.readouterr().err


def test_a_webhook_that_is_not_there_costs_a_run_nothing(settings, tmp_path):
    rule = "+alerts.rules.low={figure: loss, above: 0.1}"
    # A port that nobody listens to.
    assert run_plainly([*settings, rule, "alerts.webhook=http://127.0.0.1:9/secret"]) == 0
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "a message to the webhook of alerts did not arrive" in log and "secret" not in log


@pytest.mark.slow
def test_an_alert_is_one_of_wandb_too(settings, tmp_path):
    rule = "+alerts.rules.low_loss={figure: loss, above: 0.1}"
    assert run_plainly([*settings, rule, "logging.wandb.mode=offline"]) == 0
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"run: low_loss" in file.read_bytes()
