// Last kernel of the joint attention's backward with Hopper's asynchronous copies and products: for windows
// of a sequence, of a multiple of 64 tokens, without overlap or any of the options but causality. One pass
// over a window: its keys meet its queries for the gradients of keys and values, then its queries meet its
// keys and the landmarks for theirs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/persistent.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/windows.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

template <class S_, int kHeadDim_>
struct WindowGradSm90Traits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    // Warpgroups that compute; of one more, a warp loads tiles, and a warp the queries' numbers.
    static constexpr int kWarpgroups = 2;
    static constexpr int kConsumers = kWarpgroups * kWarpgroupSize;
    static constexpr int kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = kHeadDim == 64 ? 216 : 232;
    static constexpr int kServiceRegisters = 3 * 168 - kWarpgroups * kConsumerRegisters; // 168 each at launch
    static constexpr int kTile = 64;                                                     // rows
    static constexpr int kPanels = kHeadDim / 64, kPanelElements = kTile * 64;           // of 64 columns
    static constexpr int kRowSlots = 2;                                                  // of a warpgroup
    static constexpr int kColumnSlots = kHeadDim == 64 ? 6 : 3;

    // Keys and values, queries and gradients of outputs, or landmark keys and values.
    struct Pair {
        alignas(1024) S first[kPanels * kPanelElements];
        alignas(1024) S second[kPanels * kPanelElements];
    };
    // What the rows of a round get as members of chunks: rows of the chunks, and numbers of the tokens.
    static constexpr int kMostChunks = 40;
    struct Terms {
        alignas(16) S rows[3][kMostChunks * kHeadDim];
        float token_weight[kWarpgroups * kTile], token_grad[kWarpgroups * kTile];
    };
    static_assert(sizeof(Terms) <= sizeof(Pair));
    struct Shared {
        Pair rows[kWarpgroups][kRowSlots];
        Pair columns[kColumnSlots];
        float logsumexp[kColumnSlots][kTile]; // of queries, times log2(e)
        float delta[kColumnSlots][kTile];
        uint64_t rows_full[kWarpgroups][kRowSlots], rows_empty[kWarpgroups][kRowSlots];
        uint64_t columns_full[kColumnSlots], columns_empty[kColumnSlots];
    };
};

struct WindowGradSm90Plan {
    Windows windows;
    int batch, rows;
    int64_t num_windows; // of all sequences
    int num_chunks, chunk_width;
};

struct WindowGradSm90Maps {
    CUtensorMap query, key, value, grad_output, landmark_key, landmark_value;
    CUtensorMap grad_query, grad_key, grad_value;
};

template <class Traits>
struct WindowGradSm90 {
    using S = typename Traits::S;
    using Pair = typename Traits::Pair;
    using Terms = typename Traits::Terms;
    static constexpr int kHeadDim = Traits::kHeadDim, kTile = Traits::kTile, kPanels = Traits::kPanels,
                         kPanelElements = Traits::kPanelElements;
    static constexpr bool kOverlapsSteps = kHeadDim == 64; // where registers suffice

    const AttentionParams& p;
    const WindowGradSm90Plan& plan;
    const WindowGradSm90Maps& maps;
    typename Traits::Shared& shared;

    __device__ void init_barriers() const {
        constexpr int kWarps = kWarpgroupSize / kWarpSize;
        for (int w = 0; w < Traits::kWarpgroups; ++w)
            for (int i = 0; i < Traits::kRowSlots; ++i) {
                barrier_init(&shared.rows_full[w][i], 1);
                barrier_init(&shared.rows_empty[w][i], 1);
            }
        for (int i = 0; i < Traits::kColumnSlots; ++i) {
            barrier_init(&shared.columns_full[i], 2);
            barrier_init(&shared.columns_empty[i], Traits::kWarpgroups * kWarps);
        }
        barrier_init_fence();
    }

    // A tile of rows for each warpgroup, and the tiles of columns that they meet together: of the window up
    // to `window_end`, then of landmarks. The rows' terms follow in a slot of their own, if there are any.
    struct Round {
        WindowCursor at;
        bool of_keys; // on rows, and queries on columns
        int x0, tokens, tiles;
        int first_row, first_column, window_end, end;

