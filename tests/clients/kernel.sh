#!/usr/bin/env bash
# The Linux kernel's own NBD client, in the lab's guest, against a server on the host (tests/lab/nbd.sh).
source "$(dirname "$0")/lib.sh"
requires qemu-system-x86_64 busybox cpio nbd-client mkfs.ext4 mkfs.xfs nbdinfo
start_server
create_volume disk 1GiB

: >"$WORK/lab"
LAB_PID=
before_cleanup() {
    [[ -z $LAB_PID ]] || kill -TERM "$LAB_PID" 2>/dev/null || true
}

"$ROOT/scripts/lab" --time-limit 300 --file "$ROOT/scripts/attach" --file "$ROOT/scripts/detach" \
    --env HOST=10.0.2.2 --env "PORT=$PORT" --env VOLUME=disk "$ROOT/tests/lab/nbd.sh" >"$WORK/lab" 2>&1 &
LAB_PID=$!
# The guest asks for the server's death with a line of its output.
until grep -q '^KILL AND RESTART' "$WORK/lab" || ! kill -0 "$LAB_PID" 2>/dev/null; do
    sleep 0.2
done
if kill -0 "$LAB_PID" 2>/dev/null; then
    kill_server
    start_server
fi
status=0
wait "$LAB_PID" || status=$?
LAB_PID=
cat "$WORK/lab"
[[ $status -eq 0 ]] || fail "the lab ended with status $status"
stop_server
