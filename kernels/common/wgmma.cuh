// Products on Hopper's tensor cores: 64 x N sums in f32 of a warpgroup, operands of 16 bits, 16 at a time along the sum.
//
// A lies in shared memory or in registers, B in shared memory, both in the tiles of mma.cuh, on multiples of 1024 bytes.
// Warp w of the group has rows 16 w.. of A and of the sums, lane by lane as fragments A and C of mma.cuh. An operand is
// "along" if the dimension that is summed runs along the tile's rows (the usual case), else "across".
#pragma once
#include "mma.cuh"

// A tile of shared memory as the hardware takes it. Across, PANELS of 64 columns lie `panel` bytes apart.
__device__ __forceinline__ uint64_t describe(uint32_t address, uint32_t panel = 16) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = uint64_t(1024 >> 4) << 32;
    return SWIZZLE_128 | EIGHT_ROWS | uint64_t(panel >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product whose registers have been written, and around those in flight.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// What this thread wrote to shared memory becomes visible to the tensor cores, behind the next barrier to those of others.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// c = a b, or c += a b.
template <typename E, int N> struct Products;

#define SUM1(i) "+f"(c[(i) / 4].at[(i) % 4])
#define SUM4(i) SUM1(i), SUM1(i + 1), SUM1(i + 2), SUM1(i + 3)
#define SUM16(i) SUM4(i), SUM4(i + 4), SUM4(i + 8), SUM4(i + 12)
#define SUM32(i) SUM16(i), SUM16(i + 16)
#define SUM64(i) SUM32(i), SUM32(i + 32)
#define SUM128(i) SUM64(i), SUM64(i + 64)
#define NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32                                                                                                        \
    NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                                        \
    NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES128                                                                                                       \
    NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
            "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
            "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
            "%121, %122, %123, %124, %125, %126, %127"
#define PRODUCTS(E, KIND, N, COUNT, I0, I1, I2, I3, I4, I5)                                                            \
    template <> struct Products<E, N> {                                                                                \
        using Sums = C16x8[N / 8];                                                                                     \
        /* both from shared memory */                                                                                  \
        template <bool A_ACROSS, bool B_ACROSS>                                                                        \
        static __device__ __forceinline__ void multiply(Sums &c, uint64_t a, uint64_t b, bool add) {                   \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
                         "k16.f32." KIND "." KIND " {" NAMES##COUNT "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4  \
                         "; }"                                                                                         \
                         : SUM##COUNT(0)                                                                               \
                         : "l"(a), "l"(b), "r"(int(add)), "n"(int(A_ACROSS)), "n"(int(B_ACROSS)));                     \
        }                                                                                                              \
        /* a from registers */                                                                                         \
        template <bool B_ACROSS>                                                                                       \
        static __device__ __forceinline__ void multiply(Sums &c, const uint32_t (&a)[4], uint64_t b, bool add) {       \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
                         "k16.f32." KIND "." KIND " {" NAMES##COUNT "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3          \
                         "}, %" #I4 ", p, 1, 1, %" PRODUCTS_LAST_##COUNT "; }"                                         \
                         : SUM##COUNT(0)                                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B_ACROSS)));     \
        }                                                                                                              \
    };
#define PRODUCTS_LAST_16 "22"
#define PRODUCTS_LAST_32 "38"
#define PRODUCTS_LAST_64 "70"
#define PRODUCTS_LAST_128 "134"
#define PRODUCTS_OF(E, KIND)                                                                                           \
    PRODUCTS(E, KIND, 32, 16, 16, 17, 18, 19, 20, 21)                                                                  \
    PRODUCTS(E, KIND, 64, 32, 32, 33, 34, 35, 36, 37)                                                                  \
    PRODUCTS(E, KIND, 128, 64, 64, 65, 66, 67, 68, 69)                                                                 \
    PRODUCTS(E, KIND, 256, 128, 128, 129, 130, 131, 132, 133)
PRODUCTS_OF(bf16, "bf16")
PRODUCTS_OF(f16, "f16")
