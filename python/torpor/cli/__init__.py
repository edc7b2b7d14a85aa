"""The command line. Nothing here is imported by anything outside; verbs are imported when they are called."""


class Interrupted(BaseException):
    """A signal came before there was a program to pass it on to.

    Not an Exception: like KeyboardInterrupt it must get past every handler, to where what is half built is taken down.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
