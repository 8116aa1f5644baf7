"""The server under test as a process: started, waited for, killed, always by its own pid."""

import os
import signal
import subprocess
import sys
import time

import nbd

from checker import Wrong

START_LIMIT_S = 20.0
STOP_LIMIT_S = 20.0
HERE = os.path.dirname(os.path.abspath(__file__))
IS_WEFT = os.environ.get("WEFT_SERVER", "weft") == "weft"


class Server:
    """One directory served by tests/clients/serve; its log is server.log next to the directory."""

    def __init__(self, directory, port):
        self.directory, self.port = directory, port
        # A test that is stopped must stop its server: let `finally` run.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        self.process = None
        self.log = open(os.path.join(directory, "..", "server.log"), "ab")
        self.tcp = f"nbd://127.0.0.1:{port}/vol0"
        self.unix = f"nbd+unix:///vol0?socket={directory}/nbd.sock"

    def start(self):
        """Starts it and returns the seconds until it served the volume on both transports."""
        begin = time.monotonic()
        command = [os.path.join(HERE, "serve"), self.directory, self.port]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while not (self._answers(self.unix) and self._answers(self.tcp)):
            if self.process.poll() is not None:
                raise Wrong(f"the server ended with status {self.process.returncode} while it started")
            if time.monotonic() - begin > START_LIMIT_S:
                raise Wrong(f"the server does not serve within {START_LIMIT_S} s")
            time.sleep(0.01)
        return time.monotonic() - begin

    def _answers(self, uri):
        try:
            connection = nbd.NBD()
            connection.connect_uri(uri)
            connection.shutdown()
            return True
        except nbd.Error:
            return False

    def stop(self, how=signal.SIGTERM):
        """Ends the process with a signal and insists that it ends in time, and well if it was asked politely."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(timeout=STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise Wrong(f"the server still ran {STOP_LIMIT_S} s after {how.name}") from None
        elif how == signal.SIGTERM:
            raise Wrong(f"the server had ended by itself with status {self.process.returncode}")
        if how == signal.SIGTERM:
            self.expect_end(how)

    def expect_end(self, how):
        """Insists that the process, which has ended, did so as it must after a signal: by it, or drained after SIGTERM."""
        drained = [0] if IS_WEFT else [0, -how]
        expected = drained if how == signal.SIGTERM else [-how]
        if self.process.returncode not in expected:
            raise Wrong(f"the server ended with status {self.process.returncode} after {how.name}")
