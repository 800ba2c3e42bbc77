# Sourced by scripts. From here on the current folder is the suite's, and relative paths in variables are still of the
# folder in which the script was called.
root="$(dirname "${BASH_SOURCE[0]}")/.."
for name in RUNS_DIR DATA_DIR WEIGHTS VENV; do
    [[ -z "${!name:-}" || "${!name}" == /* || "${!name}" == *://* || . -ef "$root" ]] || export "$name=$PWD/${!name}"
done
CDPATH="" cd "$root" || exit

# Prints the head of a script.
usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$1"
}
