// Last kernel of the joint attention's backward with Hopper's asynchronous copies and products: for windows
// of a sequence, of a multiple of 64 tokens, without overlap or any of the options but causality. One pass
// over a window: its keys meet its queries for the gradients of keys and values, then its queries meet its
// keys and the landmarks for theirs.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/warpgroup_product.cuh"
#include "kernels/cuda/mma/window_tile.cuh"
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
    static constexpr int kConsumerRegisters = 232;
    static constexpr int kServiceRegisters = 3 * 168 - kWarpgroups * kConsumerRegisters; // 168 each at launch
    static constexpr int kRowSlots = 2;                                                  // of a warpgroup
    static constexpr int kColumnSlots = kHeadDim == 64 ? 6 : 3;

    using Tile = WarpgroupTile<S, kHeadDim>;

    // Keys and values, queries and gradients of outputs, or landmark keys and values.
    struct Pair {
        Tile first, second;
    };
    // What sixteen chunks add to their tokens' gradients: omega, grad_beta and grad_key_mean, or
    // grad_query_mean.
    static constexpr int kMostChunks = 32;
    struct Terms {
        WarpgroupTile<S, kHeadDim, 16> rows[3];
    };
    static_assert(kMostChunks / 16 * sizeof(Terms) <= sizeof(Pair));
    struct Shared {
        Pair rows[kWarpgroups][kRowSlots];
        Pair columns[kColumnSlots];
        float logsumexp[kColumnSlots][kTileRows]; // of queries, times log2(e)
        float delta[kColumnSlots][kTileRows];     // times the scale
        uint64_t rows_full[kWarpgroups][kRowSlots], rows_empty[kWarpgroups][kRowSlots];
        uint64_t columns_full[kColumnSlots], columns_empty[kColumnSlots];
    };
};

struct WindowGradSm90Plan {
    Windows windows;
    int batch, rows;
    WindowShares shares;
    int num_chunks, chunk_width;
    int term_rows; // of the chunks of any round; 0 without terms
};

struct WindowGradSm90Maps {
    CUtensorMap query, key, value, grad_output, landmark_key, landmark_value, terms[4];
    CUtensorMap grad_query, grad_key, grad_value;
};

template <class Traits, bool kMayBeCausal>
struct WindowGradSm90 {
    using S = typename Traits::S;
    using RowTile = typename Traits::Tile;
    using Pair = typename Traits::Pair;
    using Terms = typename Traits::Terms;
    static constexpr int kHeadDim = Traits::kHeadDim, kPanels = RowTile::kPanels;
    // Where registers suffice the products that end a step are under way in the next one, or the next one's
    // scores in this one as well.
    static constexpr bool kOverlapsSteps = kHeadDim == 64, kLooksAhead = kOverlapsSteps && !kMayBeCausal;

    const AttentionParams& p;
    const WindowGradSm90Plan& plan;
    const WindowGradSm90Maps& maps;
    typename Traits::Shared& shared;

    __device__ bool is_causal() const { return kMayBeCausal && p.shape.geometry.is_causal; }

    __device__ void init_barriers() const {
        for (int w = 0; w < Traits::kWarpgroups; ++w)
            for (int i = 0; i < Traits::kRowSlots; ++i) {
                barrier_init(&shared.rows_full[w][i], 1);
                barrier_init(&shared.rows_empty[w][i], 1);
            }
        for (int i = 0; i < Traits::kColumnSlots; ++i) {
            barrier_init(&shared.columns_full[i], 1 + kWarpSize);
            barrier_init(&shared.columns_empty[i], Traits::kConsumers);
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
            // Causal tiles differ in cost.
            return first_row + (kMayBeCausal ? warpgroup ^ (first_row / 2 & 1) : warpgroup);
        }
    };

