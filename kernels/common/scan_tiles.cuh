// Tiles of tokens in shared memory: of sequences, and of B and C.
//
// A tile that is WHOLE has all its tokens and channels, packs and pieces that are read at once, softplus and a gate, and no
// marks: what goes through it asks no questions. Others go a slower way.
#pragma once
#include "scan_sums.cuh"

// One raw tile of a sequence in shared memory: [TILE, CHANNELS], in packs of WIDTH channels; a thread has the packs
// threadIdx.x, + THREADS, .. , all of the same channels, and nobody else touches them.
template <typename E, typename F> struct Tile {
    static constexpr int SIZE = F::TILE * F::CHANNELS;
    static constexpr int WIDTH = SIZE / THREADS < Vector<E>::SIZE ? 4 : Vector<E>::SIZE;
    static constexpr int COLUMNS = F::CHANNELS / WIDTH;
    static constexpr int PACKS = SIZE / WIDTH;
    static constexpr int ROWS = THREADS / COLUMNS;
    static constexpr int OWN = PACKS < THREADS ? 1 : PACKS / THREADS;
    using Elements = Pack<E, WIDTH>;

    int token, channel; // of this thread's first pack
    bool live;          // whether its channels exist
    __device__ explicit Tile(const Place<F> &at)
        : token(threadIdx.x / COLUMNS), channel(threadIdx.x % COLUMNS * WIDTH), live(channel < at.count) {}
    __device__ bool has(int v) const { return PACKS >= THREADS || threadIdx.x < PACKS; }
    // This thread's pack `v` of a tile.
    static __device__ Elements get(const E *tile, int v) {
        return reinterpret_cast<const Elements *>(tile)[threadIdx.x + v * THREADS];
    }
};

// A sequence as a thread goes through it, tile by tile, its packs' place moving along.
template <typename E, typename F> struct Walker {
    using T = Tile<E, F>;
    E *place;
    int64_t row; // to the thread's next pack
    __device__ Walker(const Sequence &s, const Place<F> &at, const T &own, int start)
        : place(static_cast<E *>(s.data) + at.row * s.row + (start + own.token) * s.token + at.first + own.channel),
          row(T::ROWS * s.token) {}
    // Of a contiguous sequence, laid out as `s`, without what moves along.
    __device__ Walker(void *data, const Sequence &s, const Place<F> &at, const T &own, int start)
        : place(static_cast<E *>(data) + (at.row * s.row + start * s.token + at.first) +
                (own.token * int(s.token) + own.channel)),
          row(T::ROWS * s.token) {}
    // From `first`, the thread's place at token 0, on.
    __device__ Walker(E *first, const Sequence &s, int start) : place(first + start * s.token), row(T::ROWS * s.token) {}
    // Moves by whole tiles.
    __device__ __forceinline__ void move(const Sequence &s, int tiles) { place += tiles * F::TILE * s.token; }

    // Asks for the thread's packs among the next `left` tokens of the block's channels. Packs beyond them are left as they
    // are; channels beyond them in a pack become zero.
    __device__ __forceinline__ void fetch(E *tile, const Place<F> &at, const T &own, int left, bool aligned) const {
        if (aligned) {
#pragma unroll
            for (int v = 0; v < T::OWN; ++v)
                if (own.has(v) && own.live && own.token + v * T::ROWS < left)
                    copy_async<sizeof(typename T::Elements)>(tile + (threadIdx.x + v * THREADS) * T::WIDTH,
                                                             place + v * row);
        } else {
            int thread = threadIdx.x;
            asm volatile("" : "+r"(thread));
            for (int v = 0; v < T::OWN; ++v)
                for (int k = 0; k < T::WIDTH; ++k)
                    if (own.has(v) && own.token + v * T::ROWS < left)
                        tile[(thread + v * THREADS) * T::WIDTH + k] =
                            own.channel + k < at.count ? place[v * row + k] : narrow<E>(0.0f);
        }
    }
    // The same of a tile whose tokens and channels are all there, in whole packs.
    __device__ __forceinline__ void fetch(E *tile) const {
#pragma unroll
        for (int v = 0; v < T::OWN; ++v)
            copy_async<sizeof(typename T::Elements)>(tile + (threadIdx.x + v * THREADS) * T::WIDTH, place + v * row);
    }
    // The thread's pack `v`, at once.
    __device__ __forceinline__ typename T::Elements load(const Place<F> &at, const T &own, int v) const {
        typename T::Elements x = {};
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k)
            if (own.channel + k < at.count) x.at[k] = place[v * row + k];
        return x;
    }
    // Writes the thread's pack `v`.
    __device__ __forceinline__ void store(const Place<F> &at, const T &own, int v, const typename T::Elements &x,
                                          bool aligned) const {
        E *to = place + v * row;
        if (aligned) {
            *reinterpret_cast<typename T::Elements *>(to) = x;
        } else {
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k)
                if (own.channel + k < at.count) to[k] = x.at[k];
        }
    }
};

