# Sourced by the scripts beside it: where the cache is, and how something gets into it whole or not at all.
# shellcheck shell=bash
set -euo pipefail

# shellcheck disable=SC2034 # for the scripts that source this
setup=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${QMPBACKUP_TEST_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/qmpbackup-tests}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# A second run that makes the same NAME waits here until this process ends.
lock() {
  exec 9>"$cache/.lock-$1"
  flock 9
}

# Sets `scratch`, a folder in the cache that goes away when the script ends, however it ends.
make_scratch() {
  scratch=$(mktemp -d "$cache/.scratch.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  trap 'exit 130' INT TERM
}

# publish FROM NAME: FROM, a path in `scratch`, becomes NAME in the cache by one rename.
publish() {
  mkdir -p "$(dirname "$cache/$2")"
  if [[ -d $cache/$2 ]]; then mv "$cache/$2" "$scratch/old"; fi
  mv -f "$1" "$cache/$2"
}

# wrapper ROOT NAME PROGRAM [LINE...]: NAME in the cache becomes a script that runs PROGRAM of an unpacked ROOT with the
# loader and the libraries of that ROOT. LINEs of shell come before the command.
wrapper() {
  local root=$1 name=$2 program=$3 file lib loader
  shift 3
  for lib in "$root/usr/lib/x86_64-linux-gnu" "$root/lib/x86_64-linux-gnu"; do
    [[ ! -e $lib/ld-linux-x86-64.so.2 ]] || loader=${lib#"$root/"}/ld-linux-x86-64.so.2
  done
  mkdir -p "$(dirname "$cache/$name")"
  file=$(mktemp "$cache/$name.XXXXXX")
  {
    printf '#!/bin/sh\nroot="%s"\n' "$root"
    ((!$#)) || printf '%s\n' "$@"
    # shellcheck disable=SC2016 # the wrapper expands these
    printf 'exec "$root/%s" --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" ' "${loader:?}"
    # shellcheck disable=SC2016
    printf '"$root/%s" "$@"\n' "$program"
  } >"$file"
  chmod 755 "$file"
  mv -f "$file" "$cache/$name"
}
