// A step's phases: what they are given, and what is common to them: inputs, norms, products and what becomes of these.
#pragma once
#include "decode_products.cuh"

constexpr unsigned NONE = ~0u;

// Kinds of phases that all models have; families of blocks go on from OWN.
enum { ADD, HEAD, OWN };

struct Norm {
    const float *weight, *bias; // [K]; the bias may be null
    int layer, outside;
    float eps;
    int padding;
};

// What phases of all models have.
struct Phase {
    int kind, layer;
    const Word *from; // [R, width] the activations that are its inputs; null: the stream
    int width, first; // first: the stream begins here
    Norm norm;        // of the stream
    const void *bias; // of the projection, or null
};

// What steps of all models have.
struct Step {
    const void *phases;
    const Weights *weights; // of the phases, one each
    const Shape *shapes;    // of the weights
    int count, shape_count;
    int rows, tokens, keep;
    int hidden, vocabulary, wide;
    float embedding_scale;
    const unsigned *ids;   // [R]
    const int *slots;      // [R / T]; below zero: idle
    const void *embedding; // [V, hidden]
    void *logits;          // [R, V]
    unsigned *chosen;      // [steps, MOST_ROWS] the most probable tokens; or null
    Word *stream;          // [R, hidden], f32
    Word *best;            // [blocks, MOST_ROWS, 2]
    Copies copies;
    int steps;             // in a row, each with the tokens that the one before has chosen; one where none are
    unsigned *epoch;       // the mark before the step's first, and the blocks that are done
    const unsigned *stops; // [V] bits: the tokens behind which a row ends; or null
    int patience;          // ns for which words are not asked for, where weights have the memory to themselves
    // of shared memory: a block's own part of the stream; bytes of sums, and of a warp's activations; slots of the ring,
    // and groups of a row in a slot at most
    int own_hidden, sums_bytes, x_bytes, ring_slots, slot_groups;

    __device__ int slot_bytes() const { return TILE * pitch_of(WARPS * slot_groups); }
};

// The slot of a row that has ended: below zero, so that its state stays, and none that was idle from the beginning.
constexpr int IDLE = -1;
__device__ __forceinline__ int ended(int slot) { return slot < 0 ? slot : IDLE - 1 - slot; }

// Brings what lies at `from` close: into L2, where no stream of weights is in the way.
__device__ __forceinline__ void hint(const void *from, int bytes) {
    constexpr int LINE = 128;
#pragma unroll 1
    for (int at = lane_of() * LINE; at < bytes + LINE - 1; at += LANES * LINE)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char *>(from) + min(at, bytes - 1)));
}

// The sum of the warps' parts, `apart` numbers from each other.
__device__ __forceinline__ float sum_of_warps(const Share &share, const float *at, int apart) {
    float part[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) part[w] = w < share.warps ? at[w * apart] : 0.0f;
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}
static_assert(WARPS == 8, "as many parts");

// What all warps of a block know.
struct Board {
    float row_sums[2][WARPS][MOST_ROWS]; // used in turn, so that one barrier is enough
    unsigned ids[MOST_ROWS];             // the tokens of the step
    int slots[MOST_ROWS];                // of the sequences; below zero: idle, or ended
    int steps[MOST_ROWS];                // that each row has had
};

