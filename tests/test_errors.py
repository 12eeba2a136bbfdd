"""What is said of what the system refuses."""

from __future__ import annotations

import errno
import socket
import ssl
import urllib.error

import pytest

from qwencli.errors import system_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"), "connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (
            ssl.SSLCertVerificationError(
                1,
                "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed "
                "certificate (_ssl.c:1006)",
            ),
            "certificate verify failed: self-signed certificate",
        ),
    ],
)
def test_the_systems_words_whatever_they_are_wrapped_in(error, words):
    assert system_words(error) == words
    wrapped = RuntimeError("all attempts failed")
    wrapped.__cause__ = error
    assert system_words(wrapped) == words
    by_urllib = urllib.error.URLError(error)
    by_urllib.__context__ = error
    assert system_words(by_urllib) == words


def test_an_error_with_no_words_of_the_system():
    assert system_words(urllib.error.URLError("unknown url type: foo")) == "unknown url type: foo"
    assert system_words(ValueError("Bad\nport")) == "bad"
    assert system_words(ValueError()) == "valueerror"
