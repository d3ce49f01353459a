"""How tests look at what is refused."""

import re

import pytest


def refused(kind, use):
    """The message of an exception of exactly this class: one sentence, no traceback of others."""
    with pytest.raises(kind) as error:
        use()
    message = str(error.value)
    assert type(error.value) is kind, message
    assert message
    assert "\n" not in message
    assert re.fullmatch(r"[a-z_]+", error.value.code)
    return message


def assert_names(message, *words):
    for word in words:
        assert str(word) in message, message
