#!/usr/bin/env bash
# TLS for NVMe/TCP with an independent peer: `openssl s_client` for the sessions, and a host in Python (nvme_tls.py) that
# derives keys from the specification. No kernel of Debian 12 can: its initiator has TLS from Linux 6.7 on, backports has
# such a one, but not the daemon for its handshakes (tlshd, of ktls-utils).
source "$(dirname "$0")/lib.sh"
requires openssl jq
requires_weft
NVME_LISTEN=$(free_port)
export NVME_PORT=config
prepare
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
HOSTNQN=nqn.2014-08.org.example:tls
OTHER=nqn.2014-08.org.example:other

# Has the server take mode $1.
configure() {
    cat >"$WORK/weft.toml" <<END
[nvme]
unknown_hosts = "loopback"
[nvme_tcp]
listen = ["127.0.0.1:$NVME_LISTEN"]
discovery = []
tls = "$1"
END
}

# Connects as the host with key $1; further arguments are options of nvme_tls.py.
host() {
    local key=$1
    shift
    "$HERE/nvme_tls.py" "$@" "$NVME_LISTEN" "$nqn" "$HOSTNQN" "$WORK/$key"
}

# The same, which must end with status $1.
host_refused() {
    local expected=$1 status=0
    shift
    host "$@" >"$WORK/refused" || status=$?
    [[ $status -eq $expected ]] || fail "status $status and not $expected with $*: $(cat "$WORK/refused")"
}

# Sends bytes in hex ($1) to the port; prints in hex what comes back until the node closes.
raw() {
    /usr/bin/python3 -c 'import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as s:
    s.sendall(bytes.fromhex(sys.argv[2]))
    received = b""
    try:
        while part := s.recv(4096):
            received += part
    except ConnectionResetError:
        pass
print(received.hex())' "$NVME_LISTEN" "$1"
}

# Connects in plain as $1; prints what becomes of it.
plain() {
    PYTHONPATH=$HERE /usr/bin/python3 -c 'import sys
from nvme_host import Queue, Refused, socket_to
try:
    Queue(socket_to(int(sys.argv[1]))).connect(0, 0xFFFF, sys.argv[2], sys.argv[3])
    print("connected")
except Refused:
    print("refused")
except ConnectionError:
    print("closed")' "$NVME_LISTEN" "${2:-$nqn}" "$1"
}

event() {
    weft event list -o json | jq -e --arg kind "$1" --arg word "$2" \
        '.[] | select(.kind == $kind and (.message | contains($word)))' >/dev/null ||
        fail "no event $1 with '$2': $(weft event list)"
}

configure optional
start_server
weft volume create disk --size 64MiB --block-size 512 >/dev/null
nqn=$(status .subsystem_nqn)
(umask 077 && for hash in none sha256 sha384; do
    "$WEFT" host key --tls --hash "$hash" >"$WORK/$hash"
done && "$WEFT" host key --tls >"$WORK/wrong")
refuses "$WEFT" host key --tls --hash sha512

say 'keys are taken from files, and shown by nothing'
weft host add "$HOSTNQN" --tls-key-file "$WORK/sha256" >"$WORK/shown"
{ weft host list && weft host list -o json && weft export show disk; } >>"$WORK/shown"
grep -qF 'yes (sha256)' "$WORK/shown" || fail "not shown: $(cat "$WORK/shown")"
grep -qF -- '--tls' "$WORK/shown" || fail "not in the export: $(cat "$WORK/shown")"

say 'sessions by openssl: every hash, both versions, keys as the standard and as libnvme derive them'
for key in sha256 sha384 none; do
    weft host set "$HOSTNQN" --tls-key-file "$WORK/$key" >>"$WORK/shown"
    for version in 0 1; do
        host "$key" --identity "$version"
        host "$key" --identity "$version" --libnvme
    done
done
for secret in sha256 sha384 none; do
    ! grep -qF "$(cut -d: -f3 "$WORK/$secret")" "$WORK/shown" "$LOG" || fail 'a key is shown'
done

say 'the suite follows the key; another group is asked for; the discovery log is encrypted too'
host none --suites TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256
host none --groups P-521:P-256
coproc HELD { host none --hold; }
held=$HELD_PID
read -r said <&"${HELD[0]}"
[[ $said == connected && $(weft connection list -o json | jq 'map(select(.tls)) | length') == 2 ]] ||
    fail "not listed as encrypted: $said, $(weft connection list)"
echo >&"${HELD[1]}"
wait "$held"
DISCOVERY=nqn.2014-08.org.nvmexpress.discovery
nqn=$DISCOVERY host none
host_refused 3 none --suites TLS_CHACHA20_POLY1305_SHA256
host_refused 3 none --suites TLS_AES_256_GCM_SHA384

say 'refused: another key, an unknown name, another name or subsystem than that of the key, a key that is taken away'
host_refused 3 wrong --identity 0
event host-authentication-failed 'another key'
host_refused 3 wrong
event host-authentication-failed NVMe1R01
HOSTNQN=$OTHER host_refused 3 none
event host-refused 'no key'
host_refused 4 none --as "$OTHER"
event host-authentication-failed 'by the TLS key of'
subsystem=$nqn
nqn=$DISCOVERY host_refused 4 none --to "$subsystem"
[[ $(plain "$HOSTNQN") == refused ]] || fail 'a host with a TLS key came without'
event host-authentication-failed 'does not use it'
[[ $(plain "$OTHER") == connected ]] || fail 'a host without a key cannot come in plain'
[[ $(plain "$HOSTNQN" "$DISCOVERY") == connected ]] || fail 'no discovery in plain'

say 'refused: what is no handshake, no PDU inside a session, TLS 1.2, a client without a key'
for garbage in 16 1603010005010000010000 16030100ff"$(printf '41%.0s' {1..255})" 160303000101; do
    case $(raw "$garbage$(printf '00%.0s' {1..20000})") in
    '' | 15*) ;;
    *) fail "an answer to $garbage" ;;
    esac
done
host_refused 3 none --prefix 160301
for version in -tls1_2 -tls1_3; do
    openssl s_client -connect "127.0.0.1:$NVME_LISTEN" "$version" -brief </dev/null >"$WORK/client" 2>&1 || true
    ! grep -q ESTABLISHED "$WORK/client" || fail "a session of $version: $(cat "$WORK/client")"
done

say 'authentication inside a session: both are asked for'
"$WEFT" host key >"$WORK/dhchap"
weft host set "$HOSTNQN" --dhchap-key-file "$WORK/dhchap" >/dev/null
host_refused 6 none
host none --dhchap "$WORK/dhchap"
weft host set "$HOSTNQN" --no-dhchap >/dev/null
host none

say 'required: nothing is served in plain; off: nothing in TLS'
stop_server
configure required
start_server
host none
[[ $(plain "$OTHER") == closed ]] || fail 'a plain connection was served'
[[ $(plain "$OTHER" "$DISCOVERY") == closed ]] || fail 'discovery was served in plain'
event host-refused 'does not encrypt'
stop_server
configure off
start_server
host_refused 3 none
[[ $(plain "$HOSTNQN") == refused ]] || fail 'a host with a TLS key came without'
weft host set "$HOSTNQN" --no-tls >/dev/null
[[ $(plain "$HOSTNQN") == connected ]] || fail 'a host whose key was taken away cannot come'
stop_server
