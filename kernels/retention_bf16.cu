// Chunkwise retention of bf16; common/retention_walk.cuh has the algorithm.
#include "common/retention_walk.cuh"

RETENTION(bf16, 64, 64, 1, 64, 2, 4)
RETENTION(bf16, 64, 128, 1, 64, 2, 2)
RETENTION(bf16, 128, 64, 1, 64, 2, 2)
RETENTION(bf16, 128, 128, 1, 64, 2, 2)
RETENTION(bf16, 256, 64, 2, 64, 2, 1)
RETENTION(bf16, 256, 128, 2, 64, 2, 1)
RETENTION(bf16, 512, 64, 4, 32, 2, 1)
