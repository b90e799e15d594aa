#!/usr/bin/env bash
# Make .venv-bench: cnfkit beside its peers, on the versions of requirements.lock and one PyTorch for all.
#
#     benchmarks/environment.sh [PYTHON]        TORCH_INDEX=URL as for `make setup`; unless given, what that remembered
#
# A stamp comes last, as in the Makefile: what is complete is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-bench
stamp=$venv/.installed
complete=yes
for file in requirements.lock pyproject.toml benchmarks/peers.txt benchmarks/environment.sh; do
    [ "$stamp" -nt "$file" ] || complete=
done
[ -z "$complete" ] || exit 0

python=${1:-}
for candidate in python3.11 .venv/bin/python python3; do
    [ -n "$python" ] || ! "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
        || python=$candidate
done
if [ -z "$python" ]; then
    echo "environment.sh: Python 3.11 is needed, for which requirements.lock was made; give its path" >&2
    exit 1
fi

echo "Making $venv"
"$python" -m venv --clear "$venv"
echo '*' > "$venv/.gitignore"
index=${TORCH_INDEX-$(cat .venv/.torch-index 2>/dev/null || true)}
install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile)
# PyTorch first, alone. The constraints then hold everything to the lock, and so to this PyTorch.
"${install[@]}" ${index:+--index-url "$index"} "$(grep '^torch==' requirements.lock)"
"${install[@]}" --constraint requirements.lock --no-build-isolation --editable . attrs
# Without their dependencies, some of which would bring a torchvision, and with it another PyTorch.
"${install[@]}" --no-deps --requirement benchmarks/peers.txt
touch "$stamp"
