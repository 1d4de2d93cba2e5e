#!/usr/bin/env bash
# Delete a TPU with all that lies on its hosts' disks; what is in buckets stays.
#
#   launch/delete.sh --tpu mega --zone europe-west4-a
#
# --tpu NAME         its name
# --zone ZONE        where it is
# --project PROJECT  if not gcloud's own setting
# --queued           it was made with create.sh --queued: delete the queued resource and the TPU of it
# --yes              do not ask
# --dry-run          show the command, and do nothing

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

queued=
more=()
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift ;;
    --zone) zone=$(value "$@"); shift ;;
    --project) project=$(value "$@"); shift ;;
    --queued) queued=1 ;;
    --yes) more+=(--quiet) ;;
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

if [ -n "$queued" ]; then
  run gcloud compute tpus queued-resources delete "$tpu" "${where[@]}" --force ${more[@]+"${more[@]}"}
else
  run gcloud compute tpus tpu-vm delete "$tpu" "${where[@]}" ${more[@]+"${more[@]}"}
fi
