# Sourced by the scripts beside it: options by name, and commands that are shown before they run.

dry_run=
tpu=
zone=
project=

fail() {
  echo "$(basename "$0"): error: $1 (see --help)" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# value OPTION VALUE...: the value, or an error that names the option.
value() {
  [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
  printf '%s' "$2"
}

need() {
  [ -n "$2" ] || fail "$1 is missing"
}

run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [ -n "$dry_run" ] || "$@"
}
