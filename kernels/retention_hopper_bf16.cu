// Chunkwise retention of bf16 on Hopper; common/retention_hopper.cuh has the algorithm.
#include "common/retention_hopper.cuh"

RETENTION(bf16, 64, 64, 1, 2, 2)
RETENTION(bf16, 64, 128, 1, 3, 3)
RETENTION(bf16, 128, 64, 1, 2, 2)
RETENTION(bf16, 128, 128, 1, 3, 3)
RETENTION(bf16, 256, 64, 2, 2, 2)
RETENTION(bf16, 256, 128, 1, 2, 2)
RETENTION(bf16, 512, 64, 2, 2, 1)
