#!/usr/bin/env bash
# A full pod answers ENOSPC, still reads, and takes writes again after a discard, also across a kill.
source "$(dirname "$0")/lib.sh"
requires python:nbd nbdinfo
requires_weft
prepare
cat >"$WORK/weft.toml" <<'END'
[pod]
device_size = "256MiB"
journal_size = "16MiB"
END
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
start_server
for round in 1 2; do
    say "fill, discard, write again: round $round"
    /usr/bin/python3 "$HERE/full.py" fill "$(uri unix)" || fail 'see above'
    say 'the same after a kill'
    kill_server
    start_server
    /usr/bin/python3 "$HERE/full.py" recover "$(uri tcp)" || fail 'see above'
done
stop_server
