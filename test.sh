#!/bin/sh
# Set up and run the tests against the installed package: sh test.sh [pytest arguments]
EXTRA=test,readers
cd "$(dirname "$0")"
# The GPU's kernels are tested in emulation, which a C++ compiler builds: without one those tests fail, they do not skip.
if ! command -v g++ >/dev/null; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq g++
fi
. ./setup.sh
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