// B, C or both of a block: a raw tile in shared memory on its way to one of f32, [SIDES, TILE, WIDTH], zero beyond N and the
// end. A thread widens the pieces that it has fetched.
template <typename E, typename F, int SIDES> struct Coefficients {
    static constexpr int SIZE = F::TILE * F::WIDTH; // of a side
    // Wide states leave no room to stage their numbers.
    static constexpr bool STAGED = F::SPLIT <= 8;
    static constexpr int RAW = STAGED ? SIDES * SIZE : Vector<E>::SIZE;
    // Numbers that are read at once: few enough that all threads have some.
    static constexpr int PIECE = SIDES * SIZE / THREADS >= Vector<E>::SIZE ? Vector<E>::SIZE : 4;
    static constexpr int PIECES = SIZE / PIECE, OF_TOKEN = F::WIDTH / PIECE;
    static constexpr int PASSES = (SIDES * PIECES + THREADS - 1) / THREADS;
    static constexpr int64_t MOST_STEP = INT32_MAX / (F::TILE * int(sizeof(E)));
    using Piece = Pack<E, PIECE>;

    const char *from[PASSES]; // the thread's pieces of the tile that is fetched next
    int step[PASSES];         // bytes to those of the tile behind it
    int n;
    bool whole; // whether every token's numbers are read in pieces, WIDTH of them
    __device__ Coefficients(const Coefficient &first, const Coefficient &second, const Place<F> &at, int start, int n,
                            int aligned)
        : n(n), whole(STAGED && aligned && n == F::WIDTH && (sizeof(E) == 4 || !first.wide && !second.wide) &&
                      max(first.token, second.token) < MOST_STEP) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int i = threadIdx.x + pass * THREADS;
            const Coefficient &x = SIDES == 1 || i < PIECES ? first : second;
            step[pass] = F::TILE * x.token * int(sizeof(E));
            from[pass] = static_cast<const char *>(x.data) +
                         (at.row * x.row + at.first / x.width * x.group + (start + token(i)) * x.token +
                          i % OF_TOKEN * PIECE) * int(sizeof(E));
        }
    }
    static __device__ __forceinline__ int token(int i) { return i % PIECES / OF_TOKEN; }
    static __device__ __forceinline__ bool has(int i) { return SIDES * PIECES % THREADS == 0 || i < SIDES * PIECES; }

    // Asks for the pieces of the next `left` tokens.
    template <bool WHOLE> __device__ __forceinline__ void fetch(E *raw, int left) const {
        if (!WHOLE && !whole) return;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            int i = threadIdx.x + pass * THREADS;
            if (has(i) && (WHOLE || token(i) < left)) copy_async<sizeof(Piece)>(raw + i * PIECE, from[pass]);
        }
    }
    // Moves by whole tiles.
    __device__ __forceinline__ void move(int tiles) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) from[pass] += tiles * step[pass];
    }
    // COPIES of the tile, so far apart, with numbers that are `turned`.
    template <bool WHOLE, int COPIES = 1, int APART = 0>
    __device__ __forceinline__ void widen_tile(float *tile, const E *raw, const Coefficient &first,
                                               const Coefficient &second, const Place<F> &at, int start) const {
        if (WHOLE || whole) {
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                int i = threadIdx.x + pass * THREADS;
                if (!has(i)) break;
                float values[PIECE] = {};
                if (WHOLE || start + token(i) < at.end) widen(values, reinterpret_cast<const Piece *>(raw)[i]);
#pragma unroll
                for (int copy = 0; copy < COPIES; ++copy) {
                    float other[PIECE];
#pragma unroll
                    for (int k = 0; k < PIECE; ++k) other[k] = values[k ^ turned(copy)];
                    store_floats(tile + copy * APART + i * PIECE, other);
                }
            }
        } else {
            int thread = threadIdx.x;
            asm volatile("" : "+r"(thread)); // or what this rare way needs of it would wait in registers
            for (int i = thread; i < SIDES * SIZE; i += THREADS) {
                const Coefficient &x = i < SIZE ? first : second;
                int token = i % SIZE / F::WIDTH, k = i % F::WIDTH;
                int64_t place = at.row * x.row + at.first / x.width * x.group + (start + token) * x.token + k;
                float value = 0.0f;
                if (start + token < at.end && k < n)
                    value = x.wide ? static_cast<const float *>(x.data)[place] : widen(static_cast<const E *>(x.data)[place]);
                for (int copy = 0; copy < COPIES; ++copy) tile[copy * APART + (i ^ turned(copy))] = value;
            }
        }
    }
};
