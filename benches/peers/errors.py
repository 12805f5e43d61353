"""Errors whose message is all that a caller needs."""


class Refusal(Exception):
    """The base of them: a reply has the message alone, and no traceback."""


class InputError(Refusal):
    """The input file is not one that peers can use."""


class RequestError(Refusal):
    """A request that cannot be served."""


class Unavailable(Refusal):
    """A peer cannot run here."""


class Wrong(Refusal):
    """A result that no tolerance makes right."""


def brief(error):
    """Any error as one line: its type, where it is not ours, and the beginning of what it says."""
    lines = str(error).strip().splitlines() or [""]
    said = lines[0][:300]
    return said if isinstance(error, (Refusal, ImportError)) else f"{type(error).__name__}: {said}"