// A block's memory and what it knows throughout a step. With many rows, words come in larger groups.
template <typename E, bool MANY> struct Block {
    static constexpr bool IS_MANY = MANY;
    const Step &p;
    Board &board;
    uint32_t mark;                       // of the current phase; its inputs have that of the phase before
    float *sums;                         // of the current phase's products, see multiply
    float *own_stream;                   // [R, own_hidden]
    char *x;                             // the warp's own activations

    // Those who finish: warps of their own, or all that multiply.
    static constexpr int FINISHERS = FINISHERS_OF<MANY>, FINISH_THREADS = (FINISHERS ? FINISHERS : WARPS) * LANES;
    static constexpr int CREWS = THREADS + FINISHERS * LANES; // threads that multiply or finish
    __device__ static int finisher() { return threadIdx.x - (FINISHERS ? THREADS : 0); }
    __device__ static void meet_finishers() { meet(FINISHERS ? FINISHERS_ALONE : MULTIPLIERS, FINISH_THREADS); }

    __device__ char *all_x() const { return x - warp_of() * p.x_bytes; } // those of all warps
    __device__ int rows() const { return MANY ? p.rows : 1; }
    __device__ int tokens() const { return MANY ? p.tokens : 1; }
    __device__ int sequences() const { return MANY && p.tokens > 1 ? Divide(p.tokens)(p.rows) : rows(); }

    __device__ float embedded(int row, int k) const {
        E e = static_cast<const E *>(p.embedding)[int64_t(board.ids[row]) * p.hidden + k];
        return p.embedding_scale == 1.0f ? widen(e) : widen(narrow<E>(widen(e) * p.embedding_scale));
    }
    // Where a phase's inputs lie, which are elements as they come, or norms in the place of the numbers of the stream.
    __device__ Input input_of(const Share &share, bool norms) const {
        return {shared_address(x), pitch_of(share.groups * (MANY && norms ? 4 / int(sizeof(E)) : 1))};
    }
    // The warp's own elements, as the products take them.
    template <typename F = Unchanged> __device__ void take(const Phase &phase, const Share &share, F &&change = F()) {
        int row_pairs = words_of<E>(phase.width) / 2;
        Pairs pairs(share.size * (GROUP / 8), share.pieces);
        const Word *from = p.copies.own(phase.from);
        if (MANY)
            receive_rows(from, 2 * row_pairs, rows(), pairs, row_pairs, mark - 1, x, input_of(share, false).pitch, change);
        else
            receive(from, pairs, row_pairs, mark - 1, x, change);
        __syncwarp();
    }
    // Pairs of the stream's numbers that the warp has the norms of.
    __device__ Pairs stream_pairs(const Share &share) const {
        return Pairs(share.size * (GROUP / 2) / int(sizeof(E)), share.pieces);
    }
    // The warp's own part of the norms of the stream's rows, as elements. The first phase has the stream from the
    // embedding.
    __device__ void take_norm(const Norm &norm, const Share &share, bool first) {
        if (!MANY) {
            int pairs = stream_pairs(share).count;
            if (pairs <= NEAR_PAIRS * LANES) return take_norm_once<NEAR_PAIRS>(norm, share, first);
            if (pairs <= AT_ONCE * LANES) return take_norm_once<AT_ONCE>(norm, share, first);
        }
        take_norms(norm, share, first);
    }
    // One row, of which a lane has COUNT pairs at most.
    template <int COUNT> __device__ void take_norm_once(const Norm &norm, const Share &share, bool first) {
        Pairs pairs = stream_pairs(share);
        int layer = norm.layer, outside = norm.outside, left = pairs.count - lane_of();
        float eps = norm.eps;
        uint32_t to = shared_address(x) + lane_of() * int(sizeof(Pack<E, 2>));
        known(layer), known(outside), known(left), known(eps), known(to);
        float2 weight[COUNT], bias[COUNT], value[COUNT]; // parameters on their way while the stream is not there
        const Word *from[COUNT];
        bool has[COUNT];
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            int i = lane_of() + m * LANES, at = pairs(i);
            weight[m] = bias[m] = value[m] = {0.0f, 0.0f};
            from[m] = p.copies.own(p.stream) + 2 * at;
            has[m] = i < pairs.count && at < p.hidden / 2;
            if (!has[m]) continue;
            weight[m] = reinterpret_cast<const float2 *>(norm.weight)[at];
            if (norm.bias) bias[m] = reinterpret_cast<const float2 *>(norm.bias)[at];
            if (first) value[m] = {embedded(0, 2 * at), embedded(0, 2 * at + 1)};
        }
        if (!first) {
            Words w[COUNT];
            await(w, from, has, mark - 1);
#pragma unroll
            for (int m = 0; m < COUNT; ++m)
                if (has[m]) value[m] = {__uint_as_float(uint32_t(w[m].at[0])), __uint_as_float(uint32_t(w[m].at[1]))};
        }
        float mean = 0.0f, square = 0.0f, each = 1.0f / p.hidden;
        // over the row, of f(number)
        auto mean_of = [&](int pass, auto &&f) {
            float sum = 0.0f;
#pragma unroll
            for (int m = 0; m < COUNT; ++m)
                if (has[m]) sum += f(value[m]);
            sum = warp_sum(sum);
            float *sums = board.row_sums[pass][0];
            if (lane_of() == 0) sums[warp_of()] = sum;
            meet();
            return sum_of_warps(share, sums, 1) * each;
        };
        if (layer) {
            mean = mean_of(0, [](float2 v) { return v.x + v.y; });
#pragma unroll
            for (int m = 0; m < COUNT; ++m) value[m].x -= mean, value[m].y -= mean;
        }
        square = mean_of(1, [](float2 v) { return fmaf(v.x, v.x, v.y * v.y); });
        float scale = outside ? 1.0f / (sqrtf(square) + eps) : rsqrtf(square + eps);
        auto normed = [&](float v, float weight, float bias) {
            float n = v * scale;
            return narrow<E>(fmaf(layer ? n : widen(narrow<E>(n)), weight, bias));
        };
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            if (m * LANES < left)
                store_shared(to + m * LANES * int(sizeof(Pack<E, 2>)),
                             Pack<E, 2>{normed(value[m].x, weight[m].x, bias[m].x), normed(value[m].y, weight[m].y, bias[m].y)});
        }
        __syncwarp();
    }
    // Rows of any width. A lane has the same columns of all of them, and leaves its numbers where elements will be.
    __device__ void take_norms(const Norm &norm, const Share &share, bool first) {
        constexpr int COUNT = MANY ? AT_ONCE : NEAR_PAIRS, STEP = COUNT * LANES; // one row rarely is so wide
        Pairs pairs = stream_pairs(share);
        int end = p.hidden / 2, pitch = input_of(share, true).pitch, layer = norm.layer, outside = norm.outside;
        float eps = norm.eps;
        // a lane's pairs from `start` on: f(which, place among the warp's)
        auto columns = [&](int start, auto &&f) {
#pragma unroll
            for (int m = 0; m < COUNT; ++m)
                if (int i = start + m * LANES; i < pairs.count) f(m, i);
        };
        float2 weight[COUNT], bias[COUNT]; // the first ones on their way while the stream is not there
        auto load_weights = [&](int start) {
            columns(start, [&](int m, int i) {
                int at = pairs(i);
                weight[m] = bias[m] = {0.0f, 0.0f};
                if (at < end) weight[m] = reinterpret_cast<const float2 *>(norm.weight)[at];
                if (at < end && norm.bias) bias[m] = reinterpret_cast<const float2 *>(norm.bias)[at];
            });
        };
        load_weights(lane_of());
        if (!first && MANY)
            receive_rows(p.copies.own(p.stream), p.hidden, rows(), pairs, end, mark - 1, x, pitch, Unchanged());
        else if (!first)
            receive(p.copies.own(p.stream), pairs, end, mark - 1, x, Unchanged());
        else
#pragma unroll 1
            for (int row = 0; row < rows(); ++row)
#pragma unroll 1
                for (int i = lane_of(); i < pairs.count; i += LANES) {
                    float2 v = {0.0f, 0.0f};
                    if (int at = pairs(i); at < end) v = {embedded(row, 2 * at), embedded(row, 2 * at + 1)};
                    *reinterpret_cast<float2 *>(x + row * pitch + i * 8) = v;
                }
        // over each row, of f(number, mean), in the lane whose number modulo MOST_ROWS it has
        auto mean_of = [&](int pass, float mean, auto &&f) {
            constexpr int TOGETHER = MANY ? 4 : 1; // rows, whose sums wait for each other's sake less
#pragma unroll 1
            for (int row = 0; row < rows(); row += TOGETHER) {
                float own[TOGETHER], sum[TOGETHER];
#pragma unroll
                for (int t = 0; t < TOGETHER; ++t) own[t] = __shfl_sync(~0u, mean, row + t), sum[t] = 0.0f;
#pragma unroll 1
                for (int start = lane_of(); start - lane_of() < pairs.count; start += STEP)
                    columns(start, [&](int, int i) {
#pragma unroll
                        for (int t = 0; t < TOGETHER; ++t)
                            if (row + t < rows())
                                sum[t] += f(*reinterpret_cast<float2 *>(x + (row + t) * pitch + i * 8), own[t], i);
                    });
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2)
#pragma unroll
                    for (int t = 0; t < TOGETHER; ++t) sum[t] += __shfl_xor_sync(~0u, sum[t], step);
#pragma unroll
                for (int t = 0; t < TOGETHER; ++t)
                    if (lane_of() == 0) board.row_sums[pass][warp_of()][row + t] = sum[t];
            }
            meet();
            return sum_of_warps(share, &board.row_sums[pass][0][lane_of() % MOST_ROWS], MOST_ROWS) / p.hidden;
        };
        float mean = 0.0f, square;
        if (layer) {
            mean = mean_of(0, 0.0f, [](float2 v, float, int) { return v.x + v.y; });
            square = mean_of(1, mean, [&](float2 v, float mean, int i) {
                v.x -= mean, v.y -= mean;
                return pairs(i) < end ? fmaf(v.x, v.x, v.y * v.y) : 0.0f;
            });
        } else {
            square = mean_of(1, 0.0f, [](float2 v, float, int) { return fmaf(v.x, v.x, v.y * v.y); });
        }
        float scale = 1.0f / (outside ? sqrtf(square) + eps : sqrtf(square + eps));
