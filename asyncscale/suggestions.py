"""What an error about an unknown name adds, so that the next attempt is the right one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_MIN_BEGINNING = 3  # characters


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name that begins with `name` or looks most like it, whatever the case, or None."""
    import difflib  # only who is wrong pays for it

    by_lower, name = {candidate.lower(): candidate for candidate in known}, name.lower()
    begun = [candidate for candidate in by_lower if len(name) >= _MIN_BEGINNING and candidate.startswith(name)]
    matches = begun or difflib.get_close_matches(name, by_lower, 1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Collection[str], synonyms: Mapping[str, str] | None = None) -> str:
    """ "; did you mean 'x'?", or else all that is known. synonyms: names in other libraries, and ours for the same."""
    meant = (synonyms or {}).get(name) or closest(name, known)
    return f"; did you mean {meant!r}?" if meant else f"; known are {', '.join(known)}"
