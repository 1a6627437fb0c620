"""The one exception for mistakes of users, and other errors in one line."""


class UserError(ValueError):
    """A user's mistake, in one clear line that says what to change; the tools print it and exit with code
    2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, or its type if it has none."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
