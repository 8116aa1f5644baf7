#!/usr/bin/env bash
# libnbd, command by command: replies of every kind, flags, errors, block status, resize.
source "$(dirname "$0")/lib.sh"
requires python:nbd nbdinfo
start_server
create_volume odd 100MiB
/usr/bin/python3 "$HERE/commands.py" "$SERVER" "$(uri tcp)" || fail 'over tcp, see above'
/usr/bin/python3 "$HERE/commands.py" "$SERVER" "$(uri unix)" || fail 'over the Unix socket, see above'

say 'resize: seen by a connection made afterwards'
[[ $(nbdinfo --size "$(uri tcp odd)") -eq 104857600 ]] || fail 'size before'
case $SERVER in
weft) weft volume resize odd --size 200MiB >/dev/null ;;
*) truncate -s 200M "$DATA/volumes/odd" ;;
esac
[[ $(nbdinfo --size "$(uri tcp odd)") -eq 209715200 ]] || fail 'size after'
nbdsh -u "$(uri tcp odd)" -c 'h.pwrite(b"end!" * 1024, 209715200 - 4096)' \
    -c 'assert h.pread(4096, 209715200 - 4096) == b"end!" * 1024'
if [[ $SERVER == weft ]]; then
    say 'delete: no longer served, and the name is free'
    weft volume delete odd >/dev/null
    refuses nbdinfo --size "$(uri tcp odd)"
    create_volume odd 100MiB
    nbdsh -u "$(uri tcp odd)" -c 'assert h.pread(1 << 20, 0) == bytes(1 << 20)'
fi
stop_server
