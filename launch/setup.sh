#!/usr/bin/env bash
# Install this package on every host of a TPU, into ~/dalle-torch and its .venv; again after every change.
#
#   launch/setup.sh --tpu mega --zone europe-west4-a
#
# --tpu NAME         which; USER@NAME to enter hosts as that user
# --zone ZONE        where it is
# --project PROJECT  if not gcloud's own setting
# --git URL          hosts fetch the code from there; otherwise it is this working tree, changes and all, that is copied
# --ref REF          branch, tag or commit of it (main)
# --python VERSION   of the hosts' environment, 3.11 to 3.13 (3.12)
# --packages WORDS   more to install, with blanks between (gcsfs, which reads gs:// buckets)
# --internal-ip      reach hosts by their internal addresses
# --dry-run          show the commands, and do nothing
#
# The copy goes to all hosts at once, for which gcloud wants its key in an agent: ssh-add ~/.ssh/google_compute_engine

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

git=
ref=main
python=3.12
packages=gcsfs
way=()
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift ;;
    --zone) zone=$(value "$@"); shift ;;
    --project) project=$(value "$@"); shift ;;
    --git) git=$(value "$@"); shift ;;
    --ref) ref=$(value "$@"); shift ;;
    --python) python=$(value "$@"); shift ;;
    --packages) packages=$(value "$@"); shift ;;
    --internal-ip) way=(--internal-ip) ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage ;;
    *) fail "$1 is no option" ;;
  esac
  shift
done
need --tpu "$tpu"
need --zone "$zone"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

if [ -z "$git" ]; then
  bundle=$(mktemp -d)
  trap 'rm -rf "$bundle"' EXIT
  cd "$here/.."
  command git describe --always --dirty --abbrev=12 >"$bundle/.commit"
  # What git knows or does not ignore, and is there; tests and benchmarks stay at home.
  command git ls-files -z --cached --others --exclude-standard -- . ':!tests' ':!benchmarks' ':!docs' |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done >"$bundle/files"
  COPYFILE_DISABLE=1 tar -czf "$bundle/dalle-torch.tgz" --null -T "$bundle/files" -C "$bundle" .commit
  run gcloud compute tpus tpu-vm scp "$bundle/dalle-torch.tgz" "$tpu:dalle-torch.tgz" "${where[@]}" --worker=all \
    ${way[@]+"${way[@]}"} --quiet
fi

# Runs on every host, in the home folder. Outputs and the environment stay where they are.
install='
set -euo pipefail
mkdir -p dalle-torch
cd dalle-torch
if [ -n "$SETUP_GIT" ]; then
  [ -d .git ] || git init --quiet
  git fetch --quiet --depth 1 "$SETUP_GIT" "$SETUP_REF"
  git checkout --quiet --force FETCH_HEAD
  rm -f .commit
else
  rm -rf dalle_torch launch configs
  tar -xzf ../dalle-torch.tgz
fi
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
[ -x .venv/bin/python ] || uv venv --quiet --python "$SETUP_PYTHON" .venv
uv pip install --quiet --python .venv/bin/python --torch-backend cpu --editable ".[xla,train]" "torch_xla[tpu]" $SETUP_PACKAGES
.venv/bin/dalle-torch --version
'
run python3 "$here/xla_dist.py" --tpu "$tpu" "${where[@]}" ${way[@]+"${way[@]}"} --workdir '~' --grace 10 \
  --env "SETUP_GIT=$git" --env "SETUP_REF=$ref" --env "SETUP_PYTHON=$python" --env "SETUP_PACKAGES=$packages" \
  -- bash -c "$install"
echo "next: python3 launch/xla_dist.py --tpu $tpu --zone $zone --preflight configs/train/mega-v3-256.yaml" >&2
