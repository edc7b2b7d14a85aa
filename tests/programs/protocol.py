"""The workload protocol for programs in Python: READY, then `OK n` or `FAIL what differs` for each SIGUSR1; SIGTERM ends it."""

import signal
import sys
import traceback
from collections.abc import Callable

SIGNALS = {signal.SIGUSR1, signal.SIGTERM}


def block() -> None:
    """Before threads and children are made. Children get an empty mask back from `unblocked`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unblocked() -> None:
    """preexec_fn of children."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def answer(verify: Callable[[], object]) -> None:
    """One verification, told."""
    try:
        print(f"OK {verify()}", flush=True)
    except Exception as e:
        traceback.print_exc()
        print(f"FAIL {type(e).__name__} {e}".replace("\n", " "), flush=True)


def serve(verify: Callable[[], object]) -> None:
    print("READY", flush=True)
    while signal.sigwait(SIGNALS) != signal.SIGTERM:
        answer(verify)
    sys.exit(0)