#pragma unroll 1
        for (int start = lane_of(); start - lane_of() < pairs.count; start += STEP) {
            if (start >= STEP) load_weights(start);
#pragma unroll 1
            for (int row = 0; row < rows(); ++row) {
                float own_mean = __shfl_sync(~0u, mean, row), own_scale = __shfl_sync(~0u, scale, row);
                auto normed = [&](float v, float weight, float bias) {
                    float n = (v - own_mean) * own_scale;
                    return narrow<E>(fmaf(layer ? n : widen(narrow<E>(n)), weight, bias));
                };
                char *own = x + row * pitch;
                float2 value[COUNT];
                columns(start, [&](int m, int i) { value[m] = *reinterpret_cast<float2 *>(own + i * 8); });
                // elements take the place of numbers that all lanes have
                __syncwarp();
                columns(start, [&](int m, int i) {
                    reinterpret_cast<Pack<E, 2> *>(own)[i] = {normed(value[m].x, weight[m].x, bias[m].x),
                                                              normed(value[m].y, weight[m].y, bias[m].y)};
                });
            }
        }
        __syncwarp();
    }
    // The block's own part of the stream, before the first layer.
    __device__ void begin_stream(const Share &share) {
        Divide by(share.count);
#pragma unroll 1
        for (int i = finisher(); i < share.count * rows(); i += FINISH_THREADS) {
            int r = by(i), k = i - r * share.count;
            own_stream[r * p.own_hidden + k] = embedded(r, share.first + k);
        }
    }
    // Where that of output `own` of the tiles that are there lies, for row `row`.
    __device__ const float *place_of_sum(int own, int row) const {
        return sums + (own / TILE * rows() + row) * WARPS * TILE + own % TILE;
    }
};

