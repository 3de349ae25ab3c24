// A step of decoding of Mamba models as one kernel: a program of phases for up to 8 rows (8 tokens of one sequence, or one of
// 8, or between).
//
// Grid: one block a multiprocessor, all there at once (a cooperative launch), 8 warps that multiply and 4 that copy (on Hopper
// two are enough, and the others bring close what else will be needed). Every phase is a product of a few rows with a matrix
// whose outputs are shared by the blocks, and what follows from it alone. Weights stream past the phases into a ring of shared
// memory, rows as they lie (decode_stream.cuh); activations go from block to block as words that say themselves when they are
// there (decode.cuh).
//
// All phases share one loop (decode_loop.cuh), and so the code of what they have in common: a program that goes in circles
// has to stay in the instruction cache. Registers: 163 for one row, 168 (all there are) for more. Shared memory: what there is.
//
// Bytes: the weights, once; all else is small. On an H200 (a copy: 4.27 TB/s; bulk copies alone read 4.6) one row takes 0.25 ms
// in a model of 130m parameters (24 % of what its weights take at the rate of a copy), 0.85 of 1.4b (75 %), 1.65 of 2.8b (79 %),
// the kernel alone; eight rows 0.48, 1.79 and 3.23. What limits, by clocks read on the way: each of the four phases of a layer
// of 130m, 18,000 cycles long, has 600 for its tasks and their loads, 1,000 until words are there, 500 from the inputs to the
// first product, 900 (STATE 1,800) behind the sums. Of 2.8b's 47,000 its weights need 33,000: the ring is full while words are
// waited for, three times between MIX's products and ADD's. Eight rows of 1.4b spend 14,000 of 66,000 on norms, as many on MIX's
// products, whose slots are small beside so many activations, 7,000 on the recurrence.
//
// Tried: a whole ring of weights on its way at once (the words of 2.8b's stream came after 9,400 cycles, not 6,400: FLYING); one
// warp that copies (rows of 1536 bytes came at 2.9 TB/s, not 4.5); the next sequence's state on its way while one moves on
// (eight rows were a tenth slower); rings of the warps' own (an earlier version: a hundredth better for the large models, six
// worse for the small one).
#include "common/decode_mamba.cuh"

DECODE_KERNELS(decode_mamba, Mamba)
