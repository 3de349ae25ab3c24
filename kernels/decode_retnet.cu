// A step of decoding of RetNet models as one kernel; decode_mamba.cu has the grid and what the families share.
//
// Registers: 157 for one row (164 in f32), 168 (all there are, a few spilled) for more.
//
// Bytes: the weights, once, and the states, read and written once: 8 B H K V a sequence and layer. On an H200 (a copy: 4.2
// TB/s) one row, the kernel alone, takes 0.84 ms in bf16 at the shape of fla's RetNet-1.3B (8 heads of K 256, V 512; 2.57 GB
// of weights, 0.2 GB of states): 79 % of the rate of a copy, 73 % by the weights alone; 0.88 ms at the same width with 32 heads
// of K 64, V 128 and 3.03 GB of weights: 83 % and 82 %. Eight rows take 2.4 and 2.2 ms. What limits: between RETAIN and the next
// products a ring is full before the words are there.
#include "common/decode_retnet.cuh"

DECODE_KERNELS(decode_retnet, RetNet)
