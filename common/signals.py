"""Signals that ask a run to stop."""

import signal
import sys


class StopRequest:
    """True once SIGTERM (schedulers send it) or SIGINT (Ctrl-C) has arrived; the loop then saves and leaves.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return self.signal is not None

    def leave(self, run_dir, step):
        """Ends the program with the signal's usual exit code (143 or 130), after the checkpoint was saved."""
        resume = f"; continue with: python {sys.argv[0]} --resume {run_dir}" if step else ""
        print(f"stopped by {signal.Signals(self.signal).name} at step {step}{resume}")
        raise SystemExit(128 + self.signal)
