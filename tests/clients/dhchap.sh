#!/usr/bin/env bash
# DH-HMAC-CHAP with hosts that are not ours: one in Python, written from the specification (dhchap.py), and the Linux
# kernel's, in the lab's guest (tests/lab/dhchap.sh). Debian 12's own kernel is built without it, so the guest boots the
# one of backports; where that cannot be had, the stage says so loudly and the Python host is the proof.
source "$(dirname "$0")/lib.sh"
requires qemu-system-x86_64 busybox cpio nvme jq
requires_weft
NVME_LISTEN=$(free_port)
export NVME_PORT=config
prepare
HOSTID=0e5a5d0e-2f6b-4c57-9f0a-6a3f6f0c1d2e
HOSTNQN=nqn.2014-08.org.nvmexpress:uuid:$HOSTID
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
# hash/group, as the kernel logs them. Larger groups work too, but in software emulation its powers take up to 20 s a
# queue, which is close to what the node waits.
AGREED='sha512/ffdhe3072 sha256/ffdhe2048 sha384/null'
AGREED_LARGE='sha256/ffdhe4096 sha384/ffdhe6144 sha512/ffdhe8192'

LAB_PID=
before_cleanup() {
    [[ -z $LAB_PID ]] || kill -TERM "$LAB_PID" 2>/dev/null || true
}

# Has the server agree on hash $1 and group $2 only. What it advertises besides its address, port $3, tells the guest by
# which configuration it serves.
configure() {
    cat >"$WORK/weft.toml" <<END
[nvme]
unknown_hosts = "refused"
dhchap_hashes = ["$1"]
dhchap_groups = ["$2"]
[nvme_tcp]
listen = ["127.0.0.1:$NVME_LISTEN"]
discovery = []
advertise = ["10.0.2.2:$NVME_LISTEN", "10.0.2.2:${3:-1}"]
END
}

host() {
    "$HERE/dhchap.py" "$NVME_LISTEN" "$nqn" "$HOSTNQN" "$@"
}

# Runs the Python host in a way that must end with status 3: not authenticated.
host_refused() {
    local status=0
    host "$@" >"$WORK/refused" || status=$?
    [[ $status -eq 3 ]] || fail "status $status and not 3 with $*: $(cat "$WORK/refused")"
}

configure sha512 ffdhe8192
start_server
weft volume create disk --size 256MiB --block-size 512 >/dev/null
nqn=$(status .subsystem_nqn)
uuid=$(weft volume show disk -o json | jq -r .uuid)
(umask 077 && "$WEFT" host key --hash sha256 >"$WORK/key" && "$WEFT" host key --hash sha512 >"$WORK/ctrl" &&
    nvme gen-dhchap-key --hmac=2 --nqn="$HOSTNQN" >"$WORK/other")

say 'keys are taken from files, and shown by nothing'
weft host add "$HOSTNQN" --dhchap-key-file "$WORK/key" --dhchap-ctrl-key-file "$WORK/ctrl" >"$WORK/shown"
weft host list >>"$WORK/shown"
weft host list -o json >>"$WORK/shown"
weft host list | grep -qF 'host (sha256) + ctrl (sha512)' || fail "not shown: $(weft host list)"
for secret in "$WORK/key" "$WORK/ctrl"; do
    ! grep -qF "$(cut -d: -f3 "$secret")" "$WORK/shown" "$LOG" || fail 'a key is shown'
done
sed 's/..:$/xx:/' "$WORK/key" >"$WORK/damaged"
refuses weft host set "$HOSTNQN" --dhchap-key-file "$WORK/damaged"

say 'a host in Python, every hash with every group'
for agreed in $AGREED $AGREED_LARGE; do
    stop_server
    configure "${agreed%/*}" "${agreed#*/}"
    start_server
    host "$WORK/key"
    host "$WORK/key" "$WORK/ctrl"
    host_refused "$WORK/other"
    host_refused "$WORK/key" "$WORK/other"
done
weft event list -o json | jq -e '.[] | select(.kind == "host-authentication-failed")' >/dev/null ||
    fail "no event: $(weft event list)"

if ! "$ROOT/scripts/lab" --kernel backports --prepare >"$WORK/prepare" 2>&1; then
    cat "$WORK/prepare"
    skip "the kernel's initiator: no kernel that can authenticate is to be had (backports of this Debian); the host in" \
        "Python has proven all of the above"
fi
# shellcheck disable=SC2086 # the first of the list
configure "$(cut -d/ -f1 <<<${AGREED%% *})" "$(cut -d/ -f2 <<<${AGREED%% *})"
restart_server
: >"$WORK/lab"
"$ROOT/scripts/lab" --kernel backports --time-limit 240 --env "HOSTID=$HOSTID" --env "HOSTNQN=$HOSTNQN" \
    --env HOST=10.0.2.2 --env "PORT=$NVME_LISTEN" --env "NQN=$nqn" --env "UUID=$uuid" --env "AGREEMENTS=$AGREED" \
    --env "KEY=$(cat "$WORK/key")" --env "CTRL_KEY=$(cat "$WORK/ctrl")" --env "OTHER_KEY=$(cat "$WORK/other")" \
    "$ROOT/tests/lab/dhchap.sh" >"$WORK/lab" 2>&1 &
LAB_PID=$!

# Waits until the guest asks for $1, or has ended.
asked() {
    until grep -q "^ASK $1" "$WORK/lab" || ! kill -0 "$LAB_PID" 2>/dev/null; do
        sleep 0.1
    done
    kill -0 "$LAB_PID" 2>/dev/null
}

number=1
for agreed in $AGREED; do
    number=$((number + 1))
    if asked "$agreed"; then
        configure "${agreed%/*}" "${agreed#*/}" "$number"
        restart_server
    fi
done
if asked CHANGE; then
    weft host set "$HOSTNQN" --dhchap-key-file "$WORK/other" >/dev/null
fi
if asked CLEAR; then
    weft host set "$HOSTNQN" --no-dhchap >/dev/null
fi
status=0
wait "$LAB_PID" || status=$?
LAB_PID=
cat "$WORK/lab"
[[ $status -eq 0 ]] || fail "the lab ended with status $status"
stop_server
