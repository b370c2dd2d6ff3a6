#!/usr/bin/env bash
# Reproduce Table 1 of the paper: evaluate every row on the six benchmarks, then compare with the numbers of the paper.
#
#     scripts/reproduce_paper.sh BENCHMARKS RESULTS [options of spar evaluate, such as --trainer.devices 2]
#     scripts/reproduce_paper.sh --dry-run BENCHMARKS RESULTS      # only print the commands
#     ROWS='siglip2-*' scripts/reproduce_paper.sh BENCHMARKS RESULTS
#
# BENCHMARKS is the folder that `spar evaluate --check BENCHMARKS` accepts. Students are runs of `spar fit`, or the files
# that the authors of the paper published:
#
#     SIGLIP2=siglip2.ckpt OPENCLIP=runs/openclip_vitb16 DINOV3=runs/dinov3txt_vitl16 scripts/reproduce_paper.sh ..
#
# The same command continues what was stopped. A row that fails, for example because its weights are missing, does not
# stop the others.
set -uo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then dry_run=yes; shift; fi
if [[ $# -lt 2 || ${1-} == -* ]]; then sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; fi
benchmarks=$1 results=$2
shift 2
options=("$@")
failed=()

row() {
  local name=$1
  shift
  # shellcheck disable=SC2053  # ROWS is a pattern
  [[ $name == ${ROWS:-*} ]] || return 0
  local command=(spar evaluate "$@" --benchmarks paper6 --root "$benchmarks" --out "$results/$name" "${options[@]}")
  printf '%q ' "${command[@]}"
  printf '\n'
  if [[ $dry_run ]]; then return 0; fi
  local code=0
  "${command[@]}" || code=$?
  case $code in
    0) ;;
    130 | 143) exit "$code" ;;  # stopped by Ctrl-C or SIGTERM
    *) failed+=("$name") ;;
  esac
}

siglip2=(--config siglip2_vitb16)
openclip=(--config openclip_vitb16)
dinov3=(--config dinov3txt_vitl16)
siglip2_spar=("${siglip2[@]}" --weights "${SIGLIP2:-runs/siglip2_vitb16}")
openclip_spar=("${openclip[@]}" --weights "${OPENCLIP:-runs/openclip_vitb16}")
dinov3_spar=("${dinov3[@]}" --weights "${DINOV3:-runs/dinov3txt_vitl16}")

row naflex-single "${siglip2[@]}" --model.backbone NaFlex --model.backbone.pretrained google/siglip2-base-patch16-naflex
row siglip2-sliding "${siglip2[@]}" --inference sliding
row siglip2-single "${siglip2[@]}"
row siglip2-spar "${siglip2_spar[@]}"
row siglip2-single-lposs "${siglip2[@]}" --refine LPOSS
row siglip2-spar-lposs "${siglip2_spar[@]}" --refine LPOSS --refine.preset spar
row siglip2-single-anyup "${siglip2[@]}" --upsampler anyup
row siglip2-spar-anyup "${siglip2_spar[@]}" --upsampler anyup
row openclip-sliding "${openclip[@]}" --inference sliding
row openclip-single "${openclip[@]}"
row openclip-spar "${openclip_spar[@]}"
row openclip-single-anyup "${openclip[@]}" --upsampler anyup
row openclip-spar-anyup "${openclip_spar[@]}" --upsampler anyup
row dinov3-sliding "${dinov3[@]}" --inference sliding
row dinov3-single "${dinov3[@]}"
row dinov3-spar "${dinov3_spar[@]}"
row dinov3-single-anyup "${dinov3[@]}" --upsampler anyup
row dinov3-spar-anyup "${dinov3_spar[@]}" --upsampler anyup

if [[ $dry_run ]]; then
  printf '%q ' spar evaluate --check_paper "$results"
  printf '\n'
  exit 0
fi
spar evaluate --check_paper "$results"
code=$?
if ((${#failed[@]})); then
  printf 'Failed: %s\n' "${failed[*]}" >&2
  code=1
fi
exit "$code"
