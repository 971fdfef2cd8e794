#!/bin/sh
# Set up and run the tests against the installed package: sh test.sh [pytest arguments]
EXTRA=test,readers
cd "$(dirname "$0")"
. ./setup.sh
exec "$venv/bin/python" -m pytest "$@"