        __device__ int row_tile(int warpgroup) const {
            return first_row + (warpgroup ^ (first_row / 2 & 1)); // causal tiles differ in cost
        }
    };

    template <class F>
    __device__ void for_each_round(const F& f) const {
        const bool is_causal = p.shape.geometry.is_causal;
        const int width = plan.windows.queries.width;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int x0 = at.column * width, tokens = min(width, plan.windows.num_tokens - x0);
            const int tiles = (tokens + kTile - 1) / kTile;
#pragma unroll 1
            for (int half = 0; half < 2; ++half)
#pragma unroll 1
                for (int first = 0; first < tiles; first += Traits::kWarpgroups) {
                    Round round{at, half == 0, x0, tokens, tiles, first, 0, tiles, tiles};
                    if (round.of_keys) {
                        if (is_causal) round.first_column = first;
                    } else {
                        const int last = min(first + Traits::kWarpgroups, tiles);
                        if (is_causal) round.window_end = last;
                        const int landmarks = landmarks_before(x0 + kTile * last - 1);
                        round.end = round.window_end + (landmarks + kTile - 1) / kTile;
                    }
                    f(round);
                }
        }
    }

    // By one thread.
    __device__ void load() const {
        constexpr int kBytes = 2 * kTile * kHeadDim * static_cast<int>(sizeof(S));
        RingCursor row[Traits::kWarpgroups], column;
        const auto load_pair = [&](Pair& to, uint64_t* full, const CUtensorMap& first,
                                   const CUtensorMap& second, int x, const WindowCursor& at,
                                   L2Policy policy) {
            barrier_arrive_expect(full, kBytes);
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
                load_box(to.first + panel * kPanelElements, first, full, 64 * panel, x, 0, at.head, at.batch,
                         policy);
                load_box(to.second + panel * kPanelElements, second, full, 64 * panel, x, 0, at.head,
                         at.batch, policy);
            }
        };
        const L2Policy normal = L2Policy::normal(), last_use = L2Policy::evict_first();
        for_each_round([&](const Round& round) {
            const L2Policy policy = round.of_keys ? normal : last_use;
#pragma unroll
            for (int w = 0; w < Traits::kWarpgroups; ++w) {
                if (round.row_tile(w) >= round.tiles) continue;
                const int slot = row[w].slot;
                barrier_wait(&shared.rows_empty[w][slot], row[w].phase ^ 1);
                load_pair(shared.rows[w][slot], &shared.rows_full[w][slot],
                          round.of_keys ? maps.key : maps.query,
                          round.of_keys ? maps.value : maps.grad_output, round.x0 + kTile * round.row_tile(w),
                          round.at, policy);
                row[w].advance(Traits::kRowSlots);
            }
#pragma unroll 1
            for (int i = round.first_column; i < round.end; ++i, column.advance(Traits::kColumnSlots)) {
                const int slot = column.slot;
                const bool of_window = i < round.window_end;
                barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
                load_pair(shared.columns[slot], &shared.columns_full[slot],
                          !of_window      ? maps.landmark_key
                          : round.of_keys ? maps.query
                                          : maps.key,
                          !of_window      ? maps.landmark_value
                          : round.of_keys ? maps.grad_output
                                          : maps.value,
                          of_window ? round.x0 + kTile * i : kTile * (i - round.window_end), round.at,
                          of_window ? policy : normal);
            }
            const ChunkTerms& terms = p.chunk_terms;
            if (!terms.omega) return;
            const int slot = column.slot, first = first_chunk(round);
            const int end = min(kTile * (round.first_row + Traits::kWarpgroups), round.tokens);
            const int chunks = (round.x0 + end - 1) / plan.chunk_width - first + 1;
            const int row_bytes = static_cast<int>(p.shape.head_dim * sizeof(S));
            const int64_t first_byte = (head_of(round.at) * plan.num_chunks + first) * row_bytes;
            const void* const from[] = {round.of_keys ? terms.omega : terms.grad_query_mean, terms.grad_beta,
                                        terms.grad_key_mean};
            barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
            barrier_arrive_expect(&shared.columns_full[slot], (round.of_keys ? 3 : 1) * chunks * row_bytes);
#pragma unroll
            for (int i = 0; i < 3; ++i)
                if (i == 0 || round.of_keys)
                    load_bytes(reinterpret_cast<Terms&>(shared.columns[slot]).rows[i],
                               static_cast<const char*>(from[i]) + first_byte, chunks * row_bytes,
                               &shared.columns_full[slot]);
            column.advance(Traits::kColumnSlots);
        });
    }

    // By one warp.
    __device__ void load_query_numbers() const {
        const int lane = threadIdx.x % kWarpSize;
        RingCursor column;
        for_each_round([&](const Round& round) {
            const int64_t sequence = sequence_of(round.at);
            const float* const logsumexp = static_cast<const float*>(p.logsumexp) + sequence;
            const float* const delta = static_cast<const float*>(p.delta) + sequence;
#pragma unroll 1
            for (int i = round.first_column; i < round.end; ++i, column.advance(Traits::kColumnSlots)) {
                const int slot = column.slot;
                float numbers[2][2] = {{kInfinity, 0}, {kInfinity, 0}};
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int token = round.x0 + kTile * i + lane + kWarpSize * r;
                    if (!round.of_keys || token >= plan.windows.num_tokens) continue;
                    numbers[r][0] = logsumexp[token] * kLog2e;
                    numbers[r][1] = delta[token];
                }
                barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    shared.logsumexp[slot][lane + kWarpSize * r] = numbers[r][0];
                    shared.delta[slot][lane + kWarpSize * r] = numbers[r][1];
                }
                release(&shared.columns_full[slot]);
            }
            if (!p.chunk_terms.omega) return;
            constexpr int kCount = Traits::kWarpgroups * kTile / kWarpSize;
            float weight[kCount], grad[kCount];
#pragma unroll
            for (int r = 0; r < kCount; ++r) {
                const int row = kTile * round.first_row + lane + kWarpSize * r;
                const bool inside = round.of_keys && row < round.tokens;
                const int64_t at = sequence + round.x0 + row;
                weight[r] = inside ? static_cast<const float*>(p.chunk_terms.token_weight)[at] : 0.0f;
                grad[r] = inside ? static_cast<const float*>(p.chunk_terms.token_grad)[at] : 0.0f;
            }
            const int slot = column.slot;
            barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
            Terms& terms = reinterpret_cast<Terms&>(shared.columns[slot]);
#pragma unroll
            for (int r = 0; r < kCount; ++r) {
                terms.token_weight[lane + kWarpSize * r] = weight[r];
                terms.token_grad[lane + kWarpSize * r] = grad[r];
            }
            fence_async_proxy(); // copies write there next
            release(&shared.columns_full[slot]);
            column.advance(Traits::kColumnSlots);
        });
    }

    // By the warpgroups.
    __device__ void compute() const {
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0);
        RingCursor row, column;
        uint64_t* stored = nullptr; // to be released when the store has read its slot
        for_each_round([&](const Round& round) {
            if (round.row_tile(warpgroup) >= round.tiles) {
#pragma unroll 1
                for (int i = round.first_column; i < round.end + (p.chunk_terms.omega ? 1 : 0); ++i) {
                    barrier_wait(&shared.columns_full[column.slot], column.phase);
                    release(&shared.columns_empty[column.slot]);
                    column.advance(Traits::kColumnSlots);
                }
                return;
            }
            Pair& rows = shared.rows[warpgroup][row.slot];
            barrier_wait(&shared.rows_full[warpgroup][row.slot], row.phase);
            round.of_keys ? find_key_gradients(round, warpgroup, rows, column, stored)
                          : find_query_gradients(round, warpgroup, rows, column, stored);
            fence_async_proxy();
            warpgroup_sync(warpgroup);
            if (threadIdx.x % kWarpgroupSize == 0) {
                const int x = round.x0 + kTile * round.row_tile(warpgroup);
                const auto store = [&](const S* from, const CUtensorMap& map) {
#pragma unroll
                    for (int panel = 0; panel < kPanels; ++panel)
                        store_box(from + panel * kPanelElements, map, 64 * panel, x, 0, round.at.head,
                                  round.at.batch, L2Policy::evict_first());
                };
                store(rows.first, round.of_keys ? maps.grad_key : maps.grad_query);
                if (round.of_keys) store(rows.second, maps.grad_value);
                store_commit();
            }
            stored = &shared.rows_empty[warpgroup][row.slot];
            row.advance(Traits::kRowSlots);
        });
        store_wait_read();
    }

  private:
    using Scores = float[kTile / 8][4];
    using Gradient = float[kHeadDim / 8][4];
    using Operand = uint32_t[kTile / 16][4];

    // In the row of the tile; and 8 further.
    __device__ static int first_row() {
        return threadIdx.x % kWarpgroupSize / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
    }
    __device__ static int first_column() { return threadIdx.x % 4 * 2; }

    __device__ int64_t head_of(const WindowCursor& at) const {
        return static_cast<int64_t>(at.batch) * p.shape.heads + at.head;
    }
    __device__ int64_t sequence_of(const WindowCursor& at) const {
        return head_of(at) * plan.windows.num_tokens;
    }
    __device__ int landmarks_before(int token) const {
        const int landmarks = static_cast<int>(p.num_landmarks);
        return p.shape.geometry.is_causal ? min(landmarks, token / plan.chunk_width) : landmarks;
    }

    // Begins a = rows.first columns.first^T and b = rows.second columns.second^T, and waits for them and
    // whatever was begun before.
    __device__ static void multiply_rows(Scores& a, Scores& b, const Pair& rows, const Pair& columns) {
        const uint64_t from_a = tile_descriptor(rows.first), by_a = tile_descriptor(columns.first),
                       from_b = tile_descriptor(rows.second), by_b = tile_descriptor(columns.second);
        warpgroup_fence();
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            const int offset = d / 4 * (kPanelElements / 8) + d % 4 * 2;
            warpgroup_multiply<S, 0, 0>(a, from_a + offset, by_a + offset, d > 0);
        }
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            const int offset = d / 4 * (kPanelElements / 8) + d % 4 * 2;
            warpgroup_multiply<S, 0, 0>(b, from_b + offset, by_b + offset, d > 0);
        }
        warpgroup_commit();
        warpgroup_wait();
        fence_registers(a);
        fence_registers(b);
    }
    // Numbers of the queries on columns 8 n + first_column() and one further.
    __device__ static float2 numbers_at(const float* numbers, int n) {
        return *reinterpret_cast<const float2*>(numbers + 8 * n + first_column());
    }
    // Columns 8 n onward of a product's result as those of the next one's first operand.
    __device__ static void put_operand(Operand& a, int n, const float (&x)[4]) {
        a[n / 2][n % 2 * 2] = pack<S>(x[0], x[1]);
        a[n / 2][n % 2 * 2 + 1] = pack<S>(x[2], x[3]);
    }
    // Begins c += a columns.
    __device__ static void accumulate(Gradient& c, const Operand& a, const S* columns) {
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k)
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel)
                warpgroup_multiply<S, 1>(panel_of(c, panel), a[k],
                                         tile_descriptor(columns) + k * 128 + panel * (kPanelElements / 8),
                                         1);
    }
    __device__ static Scores& panel_of(Gradient& c, int panel) {
        return reinterpret_cast<Scores&>(c[8 * panel]);
    }
    __device__ static void wait(Gradient& c) {
        warpgroup_wait();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) fence_registers(panel_of(c, panel));
    }

    // Runs step(columns' slot, i) for the tiles [begin, end) of columns, and passes over the others. A step
    // ends with products under way, and has waited for those of the step before.
    template <class Step>
    __device__ void meet_columns(const Round& round, int begin, int end, RingCursor& column,
                                 uint64_t*& stored, const Step& step) const {
        uint64_t* read = nullptr; // by products under way
#pragma unroll 1
        for (int i = round.first_column; i < round.end; ++i, column.advance(Traits::kColumnSlots)) {
            const int slot = column.slot;
            barrier_wait(&shared.columns_full[slot], column.phase);
            const bool is_met = begin <= i && (i < end || i >= round.window_end);
            if (is_met)
                step(slot, i, [&] {
                    if (read) release(read);
                    read = nullptr;
                });
            if (is_met && kOverlapsSteps) {
                read = &shared.columns_empty[slot];
            } else {
                if (is_met) warpgroup_wait();
                release(&shared.columns_empty[slot]);
            }
            if (stored) {
                if (threadIdx.x % kWarpgroupSize == 0) {
                    store_wait_read();
                    barrier_arrive(stored);
                }
                stored = nullptr;
            }
        }
        if (read) {
            warpgroup_wait();
            release(read);
        }
    }

    __device__ void find_key_gradients(const Round& round, int warpgroup, Pair& rows, RingCursor& column,
                                       uint64_t*& stored) const {
        const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
        const int tile = round.row_tile(warpgroup);
        const bool is_causal = p.shape.geometry.is_causal;
        Gradient grad_key = {}, grad_value = {};
        meet_columns(round, is_causal ? tile : 0, round.tiles, column, stored,
                     [&](int slot, int i, const auto& release_previous) {
                         const Pair& columns = shared.columns[slot];
                         Scores score, grad_weight;
                         multiply_rows(score, grad_weight, rows, columns);
                         release_previous();
                         if (is_causal && i == tile) {
#pragma unroll
                             for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                                 for (int e = 0; e < 4; ++e)
                                     if (8 * n + first_column() + e % 2 < first_row() + e / 2 * 8)
                                         score[n][e] = -kInfinity;
                         }
                         Operand weight, grad_score;
#pragma unroll
                         for (int n = 0; n < kTile / 8; ++n) {
                             const float2 lse = numbers_at(shared.logsumexp[slot], n);
#pragma unroll
                             for (int e = 0; e < 4; ++e)
                                 score[n][e] =
                                     exp2_approx(score[n][e] * scale_log2 - (e % 2 ? lse.y : lse.x));
                             put_operand(weight, n, score[n]);
                         }
                         const auto begin_values = [&] {
                             warpgroup_fence();
                             accumulate(grad_value, weight, columns.second);
                             warpgroup_commit();
                         };
                         if constexpr (kOverlapsSteps) begin_values();
#pragma unroll
                         for (int n = 0; n < kTile / 8; ++n) {
                             const float2 delta = numbers_at(shared.delta[slot], n);
#pragma unroll
                             for (int e = 0; e < 4; ++e)
                                 grad_weight[n][e] =
                                     score[n][e] * (grad_weight[n][e] - (e % 2 ? delta.y : delta.x));
                             put_operand(grad_score, n, grad_weight[n]);
                         }
                         if constexpr (!kOverlapsSteps) begin_values();
                         warpgroup_fence();
                         accumulate(grad_key, grad_score, columns.first);
                         warpgroup_commit();
                     });
        wait(grad_value);
        wait(grad_key);

        multiply_all(grad_key, scale);
        add_terms(column, [&](const ChunkTerms& terms) {
            int64_t chunk_row[2], token_row[2];
            find_chunk_rows(chunk_row, round, tile);
#pragma unroll
            for (int r = 0; r < 2; ++r) token_row[r] = kTile * (tile - round.first_row) + first_row() + 8 * r;
            add_key_terms<S>(grad_key, grad_value, terms, chunk_row, token_row,
                             static_cast<int>(p.shape.head_dim),
                             [&](int d, int r) { return pair_at(rows.first, d, r); });
        });
        put(grad_key, rows.first);
        put(grad_value, rows.second);
    }

    __device__ void find_query_gradients(const Round& round, int warpgroup, Pair& rows, RingCursor& column,
                                         uint64_t*& stored) const {
        const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
        const int tile = round.row_tile(warpgroup);
        const bool is_causal = p.shape.geometry.is_causal;
        const int64_t sequence = sequence_of(round.at);
        float logsumexp[2], delta[2];
        int visible_keys[2], visible_landmarks[2]; // of the first window column, or landmark, onward
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = kTile * tile + first_row() + 8 * r;
            const bool inside = row < round.tokens;
            const int64_t at = sequence + round.x0 + row;
            logsumexp[r] = inside ? static_cast<const float*>(p.logsumexp)[at] * kLog2e : kInfinity;
            delta[r] = inside ? static_cast<const float*>(p.delta)[at] : 0.0f;
            visible_keys[r] = is_causal ? min(row + 1, round.tokens) : round.tokens;
            visible_landmarks[r] = landmarks_before(round.x0 + row);
        }
        Gradient grad_query = {};
        meet_columns(round, 0, is_causal ? tile + 1 : round.tiles, column, stored,
                     [&](int slot, int i, const auto& release_previous) {
                         const Pair& columns = shared.columns[slot];
                         Scores score, grad_weight;
                         multiply_rows(score, grad_weight, rows, columns);
                         release_previous();
                         int visible[2];
#pragma unroll
                         for (int r = 0; r < 2; ++r)
                             visible[r] = i < round.window_end
                                              ? visible_keys[r] - kTile * i
                                              : visible_landmarks[r] - kTile * (i - round.window_end);
                         if (min(visible[0], visible[1]) < kTile) {
#pragma unroll
                             for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                                 for (int e = 0; e < 4; ++e)
                                     if (8 * n + first_column() + e % 2 >= visible[e / 2])
                                         score[n][e] = -kInfinity;
                         }
                         Operand grad_score;
#pragma unroll
                         for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
                             for (int e = 0; e < 4; ++e)
                                 score[n][e] = exp2_approx(score[n][e] * scale_log2 - logsumexp[e / 2]) *
                                               (grad_weight[n][e] - delta[e / 2]);
                             put_operand(grad_score, n, score[n]);
                         }
                         warpgroup_fence();
                         accumulate(grad_query, grad_score, columns.first);
                         warpgroup_commit();
                     });
        wait(grad_query);

        multiply_all(grad_query, scale);
        add_terms(column, [&](const ChunkTerms& terms) {
            int64_t chunk_row[2];
            find_chunk_rows(chunk_row, round, tile);
            const float one[2] = {1, 1};
            add_chunk_term<S>(grad_query, terms.grad_query_mean, chunk_row,
                              static_cast<int>(p.shape.head_dim), one);
        });
        put(grad_query, rows.first);
    }

    __device__ int first_chunk(const Round& round) const {
        return (round.x0 + kTile * round.first_row) / plan.chunk_width;
    }
    // Where the chunks' terms for the thread's rows begin among those of the round; -1 beyond the sequence.
    __device__ void find_chunk_rows(int64_t (&chunk_row)[2], const Round& round, int tile) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = kTile * tile + first_row() + 8 * r;
            chunk_row[r] = row < round.tokens
                               ? ((round.x0 + row) / plan.chunk_width - first_chunk(round)) * p.shape.head_dim
                               : -1;
        }
    }
    // Calls add(a round's terms), which wait in a slot of columns.
    template <class F>
    __device__ void add_terms(RingCursor& column, const F& add) const {
        if (!p.chunk_terms.omega) return;
        const int slot = column.slot;
        barrier_wait(&shared.columns_full[slot], column.phase);
        const Terms& terms = reinterpret_cast<const Terms&>(shared.columns[slot]);
        add(ChunkTerms{.rounded = true,
                       .omega = terms.rows[0],
                       .grad_beta = terms.rows[1],
                       .grad_key_mean = terms.rows[2],
                       .grad_query_mean = terms.rows[0],
                       .chunk_stats = nullptr,
                       .token_weight = terms.token_weight,
                       .token_grad = terms.token_grad});
        release(&shared.columns_empty[slot]);
        column.advance(Traits::kColumnSlots);
    }

    __device__ static uint32_t* pair_at(S* tile, int d, int r) {
        const Tile<S, 64> panel{tile + d / 8 * kPanelElements};
        return reinterpret_cast<uint32_t*>(panel.unit(first_row() + 8 * r, d % 8) + first_column());
    }
    // Into the tile that the rows came from.
    __device__ static void put(const Gradient& gradient, S* tile) {
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *pair_at(tile, d, r) = pack<S>(gradient[d][2 * r], gradient[d][2 * r + 1]);
    }
};

