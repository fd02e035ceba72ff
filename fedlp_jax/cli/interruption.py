"""Ctrl-C and SIGTERM: the first asks a run to end after the round in flight, the second ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

INTERRUPTED = 130  # exit code
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


class Interruption:
    """Listens for both signals while its context lasts; called, it says whether one has come.

        with Interruption() as stop:
            simulate(..., stop=stop)

    Python runs a handler only between two steps of the interpreter, which may be minutes apart
    while a round is computed. So a thread listens, and the second signal is obeyed at once.
    """

    def __init__(self) -> None:
        self._wanted = False

    def __call__(self) -> bool:
        """Whether the run should end."""
        return self._wanted

    def __enter__(self) -> Interruption:
        """Starts to listen; a signal that is ignored, as in `nohup`, stays so."""
        self._before: dict[signal.Signals, Any] = {
            s: signal.getsignal(s) for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN
        }
        receive, self._send = os.pipe()
        os.set_blocking(self._send, False)
        self._wakeup_before = signal.set_wakeup_fd(self._send)
        for s in self._before:
            signal.signal(s, lambda *_: None)
        self._listener = threading.Thread(target=self._listen, args=(receive,), daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the signals as they were."""
        for s, handler in self._before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._send)
        self._listener.join()

    def _listen(self, receive: int) -> None:
        with open(receive, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] not in self._before:
                    continue
                if self._wanted:
                    self._end()
                self._wanted = True
                self._say("fedlp: ending after what is in flight; once more ends at once.")

    def _end(self) -> None:
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        self._say(f"{cursor}fedlp: ended at once; what was saved before is there.")
        os._exit(INTERRUPTED)

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
