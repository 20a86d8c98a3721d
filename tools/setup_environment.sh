#!/usr/bin/env bash
# Creates or completes the environment VENV and installs the project with EXTRAS into it, at the tested versions.
# usage: setup_environment.sh VENV EXTRAS [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extras=$2 wanted=${3:-}

# A name on PATH is not enough: it may be too old, a version manager's stub, or a Python without venv.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if ! usable "$venv/bin/python"; then
    python=
    for candidate in ${wanted:-python3 python3.12 python3.11 python3.13 python3.14 python}; do
        if usable "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "No usable Python: 3.11 or newer with the venv module is needed (looked for: ${wanted:-python3, python3.11 to 3.14});" \
            "install it (Debian, Ubuntu: apt install python3-venv) or name one with PYTHON=/path/to/python3." >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
fi

# Pythons newer than the newest constraints file use that file: its versions are the best tested guess.
version=$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
constraints=constraints/py$version.txt
[ -f "$constraints" ] || constraints=$(ls constraints/py*.txt | sort -V | tail -n 1)

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" --constraint "$constraints"
echo "Environment $venv is ready: $("$venv/bin/python" -c 'import sys, jax; print("Python %d.%d.%d, jax" % sys.version_info[:3], jax.__version__)')"
