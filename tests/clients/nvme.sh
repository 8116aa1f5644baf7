#!/usr/bin/env bash
# The Linux kernel's own NVMe/TCP initiator, in the lab's guest, against a server on the host (tests/lab/nvme.sh).
source "$(dirname "$0")/lib.sh"
requires qemu-system-x86_64 busybox cpio nbd-client nvme mkfs.ext4 mkfs.xfs nbdinfo jq
requires_weft
FIRST_PORT=$(free_port)
SECOND_PORT=$(free_port)
RELAY_PORT=$(free_port)
export NVME_PORT=config
prepare
# The host's 127.0.0.1 is 10.0.2.2 in the guest, and connect-all follows the discovery log. The second listener is
# reached through a relay, so that this path can be cut.
cat >"$WORK/weft.toml" <<END
[nvme_tcp]
listen = ["127.0.0.1:$FIRST_PORT", "127.0.0.1:$SECOND_PORT"]
discovery = []
advertise = ["10.0.2.2:$FIRST_PORT"]
END
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
start_server
weft volume create disk --size 1GiB --block-size 512 >/dev/null
nqn=$(status .subsystem_nqn)
uuid=$(weft volume show disk -o json | jq -r .uuid)

: >"$WORK/lab"
LAB_PID=
RELAY_PID=
before_cleanup() {
    [[ -z $LAB_PID ]] || kill -TERM "$LAB_PID" 2>/dev/null || true
    cut_path
}

open_path() {
    "$HERE/relay.py" "$RELAY_PORT" "$SECOND_PORT" &
    RELAY_PID=$!
}

cut_path() {
    # Also if it is stopped.
    [[ -z $RELAY_PID ]] || kill -KILL "$RELAY_PID" 2>/dev/null || true
    RELAY_PID=
}
open_path

# What an administrator would paste, with this host's names and address in it.
HOSTID=0e5a5d0e-2f6b-4c57-9f0a-6a3f6f0c1d2e
HOSTNQN=nqn.2014-08.org.nvmexpress:uuid:$HOSTID
weft export show disk -o json | jq -c '.nvme[0].config_json' |
    sed "s/127\.0\.0\.1/10.0.2.2/; s/HOSTNQN/$HOSTNQN/; s/HOSTID/$HOSTID/" >"$WORK/config.json"

"$ROOT/scripts/lab" --time-limit 560 --file "$ROOT/scripts/attach" --file "$ROOT/scripts/detach" \
    --file "$WORK/config.json" --env "HOSTID=$HOSTID" --env "HOSTNQN=$HOSTNQN" \
    --env HOST=10.0.2.2 --env "PORT=$FIRST_PORT" --env "OTHER_PORT=$RELAY_PORT" --env "NBD_PORT=$PORT" --env VOLUME=disk \
    --env "NQN=$nqn" --env "UUID=$uuid" "$ROOT/tests/lab/nvme.sh" >"$WORK/lab" 2>&1 &
LAB_PID=$!

# Waits until the guest asks for $1, or has ended.
asked() {
    until grep -q "^ASK $1" "$WORK/lab" || ! kill -0 "$LAB_PID" 2>/dev/null; do
        sleep 0.2
    done
    kill -0 "$LAB_PID" 2>/dev/null
}

if asked GROW; then
    weft volume resize disk --size 2GiB >/dev/null
fi
if asked CREATE; then
    weft volume create passing --size 64MiB --block-size 4096 >/dev/null
fi
if asked DELETE; then
    weft volume delete passing >/dev/null
fi
if asked MASK; then
    weft host add nqn.2026-01.org.example:another >/dev/null
    weft volume hosts disk --only nqn.2026-01.org.example:another >/dev/null
fi
if asked UNMASK; then
    weft volume hosts disk --all >/dev/null
fi
if asked CUT; then
    cut_path
fi
if asked MEND; then
    open_path
fi
if asked SILENCE; then
    kill -STOP "$RELAY_PID"
fi
silent_hosts() {
    weft event list -o json | jq '[.[] | select(.kind == "host-silent") | .count] | add // 0'
}
if asked SPEECH; then
    # The controller was let go, and what the host held through it.
    deadline=$((SECONDS + 30))
    until (($(silent_hosts) > 0)); do
        ((SECONDS < deadline)) || fail 'the target did not miss the silent host'
        sleep 0.5
    done
    kill -CONT "$RELAY_PID"
fi
if asked 'KILL AND'; then
    kill_server
    start_server
fi
if asked 'KILL WHILE'; then
    kill_server
    start_server
fi
if asked RELEASE; then
    weft volume show disk | grep -q '^reserved  *write exclusive, by' || fail "no word of it: $(weft volume show disk)"
    weft volume release disk >/dev/null
fi
status=0
wait "$LAB_PID" || status=$?
LAB_PID=
cat "$WORK/lab"
[[ $status -eq 0 ]] || fail "the lab ended with status $status"
stop_server
