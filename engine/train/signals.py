"""Stop requests: signals are recorded here and handled by the trainer between steps."""

import os
import signal
import sys
from types import FrameType

from engine.errors import PeerError, is_first_of_node

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Signal handler that records the first SIGINT, SIGTERM or SIGUSR1, which then no longer end the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
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
