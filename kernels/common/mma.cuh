// Products of small matrices on the tensor cores, sums in f32, and the tiles of shared memory that they read.
//
// Fragments are a warp's: A of 16 x 16, B of 16 x 8, C of 16 x 8 numbers. Lane 4 g + t has rows g and g + 8 of A and C,
// column g of B, and columns 2t and 2t + 1 of C. Elements of 16 bits go through one instruction. Those of f32 are split
// into two tf32 numbers each, whose three products keep 21 bits ("3xTF32"); along the dimension that is summed, a lane
// has the neighbours 2t and 2t + 1 in both operands, so that C becomes A without moving between lanes, in either type.
#pragma once
#include "types.cuh"

struct C16x8 {
    float at[4] = {}; // rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
};

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <typename E> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&both);
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&both);
}
template <typename E> __device__ __forceinline__ float2 unpack(uint32_t both);
template <> __device__ __forceinline__ float2 unpack<bf16>(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<f16>(uint32_t both) {
    return __half22float2(*reinterpret_cast<__half2 *>(&both));
}

// ROWS x COLUMNS elements in panels of 128 bytes' width, their 16-byte pieces permuted within a row so that the accesses
// below meet no bank twice. The tile begins on a multiple of 128 bytes.
template <typename E, int ROWS, int COLUMNS> struct Tile {
    static constexpr int WIDTH = 16 / sizeof(E), PANEL = 128 / sizeof(E);
    static constexpr int SIZE = ROWS * (COLUMNS < PANEL ? PANEL : COLUMNS);

    static __device__ __forceinline__ int swizzle(int row) {
        return sizeof(E) == 2 ? row & 7 : ((row & 3) ^ (row >> 2 & 1)) << 1;
    }
    // Bytes from the tile's beginning.
    static __device__ __forceinline__ int place(int row, int column) {
        int piece = column % PANEL / WIDTH;
        return (column / PANEL * ROWS + row) * 128 + ((piece ^ swizzle(row)) * 16) + column % WIDTH * sizeof(E);
    }
    // The same plus (rows, columns), multiples of 8 and 16, known to the compiler.
    static __device__ __forceinline__ int place(int row, int column, int rows, int columns) {
        return (place(row, column) ^ (columns % PANEL / WIDTH * 16)) + (columns / PANEL * ROWS + rows) * 128;
    }
};

template <typename E> struct Fragments {
    struct A {
        uint32_t at[4]; // (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), two columns each
    };
    struct B {
        uint32_t at[2]; // (2t, g), (2t + 8, g), two rows each
    };
    struct B2 {
        B at[2];
    };

    static __device__ __forceinline__ void load4(uint32_t (&to)[4], uint32_t address) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    }
    static __device__ __forceinline__ void load4_transposed(uint32_t (&to)[4], uint32_t address) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    }
    // Rows and columns of the tile as rows and columns of A.
    template <typename T> static __device__ __forceinline__ A a(uint32_t tile, int row, int column) {
        int lane = threadIdx.x % 32;
        A a;
        load4(a.at, tile + T::place((lane >> 3 & 1) * 8 + (lane & 7), (lane >> 4) * 8, row, column));
        return a;
    }
    // Columns of the tile as rows of A.
    template <typename T> static __device__ __forceinline__ A a_transposed(uint32_t tile, int row, int column) {
        int lane = threadIdx.x % 32;
        A a;
        load4_transposed(a.at, tile + T::place((lane >> 4) * 8 + (lane & 7), (lane >> 3 & 1) * 8, row, column));
        return a;
    }
    // Sixteen rows of the tile as columns of two neighbouring B.
    template <typename T> static __device__ __forceinline__ B2 b_transposed(uint32_t tile, int row, int column) {
        int lane = threadIdx.x % 32;
        uint32_t b[4];
        load4(b, tile + T::place((lane >> 4) * 8 + (lane & 7), (lane >> 3 & 1) * 8, row, column));
        return {{{b[0], b[1]}, {b[2], b[3]}}};
    }
    // Sixteen columns of the tile as columns of two neighbouring B.
    template <typename T> static __device__ __forceinline__ B2 b(uint32_t tile, int row, int column) {
        int lane = threadIdx.x % 32;
        uint32_t b[4];
        load4_transposed(b, tile + T::place((lane >> 3 & 1) * 8 + (lane & 7), (lane >> 4) * 8, row, column));
        return {{{b[0], b[1]}, {b[2], b[3]}}};
    }
    // Two neighbouring C, times `factor`, as A.
    static __device__ __forceinline__ A a(const C16x8 &left, const C16x8 &right, float factor) {
        const float *l = left.at, *r = right.at, f = factor;
        return {{pack<E>(f * l[0], f * l[1]), pack<E>(f * l[2], f * l[3]), pack<E>(f * r[0], f * r[1]),
                 pack<E>(f * r[2], f * r[3])}};
    }
    // Each column of A times its weight.
    static __device__ __forceinline__ void weigh(A &a, const float *weights) {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float2 w = *reinterpret_cast<const float2 *>(weights + half * 8 + 2 * t);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float2 x = unpack<E>(a.at[2 * half + i]);
                a.at[2 * half + i] = pack<E>(x.x * w.x, x.y * w.y);
            }
        }
    }
    // Two neighbours of a row of C, at (row, column) of the tile.
    template <typename T>
    static __device__ __forceinline__ void put(char *tile, int row, int column, float low, float high) {
        *reinterpret_cast<uint32_t *>(tile + T::place(row, column)) = pack<E>(low, high);
    }
    static __device__ __forceinline__ void multiply(C16x8 &c, const A &a, const B &b);
};

