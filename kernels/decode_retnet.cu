// A step of decoding of RetNet models as one kernel; decode_mamba.cu has the grid and what the families share.
//
// Registers: as there; elsewhere than on Hopper one row takes 168 and some are spilled.
//
// Bytes: the weights, once, and the states, read and written once: 8 B H K V a sequence and layer. On an H200 (a copy: 4.27 TB/s)
// one row takes 0.916 ms in bf16 in a RetNet of 1.3b parameters with 8 heads of K 256, V 512, by Decoder::greedy: 77 % of the
// rate of a copy of its 3.02 GB of weights, 82 % with 0.2 GB of states; 0.812 ms with 32 heads of K 64, V 128: 87 %. Eight rows:
// 2.67 and 1.90 ms. What limits: writing the states takes 0.04 ms where heads are wide (K 256, V 512), and between RETAIN and the
// next products the ring is full before the words are there.
#include "common/decode_retnet.cuh"

DECODE_KERNELS(decode_retnet, RetNet)
