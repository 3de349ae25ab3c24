// A step of decoding of RetNet models as one kernel; see decode_step.cu.
#include "common/decode_retnet.cuh"

DECODE_KERNELS(decode_retnet, RetNet)
