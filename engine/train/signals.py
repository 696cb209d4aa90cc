"""Stop requests: signals are recorded here and handled by the trainer between steps."""

import ctypes
import os
import signal
import sys
from types import FrameType

from engine.errors import PeerError, is_first_of_node

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # prctl(2)


class StopRequest:
    """Signal handler that records the first stop signal, which then no longer ends the process.

    A second one, half a second later or more, ends it at once (`engine/train/guard.py`).
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if number == signal.SIGINT and is_first_of_node() and sys.stderr:
                # past the stream, in which this may have interrupted the process
                os.write(sys.stderr.fileno(), b"stopping after this step\n")

    def silence(self, error: PeerError) -> None:
        """Leave the report of `error` to the peer if SIGTERM comes first: torchrun has seen the peer end."""

        def stop(*_: object) -> None:
            error.reported_elsewhere, error.patience_s = True, 0.0

        signal.signal(signal.SIGTERM, stop)
        if self.signal is not None:
            stop()


def end_with_agent() -> None:
    """Have a rank of torchrun get SIGTERM when torchrun's agent dies, so that it saves and ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