    template <class F>
    __device__ void for_each_round(const F& f) const {
        const int width = plan.windows.queries.width;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int x0 = at.column * width, tokens = min(width, plan.windows.num_tokens - x0);
            const int tiles = (tokens + kTileRows - 1) / kTileRows;
#pragma unroll 1
            for (int half = 0; half < 2; ++half)
#pragma unroll 1
                for (int first = 0; first < tiles; first += Traits::kWarpgroups) {
                    Round round{at, half == 0, x0, tokens, tiles, first, 0, tiles, tiles};
                    if (round.of_keys) {
                        if (is_causal()) round.first_column = first;
                    } else {
                        const int last = min(first + Traits::kWarpgroups, tiles);
                        if (is_causal()) round.window_end = last;
                        const int landmarks = landmarks_before(x0 + kTileRows * last - 1);
                        round.end = round.window_end + (landmarks + kTileRows - 1) / kTileRows;
                    }
                    f(round);
                }
        }
    }

    // By one thread.
    __device__ void load() const {
        RingCursor row[Traits::kWarpgroups], column;
        const auto load_pair = [&](Pair& to, uint64_t* full, const CUtensorMap& first,
                                   const CUtensorMap& second, int x, const WindowCursor& at,
                                   L2Policy policy) {
            barrier_arrive_expect(full, sizeof(Pair));
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
                load_box(to.first.panel[panel], first, full, 64 * panel, x, 0, at.head, at.batch, policy);
                load_box(to.second.panel[panel], second, full, 64 * panel, x, 0, at.head, at.batch, policy);
            }
        };
        constexpr int kTermBytes = sizeof(Terms) / 3;
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
                          round.of_keys ? maps.value : maps.grad_output,
                          round.x0 + kTileRows * round.row_tile(w), round.at, policy);
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
                          of_window ? round.x0 + kTileRows * i : kTileRows * (i - round.window_end), round.at,
                          of_window ? policy : normal);
            }
            if (!has_terms()) return;
            const int slot = column.slot, steps = (plan.term_rows + 15) / 16;
            barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
            barrier_arrive_expect(&shared.columns_full[slot], (round.of_keys ? 3 : 1) * steps * kTermBytes);
