#!/usr/bin/env bash
# TLS over TCP: a certificate that is verified, a wrong name and a wrong issuer refused, plain text refused; then keys
# that both ends have, with libnbd and qemu.
source "$(dirname "$0")/lib.sh"
requires certtool psktool openssl nbdinfo nbdcopy qemu-img jq python:nbd
requires_weft
prepare

# certtool writes about half of its ECDSA keys in a form that rustls refuses.
make_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

# Makes an issuer and a certificate for 127.0.0.1 and the name $2 in directory $1.
make_certificates() {
    local dir=$1 name=$2
    mkdir "$dir"
    printf 'cn = "issuer"\nca\ncert_signing_key\nexpiration_days = 10\n' >"$dir/ca.info"
    printf 'cn = "%s"\ndns_name = "%s"\nip_address = "127.0.0.1"\ntls_www_server\nsigning_key\nencryption_key\nexpiration_days = 10\n' \
        "$name" "$name" >"$dir/server.info"
    printf 'cn = "host"\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days = 10\n' >"$dir/client.info"
    make_key "$dir/ca-key.pem"
    certtool --generate-self-signed --load-privkey "$dir/ca-key.pem" --template "$dir/ca.info" \
        --outfile "$dir/ca-cert.pem" 2>/dev/null
    for who in server client; do
        make_key "$dir/$who-key.pem"
        certtool --generate-certificate --load-ca-certificate "$dir/ca-cert.pem" --load-ca-privkey "$dir/ca-key.pem" \
            --load-privkey "$dir/$who-key.pem" --template "$dir/$who.info" --outfile "$dir/$who-cert.pem" 2>/dev/null
    done
}

# Writes the configuration: mode $1, client certificates asked for if $2 is true, certificates of directory $3.
configure() {
    local dir=${3:-$WORK/tls}
    cat >"$WORK/weft.toml" <<END
[nbd.tls]
mode = "$1"
certificate = "$dir/server-cert.pem"
key = "$dir/server-key.pem"
$($2 && echo "client_ca = \"$dir/ca-cert.pem\"")
END
}

# Like lib.sh's, but over the Unix socket alone, which needs no TLS.
server_answers() {
    nbdinfo --size "$(uri unix)" >/dev/null 2>&1
}

make_certificates "$WORK/tls" localhost
make_certificates "$WORK/other" localhost
make_certificates "$WORK/elsewhere" elsewhere
SERVER_ARGUMENTS=(--config "$WORK/weft.toml")
certificates="tls-certificates=$WORK/tls"
secure=nbds://localhost:$PORT/vol0

# A client's certificate directory holds ca-cert.pem, client-cert.pem and client-key.pem.
info() {
    nbdinfo --size "$@"
}

say 'optional: TLS and plain text side by side'
configure optional false
start_server
[[ $(info "$secure?$certificates") -eq 8589934592 ]] || fail 'TLS'
[[ $(info "$(uri tcp)") -eq 8589934592 ]] || fail 'plain text'
head -c 32M /dev/urandom >"$WORK/source"
create_volume small 32MiB
nbdcopy "$WORK/source" "nbds://localhost:$PORT/small?$certificates"
nbdcopy "$(uri unix small)" - | cmp - "$WORK/source" || fail 'other bytes than were written over TLS'

say 'the lines that the node has ready'
for field in info image; do
    line=$(weft export show vol0 -o json | jq -r ".nbd[] | select(.tls) | .$field")
    bash -c "${line//\/etc\/pki\/weft/$WORK\/tls}" >"$WORK/line" 2>&1 || fail "$line: $(cat "$WORK/line")"
done

say 'a wrong issuer is refused by the client'
refuses info "$secure?tls-certificates=$WORK/other"
stop_server

say 'a wrong name is refused by the client'
configure required false "$WORK/elsewhere"
start_server
refuses info "$secure?tls-certificates=$WORK/elsewhere"
# Nothing else is wrong with it: the address is right.
[[ $(info "nbds://127.0.0.1:$PORT/vol0?tls-certificates=$WORK/elsewhere") -eq 8589934592 ]] || fail 'TLS by address'
stop_server

say 'required: plain text is refused, the server lives on'
configure required false
start_server
refuses info "$(uri tcp)"
[[ $(info "$secure?$certificates") -eq 8589934592 ]] || fail 'TLS'
stop_server

say 'client certificates'
configure required true
start_server
[[ $(info "$secure?$certificates") -eq 8589934592 ]] || fail 'TLS with a client certificate'
mkdir "$WORK/stranger"
cp "$WORK"/other/client-*.pem "$WORK/tls/ca-cert.pem" "$WORK/stranger/"
refuses info "$secure?tls-certificates=$WORK/stranger"
[[ $(info "$secure?$certificates") -eq 8589934592 ]] || fail 'the server does not live on'
stop_server

# Connects as $1 with the key in file $2.
info_by_key() {
    info "nbds://$1@localhost:$PORT/vol0?tls-psk-file=$2"
}

say 'keys instead of certificates'
mkdir "$WORK/qemu"
psktool --username alice --pskfile "$WORK/keys.psk" >/dev/null
psktool --username mallory --pskfile "$WORK/mallory.psk" >/dev/null
sed 's/^mallory/alice/' "$WORK/mallory.psk" >"$WORK/wrong.psk"
cp "$WORK/keys.psk" "$WORK/qemu/keys.psk"
printf '[nbd.tls]\nmode = "required"\npsk_file = "%s"\n' "$WORK/keys.psk" >"$WORK/weft.toml"
start_server
[[ $(info_by_key alice "$WORK/keys.psk") -eq 8589934592 ]] || fail 'TLS with a key'
create_volume keyed 32MiB
nbdcopy "$WORK/source" "nbds://alice@localhost:$PORT/keyed?tls-psk-file=$WORK/keys.psk"
nbdcopy "$(uri unix keyed)" - | cmp - "$WORK/source" || fail 'other bytes than were written with a key'
qemu-img convert -O raw --object "tls-creds-psk,id=key,dir=$WORK/qemu,username=alice,endpoint=client" --image-opts \
    "driver=nbd,server.type=inet,server.host=localhost,server.port=$PORT,export=keyed,tls-creds=key" "$WORK/read" 2>"$WORK/qemu.log" ||
    fail "qemu with a key: $(cat "$WORK/qemu.log")"
cmp "$WORK/read" "$WORK/source" || fail 'other bytes than were written, by qemu with a key'

say 'a wrong key, an unknown name, a certificate and plain text are refused'
refuses info_by_key alice "$WORK/wrong.psk"
refuses info_by_key mallory "$WORK/mallory.psk"
refuses info "$secure?$certificates"
refuses info "$(uri tcp)"

say 'a key that is taken out of the file is refused from the reload on'
grep -v '^alice' "$WORK/keys.psk" >"$WORK/keys.new" || true
cat "$WORK/mallory.psk" "$WORK/keys.new" >"$WORK/keys.psk"
weft reload >/dev/null
refuses info_by_key alice "$WORK/qemu/keys.psk"
[[ $(info_by_key mallory "$WORK/mallory.psk") -eq 8589934592 ]] || fail 'the key that was added'
chmod 644 "$WORK/keys.psk"
refuses weft reload
[[ $(info_by_key mallory "$WORK/mallory.psk") -eq 8589934592 ]] || fail 'a wrong file replaced the right one'
stop_server
