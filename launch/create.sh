#!/usr/bin/env bash
# Make a TPU. It costs money from the moment it is READY until launch/delete.sh.
#
#   launch/create.sh --tpu mega --zone europe-west4-a --accelerator v3-256
#
# --tpu NAME          its name
# --zone ZONE         where; `gcloud compute tpus locations list`
# --accelerator TYPE  v3-256 is DALL·E Mega's; `gcloud compute tpus accelerator-types list --zone ZONE`
# --version VERSION   of the hosts' software, if not the usual one of the type
# --project PROJECT   if not gcloud's own setting
# --spot              cheaper, and may be taken away at any time
# --reserved          from a reservation
# --queued            wait in the queue for it (queued resource of the same name) instead of failing when there is none
# --service-account A an e-mail address: who the hosts are to buckets; the project's default account otherwise
# --network N, --subnetwork N, --internal-ips
#                     as gcloud's; without external addresses hosts need Cloud NAT to install anything
# --dry-run           show the command, and do nothing

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

accelerator=
version=
queued=
more=()
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift ;;
    --zone) zone=$(value "$@"); shift ;;
    --project) project=$(value "$@"); shift ;;
    --accelerator) accelerator=$(value "$@"); shift ;;
    --version) version=$(value "$@"); shift ;;
    --service-account | --network | --subnetwork) more+=("$1=$(value "$@")"); shift ;;
    --spot | --reserved | --internal-ips) more+=("$1") ;;
    --queued) queued=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage ;;
    *) fail "$1 is no option" ;;
  esac
  shift
done
need --tpu "$tpu"
need --zone "$zone"
need --accelerator "$accelerator"
if [ -z "$version" ]; then
  case $accelerator in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "--version is missing, and no usual one is known for $accelerator" ;;
  esac
fi
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

if [ -n "$queued" ]; then
  run gcloud compute tpus queued-resources create "$tpu" --node-id="$tpu" "${where[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$version" ${more[@]+"${more[@]}"}
  echo "in the queue; it is there when this says ACTIVE:" >&2
  echo "  gcloud compute tpus queued-resources describe $tpu ${where[*]} --format='value(state.state)'" >&2
else
  run gcloud compute tpus tpu-vm create "$tpu" "${where[@]}" \
    --accelerator-type="$accelerator" --version="$version" ${more[@]+"${more[@]}"}
fi
echo "next: launch/setup.sh --tpu $tpu --zone $zone; in the end: launch/delete.sh --tpu $tpu --zone $zone" >&2
