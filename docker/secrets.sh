#!/usr/bin/env bash
# Draws every secret of a cluster anew and prints them in the form that a place wants. Nothing is kept here.
#
#   docker/secrets.sh compose > docker/.env                      for docker/compose.yaml
#   docker/secrets.sh kubernetes | kubectl -n vmoco create -f -   for cluster/kubernetes/
#   docker/secrets.sh machines FOLDER                            files for cluster/machines/: node.env for every node,
#                                                                client.env for who submits, tracker.env for the tracker
#
# DOOR_NAMES: names and addresses, separated by spaces, by which people reach the job server and the tracker; localhost
# and 127.0.0.1 are always among them.
set -euo pipefail
umask 077

fail() {
    echo "error: $*" >&2
    exit 1
}

form=${1:-}
[[ $form =~ ^(compose|kubernetes|machines)$ ]] || fail "'$form' is no form: say compose, kubernetes or machines"
command -v openssl >/dev/null || fail "openssl is missing: install it"
if [[ $form == machines ]]; then
    folder=${2:-}
    [[ -n $folder ]] || fail "machines needs a folder: docker/secrets.sh machines FOLDER"
    [[ ! -e $folder/token ]] || fail "$folder/token is there already: name another folder, or remove it to draw anew"
    mkdir -p "$folder"
else
    # A pipe that is a terminal would leave every secret on the screen.
    [[ ! -t 1 ]] || fail "the secrets would be shown on this terminal: send them to a file or to kubectl, as in the head of $0"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

key() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "$@" 2>/dev/null; }
word() { openssl rand -hex "${1:-24}" | tr -d '\n'; }

