#!/bin/bash
# One rank: runs "$@" with the signals that ask it to stop held back until it can answer them. Importing Python takes
# seconds, in which a signal would end the process and look like a crash. megaboat lets them through (engine/stop.py).
trap '' USR1 USR2 TERM
hold=--block-signal=USR1,USR2,TERM
env "$hold" true 2>/dev/null && exec env "$hold" "$@"
exec "$@" # coreutils before 8.31: a signal in these seconds has no effect
