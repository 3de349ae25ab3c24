// A step of decoding of RetNet models as one kernel; decode_mamba.cu has the grid and what the families share.
//
// Registers: 164 for one row (f32: 168, all there are), 168 for more, of which a few are spilled.
//
// Bytes: the weights, once, and the states, read and written once: 8 B H K V a sequence and layer. On three H200 (a copy: 4.27
// TB/s) one row takes 0.943 to 0.960 ms in bf16 in a RetNet of 1.3b parameters with 8 heads of K 256, V 512, from call to call
// of Decoder::step_greedy: 74 to 75 % of the rate of a copy of its 3.02 GB of weights, 79 % with 0.2 GB of states; 0.85 ms with
// 32 heads of K 64, V 128: 83 %. Eight rows: 2.8 and 2.0 ms. What limits: writing the states takes 0.04 ms where heads are wide
// (K 256, V 512), and between RETAIN and the next products the ring is full before the words are there.
#include "common/decode_retnet.cuh"

DECODE_KERNELS(decode_retnet, RetNet)
