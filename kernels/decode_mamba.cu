// A step of decoding of Mamba models as one kernel: a program of phases for up to 8 rows (8 tokens of one sequence, or one of
// 8, or between).
//
// Grid: one block a multiprocessor, all there at once (a cooperative launch), 8 warps that multiply and 4 that copy. Every
// phase is a product of a few rows with a matrix whose outputs are shared by the blocks, and what follows from it alone.
// Weights stream past the phases into rings of shared memory (decode_stream.cuh); activations go from block to block as
// words that say themselves when they are there (decode.cuh).
//
// All phases share one loop (decode_loop.cuh), and so the code of what they have in common: a program that goes in circles
// has to stay in the instruction cache. Registers: 148 for one row, 168 (all there are, a few spilled) for more. Shared
// memory: what there is.
//
// Bytes: the weights, once; all else is small. On an H200 one row, the kernel alone, takes 0.32 ms in a model of 130m
// parameters, 0.94 of 1.4b (69 % of what its weights take at the rate of a copy, 4.2 TB/s), 1.87 of 2.8b (70 %); eight rows
// of 2.8b 4.5 ms. What limits: a phase costs 2 us beside its weights (130m), half of it the way of the words, half
// instructions one after the other; three phases of a layer have too few weights to hide that behind; with many rows the
// words themselves, eight bytes for four, read by every block.
#include "common/decode_mamba.cuh"

DECODE_KERNELS(decode_mamba, Mamba)
