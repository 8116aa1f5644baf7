#!/usr/bin/env bash
# TLS over TCP: a certificate that is verified, a wrong name and a wrong issuer refused, plain text refused.
source "$(dirname "$0")/lib.sh"
requires certtool openssl nbdinfo nbdcopy python:nbd
requires_weft
prepare
mkdir "$WORK/tls" "$WORK/other"

# certtool writes about half of its ECDSA keys in a form that rustls refuses.
make_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

# Makes an issuer and a certificate for localhost in directory $1.
make_certificates() {
    local dir=$1
    printf 'cn = "issuer"\nca\ncert_signing_key\nexpiration_days = 10\n' >"$dir/ca.info"
    printf 'cn = "localhost"\ndns_name = "localhost"\nip_address = "127.0.0.1"\ntls_www_server\nsigning_key\nencryption_key\nexpiration_days = 10\n' \
        >"$dir/server.info"
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

# Writes the configuration: mode $1, client certificates asked for if $2 is true.
configure() {
    cat >"$WORK/weft.toml" <<END
[nbd.tls]
mode = "$1"
certificate = "$WORK/tls/server-cert.pem"
key = "$WORK/tls/server-key.pem"
$($2 && echo "client_ca = \"$WORK/tls/ca-cert.pem\"")
END
}

# Like lib.sh's, but over the Unix socket alone, which needs no TLS.
server_answers() {
    nbdinfo --size "$(uri unix)" >/dev/null 2>&1
}

make_certificates "$WORK/tls"
make_certificates "$WORK/other"
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

say 'a wrong issuer is refused by the client'
refuses info "$secure?tls-certificates=$WORK/other"
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