key -days 3650 -subj "/O=vmoco/CN=authority" -out "$folder/ca.crt" -keyout "$folder/ca.key"
names="DNS:localhost,IP:127.0.0.1,DNS:door"
for name in ${DOOR_NAMES:-}; do
    if [[ $name =~ ^[0-9.]+$|: ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done
key -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -days 825 -subj "/O=vmoco/CN=door" -addext "subjectAltName=$names" \
    -addext "basicConstraints=critical,CA:FALSE" -out "$folder/door.crt" -keyout "$folder/door.key"
token=$(word 32)
postgres=$(word) admin=$(word) tracker=$(word) flask=$(word 32)
store_admin=$(word 10) store_admin_secret=$(word) store_nodes=$(word 10) store_nodes_secret=$(word)
store_tracker=$(word 10) store_tracker_secret=$(word)

# What each key may do in the store: nodes read and write data and runs, the tracker its artifacts, nobody else's.
store_json() {
    identity() { # name, key, secret, actions
        printf '{"name":"%s","credentials":[{"accessKey":"%s","secretKey":"%s"}],"actions":[%s]}' "$@"
    }
    local on='"Read:%s","Write:%s","List:%s","Tagging:%s"' nodes artifacts
    nodes=${on//%s/vmoco} artifacts=${on//%s/mlflow}
    printf '{"identities":[%s,%s,%s]}' \
        "$(identity admin "$store_admin" "$store_admin_secret" '"Admin","Read","Write","List","Tagging"')" \
        "$(identity nodes "$store_nodes" "$store_nodes_secret" "$nodes")" \
        "$(identity tracker "$store_tracker" "$store_tracker_secret" "$artifacts")"
}

compose() {
    cat <<END
# Drawn by docker/secrets.sh on $(date -u +%F). Whoever reads this file owns the cluster: never commit it.
RAY_TOKEN='$token'
CA_CERTIFICATE='$(<"$folder/ca.crt")'
CA_KEY='$(<"$folder/ca.key")'
DOOR_CERTIFICATE='$(<"$folder/door.crt")'
DOOR_KEY='$(<"$folder/door.key")'
DOOR_HOSTS='$(door_hosts)'
POSTGRES_PASSWORD='$postgres'
TRACKER_ADMIN_PASSWORD='$admin'
TRACKER_PASSWORD='$tracker'
TRACKER_SESSION_KEY='$flask'
STORE_IDENTITIES='$(store_json)'
STORE_ADMIN_KEY='$store_admin'
STORE_ADMIN_SECRET='$store_admin_secret'
STORE_NODES_KEY='$store_nodes'
STORE_NODES_SECRET='$store_nodes_secret'
STORE_TRACKER_KEY='$store_tracker'
STORE_TRACKER_SECRET='$store_tracker_secret'
END
}

# One Secret for each role, so that a pod sees only what it needs.
kubernetes() {
    secret() { # name, then key and value in turn
        printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\ntype: Opaque\ndata:\n' "$1"
        shift
        while (($#)); do
            printf '  %s: %s\n' "$1" "$(printf %s "$2" | base64 | tr -d '\n')"
            shift 2
        done
    }
    secret ray-token auth_token "$token"
    secret authority ca.crt "$(<"$folder/ca.crt")" ca.key "$(<"$folder/ca.key")"
    secret authority-certificate ca.crt "$(<"$folder/ca.crt")"
    secret door tls.crt "$(<"$folder/door.crt")" tls.key "$(<"$folder/door.key")"
    secret postgres password "$postgres"
    secret tracker admin-password "$admin" session-key "$flask"
    secret tracker-user username vmoco password "$tracker"
    secret store-identities s3.json "$(store_json)"
    secret store-admin key "$store_admin" secret "$store_admin_secret"
    secret store-nodes key "$store_nodes" secret "$store_nodes_secret"
    secret store-tracker key "$store_tracker" secret "$store_tracker_secret"
}

# Each *.env finds the other files beside itself, so the folder may lie anywhere.
machines() {
    local here='here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")' door=${DOOR_NAMES:-localhost}
    door=${door%% *}
    printf %s "$token" >"$folder/token"
    cat >"$folder/client.env" <<END
# For who submits jobs and pulls encoders: source it. Beside it lie token and ca.crt.
$here
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\$here/token
export RAY_API_SERVER_ADDRESS=https://$door:8443 REQUESTS_CA_BUNDLE=\$here/ca.crt
export MLFLOW_TRACKING_URI=https://$door:5443 MLFLOW_TRACKING_SERVER_CERT_PATH=\$here/ca.crt
export MLFLOW_TRACKING_USERNAME=vmoco MLFLOW_TRACKING_PASSWORD=$tracker
END
    cat >"$folder/node.env" <<END
# For every node: source it before \`ray start\`. Beside it lie token, ca.crt and ca.key.
$here
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\$here/token RAY_USE_TLS=1
export RAY_TLS_CA_CERT=\$here/ca.crt RAY_TLS_CA_KEY=\$here/ca.key
export RAY_TLS_SERVER_CERT=\$here/node.crt RAY_TLS_SERVER_KEY=\$here/node.key
export RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=60 RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2
export RAY_API_SERVER_ADDRESS=https://$door:8443
export MLFLOW_TRACKING_URI=https://$door:5443 MLFLOW_TRACKING_SERVER_CERT_PATH=\$here/ca.crt
export MLFLOW_TRACKING_USERNAME=vmoco MLFLOW_TRACKING_PASSWORD=$tracker
END
    cat >"$folder/tracker.env" <<END
# For the machine of the tracker alone: its database, its administrator, the door.
$here
export PGHOST=localhost PGUSER=mlflow PGPASSWORD=$postgres
export MLFLOW_AUTH_ADMIN_PASSWORD=$admin TRACKER_ADMIN_PASSWORD=$admin MLFLOW_FLASK_SERVER_SECRET_KEY=$flask
export MLFLOW_SERVER_ALLOWED_HOSTS=127.0.0.1:5000,$(door_hosts) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_TRACKING_USERNAME=vmoco MLFLOW_TRACKING_PASSWORD=$tracker
export DOOR_CERTIFICATE=\$here/door.crt DOOR_KEY=\$here/door.key JOB_SERVER=127.0.0.1:8265 TRACKER=127.0.0.1:5000
END
}

door_hosts() {
    local name
    for name in localhost 127.0.0.1 door ${DOOR_NAMES:-}; do printf '%s:5443,' "$name"; done | sed 's/,$//'
}

"$form"
