"""What an error about an unknown name adds, so that the next attempt is the right one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_MIN_BEGINNING = 3  # characters
_LIKE_BEGINNING = 0.75  # difflib's ratio


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name that looks most like `name`, or begins like it, whatever the case; or None."""
    import difflib  # only who is wrong pays for it

    name, by_lower = name.lower(), {candidate.lower(): candidate for candidate in known}
    if matches := difflib.get_close_matches(name, by_lower, 1):
        return by_lower[matches[0]]
    by_beginning = {candidate[: len(name)]: by_lower[candidate] for candidate in reversed(by_lower)}
    matches = difflib.get_close_matches(name, by_beginning, 1, _LIKE_BEGINNING)
    return by_beginning[matches[0]] if matches and len(name) >= _MIN_BEGINNING else None


def did_you_mean(name: str, known: Collection[str], synonyms: Mapping[str, str] | None = None) -> str:
    """The end of a sentence: "; did you mean 'x'?", or else all that is known.

    synonyms: names in other libraries, and ours for the same.
    """
    meant = (synonyms or {}).get(name) or closest(name, known)
    return f"; did you mean {meant!r}?" if meant else f"; known are {', '.join(known)}"
