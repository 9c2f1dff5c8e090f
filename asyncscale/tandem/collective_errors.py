"""How a collective operation fails."""


class CollectiveError(Exception):
    """A collective operation failed, as another engine is gone or has left the generation."""


class SteppedAloneError(AssertionError):
    """An engine is in a collective operation in which not all others are, or will be: the waves are at fault."""
