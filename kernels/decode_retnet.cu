// A step of decoding of RetNet models as one kernel; decode_mamba.cu has the grid and what the families share.
//
// Registers: 157 for one row (164 in f32), 168 (all there are, a few spilled) for more.
//
// Bytes: the weights, once, and the states, read and written once: 8 B H K V a sequence and layer. On an H200 (a copy: 4.26
// TB/s) one row, the kernel alone, takes 0.84 ms in bf16 at the shape of fla's RetNet-1.3B (8 heads of K 256, V 512; 2.57 GB
// of weights, 0.2 GB of states): 77 % of the rate of a copy, 72 % by the weights alone; 0.87 ms at the same width with 32 heads
// of K 64, V 128 and 3.03 GB of weights: 83 % and 81 %. Eight rows take 2.3 and 2.2 ms. What limits: writing the states takes
// 0.04 ms of it, and between RETAIN and the next products a ring is full before the words are there.
#include "common/decode_retnet.cuh"

DECODE_KERNELS(decode_retnet, RetNet)
