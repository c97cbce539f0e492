"""What a distillation run is made of: text, models, quantisers, losses and files."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what, where and what to do.

    Command-line entry points print it on stderr and exit with ``code``.
    """

    code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path may hold line breaks


class RunFailed(UserError):
    """A run that started properly and could not go on."""

    code = 1
