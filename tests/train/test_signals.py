"""Stop requests: what is said, and who reports the end of a peer."""

import os
import signal

import pytest

from engine.errors import PeerError
from engine.train.signals import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    # the default, as nohup and background jobs of a shell ignore some
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "stopping after this step\n"), (signal.SIGTERM, "")])
def test_a_person_who_stops_a_run_is_answered_once(number, said, capfd):
    stop = StopRequest()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stop.signal == number
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_a_rank_that_torchrun_stops_leaves_the_report_to_its_peer(when):
    stop, error = StopRequest(), PeerError("lost")
    if when == "before":
        os.kill(os.getpid(), signal.SIGTERM)
    stop.silence(error)
    if when == "after":
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.reported_elsewhere == (when != "never")
    assert error.patience_s == (0 if when != "never" else PeerError.patience_s)
