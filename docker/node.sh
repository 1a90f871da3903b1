#!/usr/bin/env bash
# Starts a node. With RAY_USE_TLS=1 it first creates the node's own certificate. Then it runs the given command.
#
#   node.sh ray start --head ...          node.sh true     (an init container: creates only the certificate)
#
# Ray requires a certificate of the same authority from both sides of a connection, and the address that it connects to
# must be in that certificate. Addresses are known only when a node starts, so every node signs its own certificate and
# holds the authority's key. Protect this key like the token: whoever has either of them can run code on every node.
#
# Reads RAY_TLS_CA_CERT and RAY_TLS_CA_KEY (the authority) and NODE_NAMES (more names of this node, separated by spaces).
# Writes RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY.
set -euo pipefail

make_certificate() {
    local names="DNS:localhost,IP:127.0.0.1" name
    for name in $(hostname) ${NODE_NAMES:-}; do names+=",DNS:$name"; done
    for name in $(hostname -I); do names+=",IP:$name"; done
    umask 077
    openssl req -x509 -CA "$RAY_TLS_CA_CERT" -CAkey "$RAY_TLS_CA_KEY" -days 365 -subj "/O=vmoco/CN=node" \
        -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -addext "subjectAltName=$names" -addext "basicConstraints=critical,CA:FALSE" \
        -out "$RAY_TLS_SERVER_CERT" -keyout "$RAY_TLS_SERVER_KEY" 2>/dev/null || {
        echo "error: cannot create the certificate of this node: check that $RAY_TLS_CA_CERT and $RAY_TLS_CA_KEY (the authority)" \
            "can be read and $RAY_TLS_SERVER_CERT can be written" >&2
        exit 1
    }
}

if [[ ${RAY_USE_TLS:-0} == 1 ]]; then
    for variable in RAY_TLS_CA_CERT RAY_TLS_CA_KEY RAY_TLS_SERVER_CERT RAY_TLS_SERVER_KEY; do
        [[ -n ${!variable:-} ]] || {
            echo "error: RAY_USE_TLS is 1 but $variable is not set: set it to the path of its file" >&2
            exit 1
        }
    done
    make_certificate
fi
exec "$@"
