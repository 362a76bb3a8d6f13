"""No text that is shown has the password of a URL."""

from pathlib import Path

import pytest

from conf import ConfigError
from conf.command_line import exit_code
from conf.passwords import has_hidden_password, secrets_of, without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://me:secret@host/x", "ftp://me:***@host/x"),
        (
            "corpus.directory=https://me:se'c\"r:e@t@host:21/x is missing",
            "corpus.directory=https://me:***@host:21/x is missing",
        ),
        ("s3://:secret@bucket", "s3://:***@bucket"),
        ("memory://a:b@c then a://d:e@f", "memory://a:***@c then a://d:***@f"),
        ("ftp://me:***@host", "ftp://me:***@host"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("http://host:80/x, write to me@host", "http://host:80/x, write to me@host"),
        ("ssh://me@host/x", "ssh://me@host/x"),
        (str(Path("ftp://me:secret@host/x")), "ftp:/me:***@host/x"),
        ("name: a@b:c", "name: a@b:c"),
        ("https://host/x?sig=s/e+c%3D&size=4 is", "https://host/x?sig=***&size=4 is"),
        (
            "('https://h/a?page=1&X-Amz-Signature=abc&X-Amz-Security-Token=d', 403)",
            "('https://h/a?page=1&X-Amz-Signature=***&X-Amz-Security-Token=***', 403)",
        ),
        ("https://h/a?access_token=t#part and key=5", "https://h/a?access_token=***#part and key=5"),
        ("what token=t is?key=1", "what token=t is?key=1"),
        ("https://h/a?keys=1&monkey=2", "https://h/a?keys=1&monkey=2"),
    ],
)
def test_the_password_of_a_url_is_hidden_in_any_text(text, shown):
    assert without_passwords(text) == shown == without_passwords(shown)
    assert without_passwords({"a": [text, 1, None], text: (text,)}) == {"a": [shown, 1, None], shown: (shown,)}
    assert has_hidden_password(shown) is ("***" in shown)


def test_the_password_of_a_url_is_found():
    urls = ("ftp://me:se:c@ret@host/a:b@c", "s3://:x@b", "https://h/a?sig=1&n=2&X-Amz-Credential=3", "s3://b/c:d@e")
    assert [secrets_of(url) for url in urls] == [["se:c@ret"], ["x"], ["1", "3"], []]


def test_errors_of_the_configuration_and_of_commands_show_none(capsys):
    problem = "corpus.directory: no such corpus (ftp://me:secret@host/x)"
    error = ConfigError([problem])
    assert "secret" not in str(error) and error.problems == ["corpus.directory: no such corpus (ftp://me:***@host/x)"]

    def command():
        raise OSError(problem)

    assert exit_code(command, (OSError,), "interrupted") == 1
    assert capsys.readouterr().err == "error: corpus.directory: no such corpus (ftp://me:***@host/x)\n"