#pragma unroll 1
            for (int step = 0; step < steps; ++step)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int panel = 0; panel < kPanels; ++panel)
                        if (round.of_keys == i < 3)
                            load_box(terms_in(slot)[step].rows[i % 3].panel[panel], maps.terms[i],
                                     &shared.columns_full[slot], 64 * panel, 16 * step, 0, first_chunk(round),
                                     head_of(round.at));
            column.advance(Traits::kColumnSlots);
        });
    }

    // By one warp.
    __device__ void load_query_numbers() const {
        const float scale = static_cast<float>(p.scale);
        const int lane = threadIdx.x % kWarpSize;
        RingCursor column;
        for_each_round([&](const Round& round) {
            const int64_t sequence = sequence_of(round.at);
            const float* const logsumexp = static_cast<const float*>(p.logsumexp) + sequence;
            const float* const delta = static_cast<const float*>(p.delta) + sequence;
#pragma unroll 1
            for (int i = round.first_column; i < round.end + has_terms();
                 ++i, column.advance(Traits::kColumnSlots)) {
                const int slot = column.slot;
                float numbers[2][2] = {{kInfinity, 0}, {kInfinity, 0}};
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int token = round.x0 + kTileRows * i + lane + kWarpSize * r;
                    if (!round.of_keys || token >= plan.windows.num_tokens) continue;
                    numbers[r][0] = logsumexp[token] * kLog2e;
                    numbers[r][1] = delta[token] * scale;
                }
                barrier_wait(&shared.columns_empty[slot], column.phase ^ 1);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    shared.logsumexp[slot][lane + kWarpSize * r] = numbers[r][0];
                    shared.delta[slot][lane + kWarpSize * r] = numbers[r][1];
                }
                release_by_all(&shared.columns_full[slot]);
            }
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
                for (int i = round.first_column; i < round.end + has_terms(); ++i) {
                    wait_for_columns(column);
                    release_columns(column.slot);
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
                const int x = round.x0 + kTileRows * round.row_tile(warpgroup);
                const auto store = [&](const RowTile& from, const CUtensorMap& map) {
#pragma unroll
                    for (int panel = 0; panel < kPanels; ++panel)
                        store_box(from.panel[panel], map, 64 * panel, x, 0, round.at.head, round.at.batch,
                                  L2Policy::evict_first());
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
    using Gradient = float[kHeadDim / 8][4];
    using Operand = uint32_t[kTileRows / 16][4];
    using ChunkOperand = uint32_t[1][4];

    __device__ int head_of(const WindowCursor& at) const {
        return at.batch * static_cast<int>(p.shape.heads) + at.head;
    }
    __device__ int64_t sequence_of(const WindowCursor& at) const {
        return int64_t{head_of(at)} * plan.windows.num_tokens;
    }
    __device__ bool has_terms() const { return plan.term_rows > 0; }
    __device__ Terms* terms_in(int slot) const { return reinterpret_cast<Terms*>(&shared.columns[slot]); }
    // Of the chunks whose terms come with the round.
    __device__ int first_chunk(const Round& round) const {
        return min((round.x0 + kTileRows * round.first_row) / plan.chunk_width,
                   plan.num_chunks - plan.term_rows);
    }
    __device__ int landmarks_before(int token) const {
        const int landmarks = static_cast<int>(p.num_landmarks);
        return is_causal() ? min(landmarks, token / plan.chunk_width) : landmarks;
    }

    // Begins a b^T.
    __device__ static void begin_rows(ScoreTile& product, const RowTile& a, const RowTile& b) {
        warpgroup_fence();
        begin_transposed_product(product, a, b);
        warpgroup_commit();
    }
    template <int kPending>
    __device__ static void wait_for(ScoreTile& product) {
        warpgroup_wait<kPending>();
        fence_registers(product);
    }
    // Numbers of the queries on columns 8 n + score_column() and one further.
    __device__ static float2 numbers_at(const float* numbers, int n) {
        return *reinterpret_cast<const float2*>(numbers + 8 * n + score_column());
    }
    // Columns 8 n onward of a product's result as those of the next one's first operand.
    __device__ static void put_operand(Operand& a, int n, const float (&x)[4]) {
        a[n / 2][n % 2 * 2] = pack<S>(x[0], x[1]);
        a[n / 2][n % 2 * 2 + 1] = pack<S>(x[2], x[3]);
    }
    __device__ static void wait(Gradient& c) {
        warpgroup_wait();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) fence_registers(panel_of(c, panel));
    }

    __device__ void wait_for_columns(const RingCursor& column) const {
        barrier_wait(&shared.columns_full[column.slot], column.phase);
    }
    __device__ void release_columns(int slot) const { release_by_all(&shared.columns_empty[slot]); }
    __device__ static void release_stored(uint64_t*& stored) {
        if (stored && threadIdx.x % kWarpgroupSize == 0) {
            store_wait_read();
            barrier_arrive(stored);
        }
        stored = nullptr;
    }

    // The rows meet the tiles [begin, end) of columns, and landmarks, and pass over the others. A step makes
    // weights of the scores, begins the products with the values, if it has any, makes gradients of scores,
    // and begins the products with those.
    template <class Step>
    __device__ void meet_columns(const Round& round, int begin, int end, const Pair& rows, RingCursor& column,
                                 uint64_t*& stored, Step& step) const {
        if constexpr (kLooksAhead)
            meet_all_columns(round, rows, column, stored, step);
        else
            meet_some_columns(round, begin, end, rows, column, stored, step);
    }
    // The next tile's scores are under way while this one's are graded; its gradients of weights, and the
    // products with this one's gradients, while the next one's scores are weighed.
    template <class Step>
    __device__ void meet_all_columns(const Round& round, const Pair& rows, RingCursor& column,
                                     uint64_t*& stored, Step& step) const {
        ScoreTile score, weights, grad_weight;
        wait_for_columns(column);
        begin_rows(score, rows.first, shared.columns[column.slot].first);
        begin_rows(grad_weight, rows.second, shared.columns[column.slot].second);
        step.load_logsumexp(column.slot);
        wait_for<1>(score);
        step.weigh(round.first_column, score, weights);
        release_stored(stored);
        wait_for<0>(grad_weight);
#pragma unroll 1
        for (int i = round.first_column + 1; i < round.end; ++i) {
            const int slot = column.slot;
            step.load_delta(slot);
            step.begin_values(shared.columns[slot]);
            column.advance(Traits::kColumnSlots);
            wait_for_columns(column);
            const Pair& next = shared.columns[column.slot];
            begin_rows(score, rows.first, next.first);
            step.grade(weights, grad_weight, shared.columns[slot]);
            begin_rows(grad_weight, rows.second, next.second);
            step.load_logsumexp(column.slot);
            wait_for<2>(score);
            step.weigh(i, score, weights);
            wait_for<0>(grad_weight);
            release_columns(slot);
        }
        step.load_delta(column.slot);
        step.begin_values(shared.columns[column.slot]);
        step.grade(weights, grad_weight, shared.columns[column.slot]);
        warpgroup_wait();
        release_columns(column.slot);
        column.advance(Traits::kColumnSlots);
    }
    template <class Step>
    __device__ void meet_some_columns(const Round& round, int begin, int end, const Pair& rows,
                                      RingCursor& column, uint64_t*& stored, Step& step) const {
        ScoreTile score, grad_weight;
        int read = -1; // by products under way
#pragma unroll 1
        for (int i = round.first_column; i < round.end; ++i, column.advance(Traits::kColumnSlots)) {
            const int slot = column.slot;
            const Pair& columns = shared.columns[slot];
            wait_for_columns(column);
            const bool is_met = begin <= i && (i < end || i >= round.window_end);
            if (is_met) {
                begin_rows(score, rows.first, columns.first);
                begin_rows(grad_weight, rows.second, columns.second);
                wait_for<1>(score);
                if (read >= 0) release_columns(read);
                read = -1;
                step.load_logsumexp(slot);
                step.weigh(i, score, score);
                if constexpr (kOverlapsSteps) step.begin_values(columns);
                wait_for<kOverlapsSteps && Step::kHasValues ? 1 : 0>(grad_weight);
                step.load_delta(slot);
                step.grade(score, grad_weight, columns);
                if constexpr (!kOverlapsSteps) step.begin_values(columns);
            }
            if (is_met && kOverlapsSteps) {
                read = slot;
            } else {
                if (is_met) warpgroup_wait();
                release_columns(slot);
            }
            release_stored(stored);
        }
        if (read >= 0) {
            warpgroup_wait();
            release_columns(read);
        }
    }
    // Runs step(terms, chunk) for what sixteen chunks at a time add to the rows, which are members of
    // chunk[r], if there are such terms. A step begins products.
    template <class Step>
    __device__ void meet_terms(const Round& round, int tile, RingCursor& column, const Step& step) const {
        if (!has_terms()) return;
        int chunk[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
            chunk[r] =
                (round.x0 + kTileRows * tile + score_row() + 8 * r) / plan.chunk_width - first_chunk(round);
        wait_for_columns(column);
#pragma unroll 1
        for (int i = 0; 16 * i < plan.term_rows; ++i, chunk[0] -= 16, chunk[1] -= 16)
            step(terms_in(column.slot)[i], chunk, i);
        release_columns(column.slot);
        column.advance(Traits::kColumnSlots);
    }

    // Keys on rows, queries on columns.
    struct KeyStep {
        const WindowGradSm90& kernel;
        int tile;
        float scale, scale_log2;
        Gradient grad_key, grad_value;
        Operand weight, grad_score;
        float2 numbers[kTileRows / 8]; // of the queries on the columns: log-sum-exps, then deltas

        static constexpr bool kHasValues = true;
        __device__ void load_logsumexp(int slot) { load(kernel.shared.logsumexp[slot]); }
        __device__ void load_delta(int slot) { load(kernel.shared.delta[slot]); }
        __device__ void weigh(int i, ScoreTile& score, ScoreTile& weights) {
            if (kernel.is_causal() && i == tile) {
#pragma unroll
                for (int n = 0; n < kTileRows / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (8 * n + score_column() + e % 2 < score_row() + e / 2 * 8)
                            score[n][e] = -kInfinity;
            }
#pragma unroll
            for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    weights[n][e] =
                        exp2_approx(score[n][e] * scale_log2 - (e % 2 ? numbers[n].y : numbers[n].x));
                put_operand(weight, n, weights[n]);
            }
        }
        __device__ void begin_values(const Pair& columns) {
            warpgroup_fence();
            begin_product(grad_value, weight, columns.second);
            warpgroup_commit();
        }
        __device__ void grade(const ScoreTile& weights, ScoreTile& grad_weight, const Pair& columns) {
#pragma unroll
            for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    grad_weight[n][e] =
                        weights[n][e] * (grad_weight[n][e] * scale - (e % 2 ? numbers[n].y : numbers[n].x));
                put_operand(grad_score, n, grad_weight[n]);
            }
            warpgroup_fence();
            begin_product(grad_key, grad_score, columns.first);
            warpgroup_commit();
        }

      private:
        __device__ void load(const float* from) {
#pragma unroll
            for (int n = 0; n < kTileRows / 8; ++n) numbers[n] = numbers_at(from, n);
        }
    };
    // Queries on rows, keys or landmarks on columns.
    struct QueryStep {
        const Round& round;
        float scale, scale_log2;
        float logsumexp[2], delta[2];
        int visible_keys[2], visible_landmarks[2]; // of the first window column, or landmark, onward
        Gradient grad_query;
        Operand grad_score;

        static constexpr bool kHasValues = false;
        __device__ void load_logsumexp(int) const {}
        __device__ void load_delta(int) const {}
        __device__ void weigh(int i, ScoreTile& score, ScoreTile& weights) const {
            int visible[2];
#pragma unroll
            for (int r = 0; r < 2; ++r)
                visible[r] = i < round.window_end ? visible_keys[r] - kTileRows * i
                                                  : visible_landmarks[r] - kTileRows * (i - round.window_end);
            if (min(visible[0], visible[1]) < kTileRows) {
#pragma unroll
                for (int n = 0; n < kTileRows / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (8 * n + score_column() + e % 2 >= visible[e / 2]) score[n][e] = -kInfinity;
            }
#pragma unroll
            for (int n = 0; n < kTileRows / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    weights[n][e] = exp2_approx(score[n][e] * scale_log2 - logsumexp[e / 2]);
            fence_registers(weights);
        }
        __device__ void begin_values(const Pair&) const {}
        // The first half of the product begins while the second half of the gradients is computed.
        __device__ void grade(ScoreTile& weights, const ScoreTile& grad_weight, const Pair& columns) {
            constexpr int kHalf = kTileRows / 16;
            const auto grade_from = [&](int first) {
#pragma unroll
                for (int n = first; n < first + kHalf; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) weights[n][e] *= grad_weight[n][e] * scale - delta[e / 2];
                    put_operand(grad_score, n, weights[n]);
                }
                warpgroup_fence();
            };
            grade_from(0);
            begin_steps<0, 2>(grad_query, grad_score, columns.first);
            grade_from(kHalf);
            begin_steps<2, 4>(grad_query, grad_score, columns.first);
            warpgroup_commit();
        }
    };

    __device__ void find_key_gradients(const Round& round, int warpgroup, Pair& rows, RingCursor& column,
                                       uint64_t*& stored) const {
        const float scale = static_cast<float>(p.scale);
        const int tile = round.row_tile(warpgroup);
        const int64_t sequence = sequence_of(round.at);
        float chunk_weight[2], chunk_grad[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = kTileRows * tile + score_row() + 8 * r;
            const bool inside = has_terms() && row < round.tokens;
            const int64_t at = sequence + round.x0 + row;
            chunk_weight[r] = inside ? static_cast<const float*>(p.chunk_terms.token_weight)[at] : 0.0f;
            chunk_grad[r] = inside ? static_cast<const float*>(p.chunk_terms.token_grad)[at] : 0.0f;
        }
        KeyStep step{.kernel = *this, .tile = tile, .scale = scale, .scale_log2 = scale * kLog2e};
        Gradient &grad_key = step.grad_key, &grad_value = step.grad_value;
        meet_columns(round, is_causal() ? tile : 0, round.tiles, rows, column, stored, step);
        wait(grad_value);
        wait(grad_key);
        meet_terms(round, tile, column, [&](const Terms& terms, const int (&chunk)[2], int i) {
            ChunkOperand weighted, graded, member;
            Operand own;
            make_one_hot<S>(weighted, chunk, chunk_weight);
            make_one_hot<S>(graded, chunk, chunk_grad);
            make_one_hot<S>(member, chunk, {1, 1});
            make_one_hot<S>(own, {score_row(), score_row() + 8},
                            {i == 0 ? -chunk_grad[0] : 0, i == 0 ? -chunk_grad[1] : 0});
            warpgroup_fence();
            begin_product(grad_value, weighted, terms.rows[1]);
            begin_product(grad_key, graded, terms.rows[0]);
            begin_product(grad_key, member, terms.rows[2]);
            begin_product(grad_key, own, rows.first);
            warpgroup_commit();
            wait(grad_value);
            wait(grad_key);
        });
        if (has_terms()) warpgroup_sync(warpgroup); // all are done with the keys
        put(grad_key, rows.first);
        put(grad_value, rows.second);
    }

    __device__ void find_query_gradients(const Round& round, int warpgroup, Pair& rows, RingCursor& column,
                                         uint64_t*& stored) const {
        const float scale = static_cast<float>(p.scale);
        const int tile = round.row_tile(warpgroup);
        const int64_t sequence = sequence_of(round.at);
        QueryStep step{.round = round, .scale = scale, .scale_log2 = scale * kLog2e};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = kTileRows * tile + score_row() + 8 * r;
            const bool inside = row < round.tokens;
            const int64_t at = sequence + round.x0 + row;
            step.logsumexp[r] = inside ? static_cast<const float*>(p.logsumexp)[at] * kLog2e : kInfinity;
            step.delta[r] = inside ? static_cast<const float*>(p.delta)[at] * scale : 0.0f;
            step.visible_keys[r] = is_causal() ? min(row + 1, round.tokens) : round.tokens;
            step.visible_landmarks[r] = landmarks_before(round.x0 + row);
        }
        Gradient& grad_query = step.grad_query;
        meet_columns(round, 0, is_causal() ? tile + 1 : round.tiles, rows, column, stored, step);
        wait(grad_query);
        meet_terms(round, tile, column, [&](const Terms& terms, const int (&chunk)[2], int) {
            ChunkOperand member;
            make_one_hot<S>(member, chunk, {1, 1});
            warpgroup_fence();
            begin_product(grad_query, member, terms.rows[0]);
            warpgroup_commit();
            wait(grad_query);
        });
        put(grad_query, rows.first);
    }

    // Into the tile that the rows came from.
    __device__ static void put(const Gradient& gradient, RowTile& tile) {
        const int lane = threadIdx.x % kWarpSize;
        const int row = threadIdx.x % kWarpgroupSize / kWarpSize * 16 + lane % 16;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const uint32_t to = shared_address(tile.unit(panel, row, lane / 16));
            Operand x;
#pragma unroll
            for (int n = 0; n < 8; ++n) put_operand(x, n, gradient[8 * panel + n]);
#pragma unroll
            for (int k = 0; k < 4; ++k) store_matrix(to ^ 32 * k, x[k]);
        }
    }
};

