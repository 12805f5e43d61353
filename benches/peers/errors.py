"""Errors that are reported by their message, without a traceback."""


class Refusal(Exception):
    """The base class: a reply has the message alone, without a traceback."""


class InputError(Refusal):
    """The input file is invalid."""


class RequestError(Refusal):
    """The request is invalid."""


class Unavailable(Refusal):
    """The peer cannot run on this machine."""


class Wrong(Refusal):
    """The result is wrong whatever the tolerance."""


def brief(error):
    """Returns an error as one line: its type, unless it is one of these, and its message."""
    lines = str(error).strip().splitlines() or [""]
    said = lines[0][:300]
    return said if isinstance(error, (Refusal, ImportError)) else f"{type(error).__name__}: {said}"
