#!/bin/sh
# Makes what the stack needs and the repository must not hold: tokens, the password of Grafana's admin, the directory of
# runs, and .env, from which docker compose reads where they are. What is there already stays as it is: to exchange a
# token, remove its file and run this again.
#
#   deploy/prepare.sh                  then: docker compose up --detach --wait
#   deploy/prepare.sh --only-secrets   without .env and the directory of runs
#
# From the environment, where they are not to be as here: GRADIOMETER_DIR, GRADIOMETER_SECRETS, GRAFANA_ADMIN_PASSWORD.
set -eu
umask 077

# Compose reads a path that is relative as one of its own folder, and this script as one of where it runs.
absolute() {
    # shellcheck disable=SC2088 # it came in quotes, and is meant as the agent takes it
    case $1 in
        /*) printf '%s\n' "$1" ;;
        '~/'*) printf '%s\n' "$HOME/${1#??}" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
secrets=$(absolute "${GRADIOMETER_SECRETS:-$root/deploy/secrets}")
settings=${GRADIOMETER_ENV_FILE:-$root/.env}
tokens=$secrets/monitor_tokens

fail() {
    echo "deploy/prepare.sh: $1" >&2
    exit 2
}

random() {
    head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'
}

# Client $2 of the monitor has a token in a file of its own, $3, and the monitor knows it in the role $1. A token that an earlier
# version made stays what it is; that its role becomes another is said.
token() {
    file=$secrets/$3
    [ -s "$file" ] || random >"$file"
    line="$1 $2 $(cat "$file")"
    # By standard input, for everybody sees the arguments of a process.
    if ! printf '%s\n' "$line" | grep -qxF -f - "$tokens"; then
        had=$(sed -n "s/^\([a-z]*\) $2 .*/\1/p" "$tokens" | head -n 1)
        [ "${had:-$1}" = "$1" ] || echo "roles:   $2 has '$1' now and had '$had' before; docs/stack.md says what to do"
        { grep -v "^[a-z]* $2 " "$tokens" || true; printf '%s\n' "$line"; } >"$tokens.new"
        mv "$tokens.new" "$tokens"
    fi
}

password() {
    file=$secrets/grafana_admin_password
    if [ -s "$file" ]; then
        [ "${GRAFANA_ADMIN_PASSWORD:-$(cat "$file")}" = "$(cat "$file")" ] ||
            fail "GRAFANA_ADMIN_PASSWORD is not the one in $file: change it in Grafana, then in that file"
        return
    fi
    given=${GRAFANA_ADMIN_PASSWORD:-$(random)}
    [ "${#given}" -ge 8 ] || fail "GRAFANA_ADMIN_PASSWORD has ${#given} characters: give it 8 or more"
    case $given in
        *[![:print:]]*) fail "GRAFANA_ADMIN_PASSWORD is to be one line of printable ASCII" ;;
    esac
    printf '%s\n' "$given" >"$file"
}

# What stands between the quotes of .env is taken as it is, but for these.
check_holds() {
    case $2 in
        *[\'\\]* | *"
"*) fail "$1 $2: .env cannot hold a path with a quote, a backslash or a line break" ;;
    esac
}

# Variable $1 stands in .env with the value $2, and with no other from before.
setting() {
    there=$(grep "^$1=" "$settings" || true)
    case $there in
        "$1='$2'") ;;
        '') printf "%s='%s'\n" "$1" "$2" >>"$settings" ;;
        *) fail "$settings has $there, and now it is to be '$2': remove that line, or leave it at that" ;;
    esac
}

# Prometheus, Alertmanager and Grafana run as users of their own: what is mounted from here must be readable for all.
check_readable() {
    hidden=$(find "$root/deploy" "$root/dashboards" \( -path "$secrets" -o -name __pycache__ \) -prune -o \
        \( -name '*.yml' -o -name '*.yaml' -o -name '*.json' -o -type d \) ! -perm -o=r -print)
    [ -z "$hidden" ] || fail "containers cannot read $(echo "$hidden" | head -n 1): chmod -R o+rX deploy dashboards"
}

export LC_ALL=C
mkdir -p "$secrets/alertmanager"
chmod 700 "$secrets"
touch "$tokens"
token metrics prometheus prometheus_token
token alerts alertmanager alertmanager/gradiometer-token
token write browser browser_token
password
# The folder keeps everybody else out. What is mounted from it is read by users of containers, which are not the host's.
chmod 755 "$secrets/alertmanager"
chmod 644 "$secrets/prometheus_token" "$secrets/alertmanager/gradiometer-token" "$secrets/grafana_admin_password"
chmod 600 "$tokens" "$secrets/browser_token"
[ "${1:-}" != --only-secrets ] || exit 0

touch "$settings"
before=$(sed -n "s/^GRADIOMETER_DIR='\(.*\)'$/\1/p" "$settings")
runs=${GRADIOMETER_DIR:-${before:-${XDG_STATE_HOME:-$HOME/.local/state}/gradiometer/runs}}
runs=$(absolute "$runs")
check_holds GRADIOMETER_SECRETS "$secrets"
check_holds GRADIOMETER_DIR "$runs"
check_readable
setting GRADIOMETER_SECRETS "$secrets"
setting GRADIOMETER_DIR "$runs"
setting GRADIOMETER_UID "$(id -u)"
setting GRADIOMETER_GID "$(id -g)"
mkdir -p "$runs"
echo "secrets: $secrets   (browser_token lets you into the monitor's page, grafana_admin_password into Grafana as admin)"
echo "runs:    $runs   ($settings has this and the rest)"
echo "next:    docker compose up --detach --wait"
