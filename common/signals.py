"""Signals that ask a run to stop."""

import signal
import sys


class StopRequest:
    """True once one of the signals has arrived: SIGTERM (schedulers send it), SIGINT (Ctrl-C). A loop then leaves.

    A second SIGINT interrupts at once.
    """

    def __init__(self, numbers=(signal.SIGTERM, signal.SIGINT)):
        self.signal = None  # the first that has arrived
        for number in numbers:
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return self.signal is not None

    def leave(self, run_dir, step):
        """Ends the program with the signal's usual exit code (143 or 130), after the checkpoint was saved."""
        resume = f"; continue with: python {sys.argv[0]} --resume {run_dir}" if step else ""
        print(f"stopped by {signal.Signals(self.signal).name} at step {step}{resume}")
        raise SystemExit(128 + self.signal)
