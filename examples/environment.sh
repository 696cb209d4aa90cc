# Sourced by examples/quickstart.sh and tests/run.sh in the repository root: activates .venv (created if missing) unless
# a virtual environment is active, and installs PyTorch and this package there if they are not installed yet.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || { echo "error: Python 3.10 or newer is needed, python3 is $(python3 --version)" >&2; exit 1; }
    [ -x .venv/bin/python ] || { echo "making a virtual environment in .venv"; python3 -m venv .venv; }
    . .venv/bin/activate
fi
installed="$VIRTUAL_ENV/triaxis-$(cat pyproject.toml setup.py | cksum | cut -d' ' -f1)-$(pwd | cksum | cut -d' ' -f1)"
if [ ! -e "$installed" ]; then
    echo "installing PyTorch and this package into $VIRTUAL_ENV (the first time this downloads some hundred megabytes)"
    python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    python -m pip install --quiet --disable-pip-version-check --editable '.[dev,hf]'
    # without its compiler of kernels, which calls on the meta device do not need
    python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cudnn-frontend==1.32.0 \
        || echo "nvidia-cudnn-frontend cannot be installed here; the tests that import it are skipped" >&2
    touch "$installed"
    echo "installed in $SECONDS s"
fi
