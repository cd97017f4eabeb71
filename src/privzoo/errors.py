"""The ways in which a command ends early without a traceback."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: the value found, the value expected, the way out.

    Every entry point prints it as `privzoo: <sentence>` and exits with code 2.
    """


class RunLost(RuntimeError):
    """Work was lost or stopped through no fault of the user, for example by a full disk.

    The sentence says what was kept and how to go on. Every entry point prints it as
    `privzoo: <sentence>` and exits with code 1.
    """


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal and ended cleanly; the exit code is 128 + signal_number.

    It is a KeyboardInterrupt, so that no `except Exception` on the way swallows it and a sweep ends too.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, without its full stop."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details").rstrip(".:")[:200]