// An output of a block in the rows of one sequence.
template <bool MANY> struct Task {
    int row, sequence;         // the first row
    int segment, own, output;  // output `own` of the block's share, `output` of all
    bool live;
    float bias;
    const float *sum;
    float found; // of one row

    __device__ Task() {}
    // Task `task` of those of tiles first to last - 1.
    template <typename E>
    __device__ Task(const Block<E, MANY> &b, const Phase &phase, const Share &share, int task, int first, int last) {
        int sequences = b.sequences(), q = task / TILE;
        int tile = sequences == 1 ? q : Divide(sequences)(q);
        sequence = q - tile * sequences, row = sequence * b.tokens();
        sum = b.place_of_sum(tile * TILE + task % TILE, row);
        tile += first;
        live = tile < last;
        for (segment = 0; tile >= share.tiles && segment + 1 < share.segments; ++segment) tile -= share.tiles;
        own = tile * TILE + task % TILE;
        live = live && own < share.count;
        if (!live) sum = b.sums;
        output = share.first + own;
        bias = 0.0f;
        if (live && phase.bias) bias = widen(static_cast<const E *>(phase.bias)[segment * share.outputs + output]);
    }
    // The value of the only row there is.
    __device__ void find(const Share &share) {
        if (!MANY) found = value_of(share, 0);
    }
    __device__ float value(const Share &share, int t) const { return MANY ? value_of(share, t) : found; }
    // In the row of token t. Nothing where there is no output.
    __device__ float value_of(const Share &share, int t) const {
        float value = sum_of_warps(share, sum + t * WARPS * TILE, TILE) + bias;
        return live ? value : 0.0f;
    }
};
