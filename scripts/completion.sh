#!/usr/bin/env bash
# Completion of this suite's commands, their options and what these may be, for bash: what --help tells is offered.
#
# Usage: bash scripts/completion.sh [--help]     (prints it: eval "$(bash scripts/completion.sh)")
set -euo pipefail
case "$*" in
    "") ;;
    --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "error: unknown arguments $*; allowed: --help" >&2
        exit 2
        ;;
esac

# Arguments, as `complete -F` gives them: the command, the word at the cursor, the word before it. Where the command is
# no module of the suite nothing is offered, and file names are completed as ever.
_lowrank() {
    local word="$2" before="$3" module="" option="" at told parts=()
    COMPREPLY=()
    for ((at = 1; at < COMP_CWORD; at++)); do
        [[ "${COMP_WORDS[at]}" == -m ]] && break
    done
    ((at < COMP_CWORD)) || return 0
    if [[ "$before" == -m ]]; then
        mapfile -t COMPREPLY < <(compgen -W "classification segmentation report" -- "$word")
        return 0
    fi
    module="${COMP_WORDS[at + 1]}"
    [[ " classification segmentation report " == *" $module "* ]] || return 0
    parts=("$module")
    [[ "$module" != report ]] && ((at + 2 < COMP_CWORD)) && parts+=("${COMP_WORDS[at + 2]}")
    told="$("${COMP_WORDS[0]}" -m "${parts[@]}" --help 2>/dev/null | tr -s '[:space:]' ' ')" || return 0
    for ((at += 2; at < COMP_CWORD; at++)); do
        [[ "${COMP_WORDS[at]}" == --* ]] && option="${COMP_WORDS[at]}"
    done
    if [[ "$word" == -* ]]; then
        told="$(grep -oE -- '--[a-z][A-Za-z_.-]*[A-Za-z]' <<<"$told" | sort -u)"
    elif [[ "$module" != report && ${#parts[@]} == 1 ]]; then
        told="$(grep -oE '\{[a-z,]+\}' <<<"$told" | head -1 | tr '{,}' ' ')"
    elif [[ "$option" == --methods || "$option" == --dataset ]]; then
        at="$([[ "$option" == --methods ]] && echo methods || echo data)"
        told="$(find "configs/$module/$at" -type f -printf '%f\n' 2>/dev/null | sed 's/\.[a-z]*$//')"
    else
        told="$(grep -oE -- "${option:-no option} \{[^}]*\}" <<<"$told" | head -1 | sed 's/.*{//' | tr ',}' ' ')"
    fi
    mapfile -t COMPREPLY < <(compgen -W "$told" -- "$word")
}
declare -f _lowrank
echo "complete -o bashdefault -o default -F _lowrank python python3"
