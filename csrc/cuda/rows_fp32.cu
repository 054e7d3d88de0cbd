// The row kernels and their launchers for float32 logits; one file per type, so that they build in
// parallel.
#include "launch.cuh"

TIGHTROPE_INSTANTIATE(float)
