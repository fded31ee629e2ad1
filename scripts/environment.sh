# Sourced by demo.sh and test.sh: a virtual environment in .venv with the package and what is named.
# Set PYTHON to choose the interpreter (3.10 or newer).

make_environment() { # make_environment REQUIREMENT...
  local python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is not Python 3.10 or newer; name one with PYTHON=…" >&2
    exit 2
  fi
  if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
    echo "error: could not make a virtual environment; on Debian: apt-get install python3-venv" >&2
    exit 2
  fi
  # What is new is told as it comes, so that minutes of downloading do not look like a hang.
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" |
    while IFS= read -r line; do
      case "$line" in
      *Collecting\ * | *Downloading\ * | *Installing\ *) echo "${line:0:79}" ;;
      esac
    done
  # MLX's Linux wheel links the reference BLAS; OpenBLAS, where it is installed, is 20 times faster.
  local openblas
  for openblas in /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0; do
    if [ -e "$openblas" ]; then export LD_PRELOAD="$openblas"; fi
  done
  # One that is older than the processor takes it for an ancient one, which is 5 times slower.
  if grep -qs avx512vl /proc/cpuinfo; then
    export OPENBLAS_CORETYPE="${OPENBLAS_CORETYPE:-SkylakeX}"
  fi
}
