// The row kernels and their launchers for bfloat16 logits; one file per type, so that they build in
// parallel.
#include "launch.cuh"

TIGHTROPE_INSTANTIATE(bf16)
