#!/usr/bin/env bash
# nbdcopy: a file into a volume and back, and volume to volume, with several connections and sparseness detected.
source "$(dirname "$0")/lib.sh"
requires nbdcopy nbdinfo
start_server

say 'a source of random bytes, text, zeroes and a hole'
head -c 64M /dev/urandom >"$WORK/source"
seq 1 6000000 >>"$WORK/source"
head -c 20M /dev/zero >>"$WORK/source"
truncate -s 256M "$WORK/source"
create_volume copy 256MiB
create_volume again 256MiB

say 'file to volume over tcp, volume to file over the Unix socket'
nbdcopy --connections=4 --requests=64 "$WORK/source" "$(uri tcp copy)"
nbdcopy --connections=4 "$(uri unix copy)" "$WORK/back"
cmp "$WORK/source" "$WORK/back" || fail 'other bytes came back'

say 'volume to volume, without asking for holes; a second pass over data that is there'
nbdcopy --allocated "$(uri tcp copy)" "$(uri unix again)"
nbdcopy --synchronous "$(uri tcp copy)" "$(uri unix again)"
restart_server
nbdcopy --no-extents "$(uri unix again)" - | cmp - "$WORK/source" || fail 'other bytes after a restart'

say 'nothing written to the volume next to it'
[[ $(nbdinfo --map --totals "$(uri tcp)" | awk '{ print $1 }') -eq 8589934592 ]] || fail 'vol0 was written to'
stop_server
