#!/usr/bin/env bash
# Create .venv and install reflow with the tested versions; does nothing when they are in place already.
# REFLOW_PYTHON=/path/to/python uses that interpreter as it is and installs nothing.
# Sourced by the other scripts: afterwards $REFLOW_PYTHON is the interpreter and its folder is first on PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

reflow_setup() {
  if [ -n "${REFLOW_PYTHON:-}" ]; then
    REFLOW_PYTHON="$(command -v "$REFLOW_PYTHON")" || { echo "REFLOW_PYTHON names no interpreter." >&2; return 2; }
    export PYTHONPATH="$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}"
  else
    local python="${PYTHON:-python3}" want have
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
      echo "reflow needs Python 3.11 or later; '$python' is not. Install it, or set PYTHON=/path/to/python3.11." >&2; return 2; }
    want="$(cat "$root/pyproject.toml" "$root/setup.cfg" "$root/constraints.txt" | cksum) $root"
    have="$(cat "$root/.venv/.reflow-installed" 2>/dev/null || true)"
    if [ "$want" != "$have" ]; then
      echo "Installing reflow and its pinned dependencies into .venv (about two minutes) ..."
      "$python" -m venv "$root/.venv" || {
        echo "Could not create .venv: on Debian and Ubuntu install the package python3-venv first." >&2; return 2; }
      # DeepSpeed would otherwise try to compile its CUDA ops during the installation.
      DS_BUILD_OPS=0 "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile \
        -c "$root/constraints.txt" -e "$root[test]" || {
        echo "The installation failed; the lines above say why. Run the command again once that is cured." >&2; return 2; }
      # On all cores, where pip takes one. Files that are no Python of this version are passed over, as pip does.
      "$root/.venv/bin/python" -m compileall -q -j 0 "$root/.venv/lib" > /dev/null 2>&1 || true
      echo "$want" > "$root/.venv/.reflow-installed"
    fi
    REFLOW_PYTHON="$root/.venv/bin/python"
  fi
  export REFLOW_PYTHON PATH="$(dirname "$REFLOW_PYTHON"):$PATH"
}

reflow_setup
