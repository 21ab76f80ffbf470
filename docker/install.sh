#!/bin/sh
# Installs NeuronLens into a virtual environment: the steps of the image's build stage, which a test runs too.
#
#   install.sh dependencies VENV   makes VENV, and installs what pyproject.toml asks for, with the extras of EXTRAS, at
#                                  the versions of constraints.txt
#   install.sh package VENV        adds the Python client (clients/python), which the command line uses, and NeuronLens
#
# It runs in the directory that holds pyproject.toml. EXTRAS are extras of the package, with spaces between them.
# TORCH_INDEX is the package index that torch alone is taken from;
# empty: the usual one, whose torch for Linux on x86-64 brings CUDA.
set -eu

step=$1
venv=$2
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

case $step in
dependencies)
  python3 -m venv "$venv"
  # without what torch requires: that comes from the usual index below, so that no other index can answer for it
  if [ -n "${TORCH_INDEX:-}" ]; then
    pip install --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch
  fi
  wanted=$(mktemp)
  "$venv/bin/python" -c '
import os, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = [project["optional-dependencies"][name] for name in os.environ.get("EXTRAS", "").split()]
print(*project["dependencies"], *sum(extras, []), sep="\n")
' >"$wanted"
  pip install --constraint constraints.txt --requirement "$wanted"
  rm "$wanted"
  ;;
package)
  pip install --constraint constraints.txt ./clients/python
  pip install --no-deps .
  pip check
  ;;
*)
  echo "install.sh: no such step: $step" >&2
  exit 2
  ;;
esac
