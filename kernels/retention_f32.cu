// Chunkwise retention of f32, by three products of tf32 for one; common/retention_walk.cuh has the algorithm.
#include "common/retention_walk.cuh"

RETENTION(float, 64, 64, 1, 32, 2, 2)
RETENTION(float, 128, 64, 1, 32, 2, 2)
RETENTION(float, 256, 64, 2, 32, 2, 1)
RETENTION(float, 512, 64, 4, 32, 1, 1)
