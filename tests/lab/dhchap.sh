#!/bin/sh
# The kernel's NVMe/TCP initiator and its DH-HMAC-CHAP, in the lab's guest: hosts with the right keys are served, others
# are not, and the kernel refuses a controller that has not the key.
#
# Runs in the guest. Variables: HOST and PORT, NQN, UUID (of the volume; what is on it is lost), HOSTNQN and HOSTID (of
# this host), KEY and CTRL_KEY (what the server was given), OTHER_KEY (of nobody), AGREEMENTS (hash/group, each to be
# tried). The host's side acts on lines that begin with ASK.
set -eu

step() {
    STEP=$*
    echo "== $STEP (at $(cut -d' ' -f1 /proc/uptime) s)"
}

fail() {
    echo "FAIL: $STEP: $*"
    dmesg | grep -iE 'nvme|dh' | tail -n 30
    exit 1
}

expect() {
    "$@" || fail "failed: $*"
}

# Waits up to 20 s for a command to succeed.
eventually() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "never came true: $*"
        sleep 0.1
    done
}

connect() {
    nvme connect -t tcp -a "$HOST" -s "$PORT" -n "$NQN" --hostnqn "$HOSTNQN" --hostid "$HOSTID" --nr-io-queues 2 "$@"
}

# Connects in a way that must fail, and for the reason that the kernel's log gives.
refused() {
    reason=$1
    shift
    dmesg -c >/dev/null
    ! connect "$@" >/tmp/connect 2>&1 || fail "connected: $*"
    expect logged "$reason"
    [ "$(echo /sys/class/nvme/nvme*)" = '/sys/class/nvme/nvme*' ] || fail 'a controller is left'
}

logged() {
    dmesg | grep -qF "$1" || { echo "not logged: $1" && return 1; }
}

attached() {
    for found in /sys/block/nvme*n*; do
        case $found in
        *nvme*c*n*) continue ;;
        esac
        if [ "$(cat "$found/uuid" 2>/dev/null)" = "$UUID" ]; then
            DEVICE=/dev/${found##*/}
            return 0
        fi
    done
    return 1
}

# Whether the server is there by its configuration number $1, which it advertises as a port: until it has been restarted,
# the one before answers.
serves() {
    nvme discover -t tcp -a "$HOST" -s "$PORT" --hostnqn "$HOSTNQN" --hostid "$HOSTID" >/tmp/discovery 2>&1
    grep -q "trsvcid: *$1\$" /tmp/discovery
}

live() {
    [ "$(cat /sys/class/nvme/nvme*/state)" = live ]
}

# Writes random bytes and reads them back.
verify() {
    eventually attached
    attached
    dd if=/dev/urandom of=/tmp/sample bs=64k count=16 status=none
    expect dd if=/tmp/sample of="$DEVICE" bs=64k oflag=direct status=none
    dd if="$DEVICE" bs=64k count=16 iflag=direct status=none | expect cmp - /tmp/sample
}

STEP='start'
step "discovery needs no key ($(uname -r))"
nvme discover -t tcp -a "$HOST" -s "$PORT" --hostnqn "$HOSTNQN" --hostid "$HOSTID" >/tmp/discovery || fail 'discover'
expect grep -q "subnqn: *$NQN" /tmp/discovery

step 'no key, or another one: refused'
refused 'qid 0: no key'
refused 'qid 0: authentication failed' --dhchap-secret "$OTHER_KEY"

number=1
for agreed in $AGREEMENTS; do
    step "the right key, by $agreed"
    number=$((number + 1))
    echo "ASK $agreed"
    eventually serves "$number"
    dmesg -c >/dev/null
    expect connect --dhchap-secret "$KEY" >/dev/null
    expect logged "authenticated with hash hmac(${agreed%/*}) dhgroup ${agreed#*/}"
    verify
    expect nvme disconnect -n "$NQN" >/dev/null
done

step 'both ways'
dmesg -c >/dev/null
expect connect --dhchap-secret "$KEY" --dhchap-ctrl-secret "$CTRL_KEY" >/dev/null
expect logged 'qid 0: controller authenticated'
verify

step 'authenticated anew while it is served'
set -- /sys/class/nvme/nvme*
dmesg -c >/dev/null
echo "$KEY" >"$1/dhchap_secret"
eventually logged 'qid 0: controller authenticated'
verify

step 'authenticated anew after a reset'
dmesg -c >/dev/null
expect nvme reset "/dev/${1##*/}"
eventually live
expect logged 'qid 0: controller authenticated'
verify
expect nvme disconnect -n "$NQN" >/dev/null

step 'a controller that has another key: refused by the kernel'
refused 'controller authentication failed' --dhchap-secret "$KEY" --dhchap-ctrl-secret "$OTHER_KEY"

step 'the keys are changed'
echo 'ASK CHANGE'
eventually connect --dhchap-secret "$OTHER_KEY"
verify
expect nvme disconnect -n "$NQN" >/dev/null
refused 'qid 0: authentication failed' --dhchap-secret "$KEY"

step 'the keys are taken away'
echo 'ASK CLEAR'
eventually connect
verify
expect nvme disconnect -n "$NQN" >/dev/null
step 'end'
