// A step of decoding of Mamba models as one kernel: a program of phases for up to 8 rows (8 tokens of one sequence, or one of
// 8, or between).
//
// Grid: one block a multiprocessor, all there at once (a cooperative launch), 8 warps that multiply and 4 that copy (on Hopper
// one is enough, and the others bring close what else will be needed). Every phase is a product of a few rows with a matrix
// whose outputs are shared by the blocks, and what follows from it alone. Weights stream past the phases into a ring of shared
// memory, rows as they lie (decode_stream.cuh); activations go from block to block as words that say themselves when they are
// there (decode.cuh).
//
// All phases share one loop (decode_loop.cuh), and so the code of what they have in common: a program that goes in circles
// has to stay in the instruction cache. Registers: 160 for one row, 168 (all there are) for more. Shared memory: what there is.
//
// Bytes: the weights, once; all else is small. On an H200 (a copy: 4.27 TB/s) one row takes 0.265 ms in a model of 130m
// parameters, 0.91 of 1.4b (71 % of what its weights take at the rate of a copy), 1.78 of 2.8b (73 %), the kernel alone. What
// limits: instructions one after the other in every phase (130m: without waiting for any word the kernel had taken 0.276
// instead of 0.320 ms when it was first timed so), and three phases of a layer whose weights are too few to hide that behind.
// Rings of the warps' own take 0.283, 0.90 and 1.77: better by a hundredth for the large models, worse by six for the small
// one. Bulk copies of 320 bytes, a warp's part of a row, come at one in 33 cycles.
#include "common/decode_mamba.cuh"

DECODE_KERNELS(decode_mamba, Mamba)
