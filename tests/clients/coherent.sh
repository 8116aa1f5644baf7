#!/usr/bin/env bash
# One volume through both front ends at once: what one connection was answered, every other sees.
source "$(dirname "$0")/lib.sh"
requires python:nbd
start_server
say 'writes through one connection, reads through another, in turn and under load'
/usr/bin/python3 "$HERE/coherent.py" "$(uri tcp)" "$(uri unix)" || fail 'see above'
stop_server
