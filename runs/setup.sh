# Sourced by the other scripts: a virtual environment with the core packages, made once.
#
#   PYTHON=python3.12 bash runs/test.sh    made with this Python (3.11 or later) instead of python3
#   TORCH=2.13.0 bash runs/test.sh         install this torch, do not look for one
#
# If that Python has torch 2.11 or later, it is used as it is: on a machine with a GPU it was built
# for the driver. Otherwise torch 2.13.0 is installed. Remove .venv to choose again.
# GOMP_SPINCOUNT: without it OpenMP threads that share a core with others collapse (LOG.md).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
VENV=${VENV:-.venv}

# The folder that holds a recent torch of this Python; nothing if there is none.
find_torch() { "$1" 2> /dev/null - << 'END' || true
import os
import torch
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
    print(os.path.dirname(os.path.dirname(torch.__file__)))
END
}

make_venv() {
  local python=${PYTHON:-python3} folder=
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: this needs Python 3.11 or later; name one, as in PYTHON=python3.12 bash $0" >&2
    exit 2
  fi
  [ -n "${TORCH:-}" ] || folder=$(find_torch "$python")
  "$python" -m venv "$VENV"
  python=$VENV/bin/python
  local install="$python -m pip install --quiet --disable-pip-version-check"
  if [ -n "$folder" ]; then  # a path file: --system-site-packages misses the packages of a venv
    echo "$folder" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    echo "$VENV uses torch $("$python" -c 'import torch; print(torch.__version__)') of $folder"
  else
    echo "$VENV gets torch ${TORCH:-2.13.0}"
    $install "torch==${TORCH:-2.13.0}"
  fi
  # The other packages by themselves: pip is given no reason to replace torch.
  "$python" - > "$VENV/core.txt" << 'END'
import tomllib
packages = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print("\n".join(x for x in packages if not x.startswith("torch")))
END
  $install -r "$VENV/core.txt"
  $install --no-deps -e .
  touch "$VENV/.installed"
}

if [ -n "${NANOCASCADE_PYTHON_READY:-}" ]; then
  return 0  # the caller's python has the packages
fi
[ -f "$VENV/.installed" ] || make_venv
source "$VENV/bin/activate"
