#!/usr/bin/env bash
# Makes .venv ready for work: creates it when missing, installs the project and what it needs when that changed.
#   scripts/setup.sh            the Python packages
#   scripts/setup.sh --tests    also the browser that the browser tests drive
# Run it as often as you like: with nothing to do it returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV_PYTHON=.venv/bin/python
STAMP=.venv/.moe_trace_setup
EXTRAS=test,report,export,docs

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Runs a command as root where that needs no password; fails otherwise.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Installs Debian packages. Fails without a word where there is no apt-get or no root: the caller knows what to say.
apt_install() {
    command -v apt-get >/dev/null || return 1
    as_root true 2>/dev/null || return 1
    say "apt-get install $*"
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >&2 || say "apt-get update failed; trying the lists at hand"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends "$@" >&2
}

have_pip() { "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; }

make_venv() {
    command -v "$PYTHON" >/dev/null || fail "found no '$PYTHON'. Install Python 3.11 or newer, or set PYTHON=/path/to/python3."
    new_enough "$PYTHON" || fail "'$PYTHON' is $("$PYTHON" --version 2>&1); 3.11 or newer is needed." \
        "Set PYTHON=/path/to/a/newer/python3."
    say "creating .venv with $("$PYTHON" --version 2>&1)"
    # Debian ships venv without ensurepip until python3-venv is installed.
    "$PYTHON" -m venv .venv >&2 || { apt_install python3-venv && "$PYTHON" -m venv .venv >&2; } \
        || fail "'$PYTHON -m venv' failed. On Debian or Ubuntu: apt-get install python3-venv"
}

# What the installed state depends on. The folder counts too: an editable install knows its own place.
wanted_stamp() { { pwd; echo "$EXTRAS"; cat setup.cfg pyproject.toml scripts/constraints.txt; } | sha256sum | cut -d' ' -f1; }

install_packages() {
    local wanted
    wanted=$(wanted_stamp)
    if [ "$(cat "$STAMP" 2>/dev/null || true)" = "$wanted" ]; then return 0; fi
    say "installing moe_trace[$EXTRAS] into .venv (some minutes the first time)"
    "$VENV_PYTHON" -m pip install -qq --disable-pip-version-check \
        --constraint scripts/constraints.txt --editable ".[$EXTRAS]" >&2
    # Written last: an install that was cut short is done again.
    printf '%s\n' "$wanted" >"$STAMP"
}

have_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

# A missing browser is no reason to stop here: the browser tests themselves say so, and fail in CI.
install_browser() {
    if have_browser >/dev/null; then return 0; fi
    apt_install chromium fonts-liberation \
        || say "found no Chromium, and could not install it: the browser tests will not run." \
            "On Debian, as root: apt-get install chromium fonts-liberation"
}

new_enough "$VENV_PYTHON" && have_pip || make_venv
install_packages
if [ "${1:-}" = --tests ]; then install_browser; fi