// Compiled for Hopper alone, as the launch bounds tell.
template <class Traits, bool kMayBeCausal>
__global__ void __launch_bounds__(kHasWarpgroups ? Traits::kThreads : kWarpSize, 1)
    window_attention_bwd_sm90_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ WindowGradSm90Plan plan,
                                     const __grid_constant__ WindowGradSm90Maps maps) {
    if constexpr (kHasWarpgroups) {
        extern __shared__ __align__(1024) char window_grad_memory[];
        const WindowGradSm90<Traits, kMayBeCausal> gradients{
            p, plan, maps, *reinterpret_cast<typename Traits::Shared*>(window_grad_memory)};
        const int role = threadIdx.x / kWarpSize - Traits::kConsumers / kWarpSize;
        wait_for_dependencies();
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
    constexpr bool kIsWide = Traits::kHeadDim > 64;
    const bool may_be_causal = kIsWide || g.is_causal;
    const auto kernel = may_be_causal ? window_attention_bwd_sm90_kernel<Traits, true>
                                      : window_attention_bwd_sm90_kernel<Traits, kIsWide>;
    const Windows w = Windows::of(p);
    if (p.dropout.threshold > 0 || p.key_padding_mask || p.landmark_bias || p.extents || p.relative_bias ||
        g.num_prefix_tokens > 0 || g.windows_overlap() || w.queries.height > 1 || g.grid_height > 1 ||
        w.queries.width % kTileRows != 0)
        return false;
    // Rounds begin at multiples of what their size and the windows' have in common.
    const int64_t round_tokens = Traits::kWarpgroups * kTileRows,
                  step = std::gcd(std::gcd(round_tokens, w.queries.width), g.chunk_width),
                  round_chunks = (g.chunk_width - step + round_tokens - 1) / g.chunk_width + 1,
                  term_rows = p.chunk_terms.omega ? std::min(round_chunks, g.num_chunks()) : 0;
    if (term_rows > Traits::kMostChunks) return false;
    const int64_t num_windows = p.shape.batch * p.shape.heads * w.num_windows;
    if (num_windows == 0) return true;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of[2];
    const KernelLimits& limits = limits_of[may_be_causal](kernel);
    if (num_windows > INT_MAX || limits.threads < Traits::kThreads || limits.shared_bytes < kBytes)
        return false;
    const WindowGradSm90Plan plan{
        .windows = w,
        .batch = static_cast<int>(p.shape.batch),
        .rows = 1,
        .shares = WindowShares::of(p.shape, 1, w.num_windows),
        .num_chunks = static_cast<int>(g.num_chunks()),
        .chunk_width = static_cast<int>(g.chunk_width),
        .term_rows = static_cast<int>(term_rows),
    };

    WindowGradSm90Maps maps;
    using S = typename Traits::S;
    const auto make_token_map = [&](CUtensorMap& map, const Rows& rows) {
        return make_map<S>(map, p.shape, rows, 1, g.num_tokens(), 1, kTileRows);
    };
    // The rows from each chunk onward that a round may need; whatever lies beyond them reads as zeros.
    const auto make_term_map = [&](CUtensorMap& map, const void* data) {
        const int64_t d = p.shape.head_dim;
        const Rows rows{const_cast<void*>(data), g.num_chunks() * d, d, d, 1};
        return term_rows == 0 ||
               make_tensor_map(map, std::is_same_v<S, __half>, rows, p.shape.batch * p.shape.heads,
                               g.num_chunks() - term_rows + 1, 1, term_rows, d, 1, 16);
    };
    const ChunkTerms& terms = p.chunk_terms;
    if (!make_token_map(maps.query, p.query) || !make_token_map(maps.key, p.key) ||
        !make_token_map(maps.value, p.value) || !make_token_map(maps.grad_output, p.grad_output) ||
        !make_landmark_map<S>(maps.landmark_key, p, p.landmark_key, kTileRows) ||
        !make_landmark_map<S>(maps.landmark_value, p, p.landmark_value, kTileRows) ||
        !make_term_map(maps.terms[0], terms.omega) || !make_term_map(maps.terms[1], terms.grad_beta) ||
        !make_term_map(maps.terms[2], terms.grad_key_mean) ||
        !make_term_map(maps.terms[3], terms.grad_query_mean) ||
        !make_token_map(maps.grad_query, p.grad_query) || !make_token_map(maps.grad_key, p.grad_key) ||
        !make_token_map(maps.grad_value, p.grad_value))
        return false;

    launch_dependent(kernel, plan.shares.ctas(), Traits::kThreads, kBytes, stream, p, plan, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
