#!/usr/bin/env bash
# kill -9 at random under a verified multi-connection load: after every restart each sector holds what was acknowledged
# last, or a change that was under way, and no request is torn.
#
# ROUNDS (default 50, about 2 s each) and SEED may be set.
source "$(dirname "$0")/lib.sh"
requires python:nbd
prepare
seed=${SEED:-$RANDOM}
say "reproduce the load with: SEED=$seed tests/clients/crash.sh"
/usr/bin/python3 "$HERE/crash.py" "$DATA" "$PORT" "${ROUNDS:-50}" "$seed" || fail 'see above'
