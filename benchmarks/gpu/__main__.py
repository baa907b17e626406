"""Run the command; a SIGTERM ends it as Ctrl-C does, so that no child is left behind."""

import signal
import sys

from benchmarks.gpu.command import main

signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    status = main(sys.argv[1:])
except KeyboardInterrupt:
    sys.exit("cut off: what was measured is written")
sys.exit(status)
