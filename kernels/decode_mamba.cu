// A step of decoding of Mamba models as one kernel: a program of phases for up to 8 rows (8 tokens of one sequence, or one of
// 8, or between).
//
// A launch has up to 16 steps in a row, each with the tokens that the one before has chosen (Step::steps).
//
// Grid: one block a multiprocessor, all there at once (a cooperative launch), 8 warps that multiply and 4 that copy (on Hopper
// two are enough, and the others bring close what else will be needed). Every phase is a product of a few rows with a matrix
// whose outputs are shared by the blocks, and what follows from it alone. Weights stream past the phases into a ring of shared
// memory, rows as they lie (decode_stream.cuh); activations go from block to block as words that say themselves when they are
// there (decode.cuh). On Hopper 4 warps more finish one row's products, while who multiplied waits for the next words.
//
// All phases share one loop (decode_loop.cuh), and so the code of what they have in common: a program that goes in circles
// has to stay in the instruction cache. Registers on Hopper: 152, 120 and 88 for who multiplies, finishes and copies one row,
// 208 and 88 for more rows; elsewhere 168, of which some are spilled. Shared memory: what there is.
//
// Bytes: the weights, once; all else is small. On an H200 (a copy: 4.27 TB/s; bulk copies alone read 4.6), by greedy steps in a
// row through Decoder::greedy, one row takes 0.21 ms in a model of 130m parameters (29 % of what its weights take at the rate of
// a copy), 0.80 of 1.4b (80 %), 1.60 of 2.8b (81 %); eight rows 0.48, 1.78 and 3.23. What limits, by clocks read on the way:
// blocks exchange words in 1,000 to 1,200 cycles, of which some 550 pass before what was stored can be seen and 300 to 450 for
// every time it is asked for: four times a layer of 130m, of some 14,000 cycles; the norm has 1,000 of them, products 700 to
// 1,300 a phase, what follows the sums 400 (STATE 1,000). Of 2.8b's layer its weights need three quarters: the ring is full
// while words are waited for.
//
// Tried: a whole ring of weights on its way at once (the words of 2.8b's stream came after 9,400 cycles, not 6,400: FLYING); one
// warp that copies (rows of 1536 bytes came at 2.9 TB/s, not 4.5); the next sequence's state on its way while one moves on
// (eight rows were a tenth slower); rings of the warps' own (an earlier version: a hundredth better for the large models, six
// worse for the small one). Of one row of 130m, with warps that finish: words asked for before this block's own went, 7 %
// slower, for who asks is in the way of who stores; a pause between two askings, 4 %; waiting for weights before words, 3 %; code
// for two slots of one tile at once, 3 %; a dry run of the products for the instruction cache's sake, a quarter. For that cache:
// what a kind does is found before its sums are there (5 % faster), inputs are taken within the loop over tiles (6 %), no more
// than five numbers of groups have code of their own (2 %).
#include "common/decode_mamba.cuh"

DECODE_KERNELS(decode_mamba, Mamba)