template <> __device__ __forceinline__ void Fragments<bf16>::multiply(C16x8 &c, const A &a, const B &b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
                 : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])
                 : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}
template <> __device__ __forceinline__ void Fragments<f16>::multiply(C16x8 &c, const A &a, const B &b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])
                 : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

// The nearest tf32 number, and that of the rest.
struct Split {
    uint32_t big, small;
    __device__ __forceinline__ explicit Split(float x) {
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(big) : "f"(x));
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(small) : "f"(x - __uint_as_float(big)));
    }
};

template <> struct Fragments<float> {
    struct A {
        float at[8]; // per half of 8 columns: (g, 2t), (g + 8, 2t), (g, 2t + 1), (g + 8, 2t + 1)
    };
    struct B {
        float at[4]; // per half of 8 rows: (2t, g), (2t + 1, g)
    };
    struct B2 {
        B at[2];
    };

    static __device__ __forceinline__ float load(uint32_t address) {
        float x;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
        return x;
    }
    static __device__ __forceinline__ float2 load2(uint32_t address) {
        float2 x;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
        return x;
    }
    template <typename T> static __device__ __forceinline__ A a(uint32_t tile, int row, int column) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        A a;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float2 up = load2(tile + T::place(row + g, column + half * 8 + 2 * t));
            float2 low = load2(tile + T::place(row + g + 8, column + half * 8 + 2 * t));
            a.at[4 * half] = up.x, a.at[4 * half + 1] = low.x, a.at[4 * half + 2] = up.y, a.at[4 * half + 3] = low.y;
        }
        return a;
    }
    template <typename T> static __device__ __forceinline__ A a_transposed(uint32_t tile, int row, int column) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        A a;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            a.at[i] = load(tile + T::place(row + i / 4 * 8 + 2 * t + (i >> 1 & 1), column + g + (i & 1) * 8));
        return a;
    }
    template <typename T> static __device__ __forceinline__ B2 b_transposed(uint32_t tile, int row, int column) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        B2 b;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 x = load2(tile + T::place(row + i / 2 * 8 + g, column + (i & 1) * 8 + 2 * t));
            b.at[i / 2].at[(i & 1) * 2] = x.x, b.at[i / 2].at[(i & 1) * 2 + 1] = x.y;
        }
        return b;
    }
    template <typename T> static __device__ __forceinline__ B2 b(uint32_t tile, int row, int column) {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        B2 b;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            b.at[i / 4].at[i % 4] = load(tile + T::place(row + (i >> 1 & 1) * 8 + 2 * t + (i & 1), column + i / 4 * 8 + g));
        return b;
    }
    static __device__ __forceinline__ A a(const C16x8 &left, const C16x8 &right, float factor) {
        const float *l = left.at, *r = right.at, f = factor;
        return {{f * l[0], f * l[2], f * l[1], f * l[3], f * r[0], f * r[2], f * r[1], f * r[3]}};
    }
    static __device__ __forceinline__ void weigh(A &a, const float *weights) {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) a.at[i] *= weights[i / 4 * 8 + 2 * t + (i >> 1 & 1)];
    }
    template <typename T>
    static __device__ __forceinline__ void put(char *tile, int row, int column, float low, float high) {
        *reinterpret_cast<float2 *>(tile + T::place(row, column)) = make_float2(low, high);
    }
    static __device__ __forceinline__ void multiply(C16x8 &c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ void multiply(C16x8 &c, const A &a, const B &b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t big[4], small[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Split x(a.at[4 * half + i]);
                big[i] = x.big, small[i] = x.small;
            }
            Split b0(b.at[2 * half]), b1(b.at[2 * half + 1]);
            multiply(c, small, b0.big, b1.big);
            multiply(c, big, b0.small, b1.small);
            multiply(c, big, b0.big, b1.big);
        }
    }
};
