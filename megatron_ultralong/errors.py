"""The one exception for mistakes of users."""


class UserError(ValueError):
    """A user's mistake, in one clear line that says what to change; the tools print it and exit with code
    2."""
