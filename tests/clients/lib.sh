# shellcheck shell=bash
# What every real-client test shares: a server of its own in a temporary directory, on a port and sockets of its own,
# stopped by pid when the test ends, however it ends.
#
# A test is a script that sources this file, opens with `requires tool...`, and exits 0 (passed), 77 (skipped, with the
# reason on its last line) or anything else (failed). Nothing but loopback is used.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # used by the tests
ROOT=$(cd "$HERE/../.." && pwd)
SERVER=${WEFT_SERVER:-weft}
WEFT=${WEFT:-$ROOT/target/release/weft}
export WEFT PYTHONDONTWRITEBYTECODE=1
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
for postgres in /usr/lib/postgresql/*/bin; do
    PATH="$PATH:$postgres"
done
STATUS_SKIPPED=77
START_LIMIT_S=20
STOP_LIMIT_S=20

# Further arguments of weft, for tests that configure it.
SERVER_ARGUMENTS=()
SERVER_PID=
WORK=
DATA=
PORT=
LOG=
TCP=
UNIX_SOCKET=

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
fi

say() {
    printf -- '-- %s\n' "$*"
}

skip() {
    echo "SKIPPED: $*"
    exit "$STATUS_SKIPPED"
}

# Fails the test, with the end of the server's log.
fail() {
    echo "FAILED: $*" >&2
    if [[ -n $LOG && -s $LOG ]]; then
        echo "the end of the server's log:" >&2
        tail -n 40 "$LOG" >&2
    fi
    exit 1
}

requires() {
    local tool
    for tool in "$@"; do
        case $tool in
        python:*) /usr/bin/python3 -c "import ${tool#python:}" 2>/dev/null ;;
        *) command -v "$tool" >/dev/null ;;
        esac || skip "$tool is not installed (scripts/install-test-tools)"
    done
    if [[ $SERVER == weft && ! -x $WEFT ]]; then
        fail "no binary $WEFT: cargo build --release first"
    fi
}

# Skips what only Weft promises, when the tests run against the reference server.
requires_weft() {
    [[ $SERVER == weft ]] || skip "$SERVER does not promise this"
}

# The system's python3, which has libnbd, whatever python3 comes first in PATH.
nbdsh() {
    /usr/bin/python3 -m nbd "$@"
}

free_port() {
    /usr/bin/python3 -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

# Replaced by tests that have more to stop; runs before the server is stopped.
before_cleanup() {
    :
}

cleanup() {
    local status=$?
    trap - EXIT
    before_cleanup || true
    kill_server
    if [[ -n $WORK ]]; then
        if [[ $status -ne 0 && $status -ne $STATUS_SKIPPED && -n ${KEEP:-} ]]; then
            echo "kept: $WORK" >&2
        else
            rm -rf "$WORK"
        fi
    fi
    exit "$status"
}

# Makes the test's directory and names its server's addresses; starts nothing.
prepare() {
    WORK=$(mktemp -d --suffix=-weft-test)
    trap cleanup EXIT
    trap 'exit 130' INT TERM
    DATA=$WORK/data
    LOG=$WORK/server.log
    PORT=$(free_port)
    TCP=nbd://127.0.0.1:$PORT
    UNIX_SOCKET=$DATA/nbd.sock
    mkdir -p "$DATA"
}

# The URI of volume $2 (default vol0) over tcp or unix ($1).
uri() {
    case $1 in
    tcp) echo "$TCP/${2:-vol0}" ;;
    unix) echo "nbd+unix:///${2:-vol0}?socket=$UNIX_SOCKET" ;;
    esac
}

server_answers() {
    nbdinfo --size "$(uri unix)" >/dev/null 2>&1 && nbdinfo --size "$(uri tcp)" >/dev/null 2>&1
}

# Starts the server on $DATA and waits until it serves vol0.
start_server() {
    local deadline=$((SECONDS + START_LIMIT_S))
    [[ -n $WORK ]] || prepare
    "$HERE/serve" "$DATA" "$PORT" "${SERVER_ARGUMENTS[@]}" >>"$LOG" 2>&1 &
    SERVER_PID=$!
    until server_answers; do
        kill -0 "$SERVER_PID" 2>/dev/null || { SERVER_PID= && fail "the server ended while it started"; }
        ((SECONDS < deadline)) || fail "the server does not serve vol0 within $START_LIMIT_S s"
        sleep 0.05
    done
}

# Stops the server the polite way and insists that it ends well and in time.
stop_server() {
    local deadline=$((SECONDS + STOP_LIMIT_S)) status=0
    kill -TERM "$SERVER_PID"
    while kill -0 "$SERVER_PID" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "the server still runs $STOP_LIMIT_S s after SIGTERM"
        sleep 0.05
    done
    wait "$SERVER_PID" || status=$?
    SERVER_PID=
    [[ $status -eq 0 || $SERVER != weft ]] || fail "the server ended with status $status after SIGTERM"
}

kill_server() {
    [[ -n $SERVER_PID ]] || return 0
    local child
    # The reference server has a second process for TCP, which would first wait for its hosts.
    for child in $(pgrep -P "$SERVER_PID"); do
        kill -KILL "$child" 2>/dev/null || true
    done
    kill -KILL "$SERVER_PID" 2>/dev/null || true
    wait "$SERVER_PID" 2>/dev/null || true
    SERVER_PID=
}

restart_server() {
    stop_server
    start_server
}

# Runs a command that must fail.
refuses() {
    if "$@" >"$WORK/refused" 2>&1; then
        cat "$WORK/refused" >&2
        fail "should have failed: $*"
    fi
}

weft() {
    "$WEFT" "$@" --data "$DATA"
}

create_volume() {
    local name=$1 size=$2
    case $SERVER in
    weft) weft volume create "$name" --size "$size" >/dev/null ;;
    nbdkit) truncate -s "${size%iB}" "$DATA/volumes/$name" ;;
    esac
}

# Prints what a jq filter finds in `weft status`.
status() {
    weft status -o json | jq -r "$1"
}