// Compiled for Hopper alone, as the launch bounds tell.
template <class Traits>
__global__ void __launch_bounds__(kHasWarpgroups ? Traits::kThreads : kWarpSize, 1)
    window_attention_bwd_sm90_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ WindowGradSm90Plan plan,
                                     const __grid_constant__ WindowGradSm90Maps maps) {
    if constexpr (kHasWarpgroups) {
        extern __shared__ __align__(1024) char window_grad_memory[];
        const WindowGradSm90<Traits> gradients{
            p, plan, maps, *reinterpret_cast<typename Traits::Shared*>(window_grad_memory)};
        const int role = threadIdx.x / kWarpSize - Traits::kConsumers / kWarpSize;
        if (threadIdx.x == 0) gradients.init_barriers();
        __syncthreads();
        if (role < 0) {
            warpgroup_take_registers<Traits::kConsumerRegisters>();
            gradients.compute();
        } else {
            warpgroup_give_registers<Traits::kServiceRegisters>();
            if (role == 0 && threadIdx.x % kWarpSize == 0) gradients.load();
            if (role == 1) gradients.load_query_numbers();
        }
    }
}

// False where this kernel was not compiled for the device, or does not do what is asked.
template <class Traits>
bool launch_window_attention_bwd_sm90(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const auto kernel = window_attention_bwd_sm90_kernel<Traits>;
    const Windows w = Windows::of(p);
    if (p.dropout.threshold > 0 || p.key_padding_mask || p.landmark_bias || p.extents || p.relative_bias ||
        g.num_prefix_tokens > 0 || g.windows_overlap() || w.queries.height > 1 || g.grid_height > 1 ||
        w.queries.width % Traits::kTile != 0)
        return false;
    const int64_t round_tokens = Traits::kWarpgroups * Traits::kTile;
    if (p.chunk_terms.omega && (round_tokens - 2) / g.chunk_width + 2 > Traits::kMostChunks) return false;
    const int64_t num_windows = p.shape.batch * p.shape.heads * w.num_windows;
    if (num_windows == 0) return true;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of;
    const KernelLimits& limits = limits_of(kernel);
    if (num_windows > INT_MAX || limits.threads < Traits::kThreads || limits.shared_bytes < kBytes)
        return false;
    const WindowGradSm90Plan plan{
        .windows = w,
        .batch = static_cast<int>(p.shape.batch),
        .rows = 1,
        .num_windows = num_windows,
        .num_chunks = static_cast<int>(g.num_chunks()),
        .chunk_width = static_cast<int>(g.chunk_width),
    };

    WindowGradSm90Maps maps;
    const auto make_map = [&](CUtensorMap& map, const Rows& rows, int64_t tokens) {
        return make_tensor_map(map, std::is_same_v<typename Traits::S, __half>, rows, p.shape.batch,
                               p.shape.heads, 1, tokens, p.shape.head_dim, 1, Traits::kTile);
    };
    const auto make_landmark_map = [&](CUtensorMap& map, const void* data) {
        const int64_t stride = p.num_landmarks * p.shape.head_dim;
        const Rows rows{const_cast<void*>(data), p.shape.heads * stride, stride, p.shape.head_dim, 1};
        return p.num_landmarks == 0 || make_map(map, rows, p.num_landmarks);
    };
    const int64_t tokens = g.num_tokens();
    if (!make_map(maps.query, p.query, tokens) || !make_map(maps.key, p.key, tokens) ||
        !make_map(maps.value, p.value, tokens) || !make_map(maps.grad_output, p.grad_output, tokens) ||
        !make_landmark_map(maps.landmark_key, p.landmark_key) ||
        !make_landmark_map(maps.landmark_value, p.landmark_value) ||
        !make_map(maps.grad_query, p.grad_query, tokens) || !make_map(maps.grad_key, p.grad_key, tokens) ||
        !make_map(maps.grad_value, p.grad_value, tokens))
        return false;

    const int64_t ctas = std::min<int64_t>(num_windows, multiprocessors());
    kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, kBytes, stream>>>(p, plan, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
