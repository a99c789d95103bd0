// Last kernel of the joint attention's backward, for windows of up to 64 tokens that don't overlap: the
// gradients of a window's queries, keys and values in one pass, with what its tokens get as members of
// chunks.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/window_attention_bwd_prefix.cuh"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {

// The chunks that the tokens of a window are members of.
struct WindowChunks {
    int y0, x0, columns, count;
    uint32_t columns_reciprocal;
};

// kGeneral: with all that is_general() names.
template <class S_, int kHeadDim_, bool kGeneral_, bool kHasPrefix_ = false>
struct WindowGradTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kGeneral = kGeneral_, kHasPrefix = kHasPrefix_;
    static constexpr int kBlock = 64; // tokens of a window, global columns of a block
    static constexpr int kThreads = kBlock / 16 * kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 128 ? 1 : kGeneral ? 2 : 3;
    static constexpr int kSlots = 132 * (kHeadDim == 64 ? 3 : 1); // blocks to fill a GPU of the day
    static constexpr int kTerms = 4; // rows that a chunk adds to its tokens' gradients, a warp loads one
    static constexpr int kBlockChunks = 16;
    static constexpr int kMaxOffsets = 256; // (2 h - 1) (2 w - 1) for h w <= 64

    // What is known of the tokens of a window.
    struct alignas(16) Tokens {
        int inside[kBlock]; // the token, -1 outside of the grid
        int valid[kBlock];  // likewise, -1 at padding too
        int chunk[kBlock];  // number among the window's chunks, -1 where not valid
        int key_place[kBlock];
        float logsumexp[kBlock]; // times log2(e)
        float delta[kBlock];
        float chunk_weight[kBlock], chunk_grad[kBlock];
        int first_chunks[kBlockChunks]; // of the window, -1: none
        WindowChunks chunks;
    };
    struct Shared {
        union {
            struct {
                alignas(1024) S query[kBlock * kHeadDim];
                alignas(1024) S key[kBlock * kHeadDim];
                alignas(1024) S value[kBlock * kHeadDim]; // then gradients on their way out
                alignas(1024) S grad_output[kBlock * kHeadDim];
            };
            float bias_sum[kBlock][kBlock + 1]; // [key, query], in the end
        };
        alignas(1024) S global_key[kBlock * kHeadDim];
        alignas(1024) S global_value[kBlock * kHeadDim];
        alignas(1024) S grad_score[kBlock * kBlock]; // [key, query]
        alignas(1024) S chunk_terms[kTerms][kBlockChunks * kHeadDim];
        Tokens tokens[2];
        int query_place[kBlock];
        float global_bias[kBlock];
        float bias_table[kMaxOffsets + 2 * kBlock];
        PrefixShared<S, kHeadDim, kHasPrefix> prefix;
    };
};

struct WindowGradPlan {
    Windows windows;
    int slices; // a block takes one slice of the windows of one (batch, head)
    int global_blocks;
    int num_chunks, chunk_columns, chunk_height, chunk_width;
    uint32_t chunk_height_reciprocal, chunk_width_reciprocal;

    __device__ WindowChunks chunks_of(const TokenBox& box) const {
        const int y0 = box.y0 / chunk_height, x0 = box.x0 / chunk_width;
        const int last_y = min(box.y0 + box.shape.height, box.grid_height) - 1;
        const int last_x = min(box.x0 + box.shape.width, box.grid_width) - 1;
        const int columns = divide(last_x - x0 * chunk_width, chunk_width_reciprocal) + 1;
        const int rows = divide(last_y - y0 * chunk_height, chunk_height_reciprocal) + 1;
        return WindowChunks{y0, x0, columns, rows * columns, reciprocal(columns)};
    }
    // The window's chunk number i, or a negative number.
    __device__ int chunk_at(const WindowChunks& chunks, int i) const {
        const int y = divide(i, chunks.columns_reciprocal), x = i - y * chunks.columns;
        return i < chunks.count ? (chunks.y0 + y) * chunk_columns + chunks.x0 + x : -1;
    }
    __device__ int chunk_of(const WindowChunks& chunks, const Position& at) const {
        const int y = divide(at.y - chunks.y0 * chunk_height, chunk_height_reciprocal);
        return y * chunks.columns + divide(at.x - chunks.x0 * chunk_width, chunk_width_reciprocal);
    }
};

// Rows of one number each, as the first operand [16, 16] of a product: of rows group and group + 8 of the
// warp number `value[r]` in column `column[r]`, zeros where that is not in [0, 16).
template <class S>
__device__ inline void select_columns(uint32_t (&a)[4], const int (&column)[2], float upper, float lower) {
    const int pair = threadIdx.x % 4 * 2;
    const float value[2] = {upper, lower};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t word = column[r] % 2 ? pack<S>(0, value[r]) : pack<S>(value[r], 0);
        const int even = column[r] & ~1;
        a[r] = even == pair ? word : 0;
        a[r + 2] = even == pair + 8 ? word : 0;
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    window_attention_bwd_kernel(const __grid_constant__ AttentionParams p,
                                const __grid_constant__ WindowGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kBlock = Traits::kBlock,
                  kBlockChunks = Traits::kBlockChunks;
    constexpr bool kGeneral = Traits::kGeneral, kHasPrefix = Traits::kHasPrefix;
    using RowTile = Tile<S, kHeadDim>;
    using Prefix = PrefixQueries<S, kHeadDim>;
    using Tokens = typename Traits::Tokens;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();

    const Windows& w = plan.windows;
    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int landmarks = static_cast<int>(p.num_landmarks);
    const int globals = landmarks + (kHasPrefix ? plan.windows.num_prefix_tokens : 0);
    const int head = blockIdx.x % heads;
    const int slice = blockIdx.x / heads % plan.slices;
    const int batch = blockIdx.x / heads / plan.slices;
    const int64_t bh = int64_t{batch} * heads + head;
    const int first_window = static_cast<int>(int64_t{w.num_windows} * slice / plan.slices);
    const int last_window = static_cast<int>(int64_t{w.num_windows} * (slice + 1) / plan.slices);
    const int size = w.queries.size();

    const RowTile queries{shared.query}, keys{shared.key}, values{shared.value},
        grad_outputs{shared.grad_output};
    const RowTile global_keys{shared.global_key}, global_values{shared.global_value};
    const Tile<S, kBlock> grad_scores{shared.grad_score};
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int own = warp * 16; // first of the warp's keys, and then of its queries
    const bool* const mask =
        kGeneral && p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * w.num_tokens : nullptr;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
    const ChunkTerms& terms = p.chunk_terms;
    const DropoutWeights<kGeneral> dropout(p, bh);

    // Fills all but the numbers of `load_numbers` and `store_numbers`, which are in flight longer.
    const int own_index = min(static_cast<int>(threadIdx.x), size - 1);
    const int own_y = divide(own_index, w.queries.width_reciprocal);
    const int own_x = own_index - own_y * w.queries.width, own_place = w.key_place(own_index);
    const auto describe = [&](int window, Tokens& tokens) {
        const int i = threadIdx.x;
        if (i >= kBlock) return;
        const int row = window / w.columns;
        const TokenBox box = w.query_box(row, window - row * w.columns);
        const WindowChunks chunks = plan.chunks_of(box);
        const Position at{box.y0 + own_y, box.x0 + own_x};
        const bool inside = i < size && at.y < box.grid_height && at.x < box.grid_width;
        const int token = inside ? box.num_prefix_tokens + at.y * box.grid_width + at.x : -1;
        const int valid = token >= 0 && mask && mask[token] ? -1 : token;
        tokens.inside[i] = token;
        tokens.valid[i] = valid;
        tokens.key_place[i] = valid < 0 ? w.hidden : own_place;
        tokens.chunk[i] = valid < 0 ? -1 : plan.chunk_of(chunks, at);
        if (i == 0) tokens.chunks = chunks;
        if (i < kBlockChunks) tokens.first_chunks[i] = terms.omega ? plan.chunk_at(chunks, i) : -1;
    };
    float logsumexp = 0, delta = 0, chunk_weight = 0, chunk_grad = 0;
    const auto load_numbers = [&](const Tokens& tokens) {
        if (threadIdx.x >= kBlock) return;
        const int token = tokens.valid[threadIdx.x]; // written by this thread
        const int64_t at = bh * w.num_tokens + token;
        const auto load = [&](const void* from, float otherwise) {
            return from && token >= 0 ? static_cast<const float*>(from)[at] : otherwise;
        };
        logsumexp = load(p.logsumexp, kInfinity);
        delta = load(p.delta, 0.0f);
        chunk_weight = load(terms.token_weight, 0.0f);
        chunk_grad = load(terms.token_grad, 0.0f);
    };
    const auto store_numbers = [&](Tokens& tokens) {
        if (threadIdx.x >= kBlock) return;
        tokens.logsumexp[threadIdx.x] = logsumexp * kLog2e;
        tokens.delta[threadIdx.x] = delta;
        tokens.chunk_weight[threadIdx.x] = chunk_weight;
        tokens.chunk_grad[threadIdx.x] = chunk_grad;
    };

    using Gather = GatherRows<kBlock, kThreads, kHeadDim>; // a warp copies its own rows
    int row_token[Gather::kCount];                         // of the window whose rows come next
    const auto find_rows = [&](const Tokens& tokens) {
#pragma unroll
        for (int i = 0; i < Gather::kCount; ++i)
            row_token[i] = Gather::unit() * 8 < head_dim ? tokens.valid[Gather::row(i)] : -1;
    };
    const auto load_rows = [&](RowTile tile, const Rows& rows) {
        gather_rows<Gather>(tile, head_rows<S>(rows, batch, head), rows.token_stride, row_token);
    };
    const auto load_globals = [&](int block) {
        gather_globals<kBlock, kThreads, kHasPrefix>(global_keys, p, p.landmark_key, p.key, batch, head,
                                                     block * kBlock);
        gather_globals<kBlock, kThreads, kHasPrefix>(global_values, p, p.landmark_value, p.value, batch, head,
                                                     block * kBlock);
    };

    // Chunk terms of a block of chunks: kRowsPerLoad rows of one kind from a warp at a time.
    constexpr int kLanesPerRow = kHeadDim / 4, kRowsPerLoad = kWarpSize / kLanesPerRow;
    constexpr int kTermLoads = kBlockChunks / kRowsPerLoad;
    const auto* const term_rows = static_cast<const S*>(warp == 0   ? terms.grad_beta
                                                        : warp == 1 ? terms.omega
                                                        : warp == 2 ? terms.grad_key_mean
                                                                    : terms.grad_query_mean);
    const int term_row = lane / kLanesPerRow, term_column = lane % kLanesPerRow * 4;
    const S* const term_base = term_rows + bh * plan.num_chunks * head_dim + term_column;
    const auto load_term = [&](int chunk) {
        return chunk >= 0 && term_column < head_dim
                   ? *reinterpret_cast<const uint2*>(term_base + int64_t{chunk} * head_dim)
                   : uint2{};
    };
    const auto load_first_term = [&](const Tokens& tokens, int i) {
        return load_term(tokens.first_chunks[i * kRowsPerLoad + term_row]);
    };
    const auto store_term = [&](const uint2& x, int i) {
        const RowTile tile{shared.chunk_terms[warp]};
        S* const to = tile.unit(i * kRowsPerLoad + term_row, term_column / 8) + term_column % 8;
        *reinterpret_cast<uint2*>(to) = x;
    };

    if (first_window < last_window) {
        describe(first_window, shared.tokens[0]);
        __syncthreads();
        find_rows(shared.tokens[0]);
        load_rows(queries, p.query);
        load_rows(keys, p.key);
        load_rows(values, p.value);
        load_rows(grad_outputs, p.grad_output);
        if (plan.global_blocks == 1) load_globals(0);
        if constexpr (kHasPrefix) Prefix{shared.prefix}.load(p, batch, head);
        copy_commit();
        load_numbers(shared.tokens[0]);
        for (int i = 0; i < kTermLoads; ++i) store_term(load_first_term(shared.tokens[0], i), i);
        store_numbers(shared.tokens[0]);
    }
    fill_bias_table<kThreads>(p, w, head, shared.bias_table);
    if (threadIdx.x < kBlock) {
        shared.query_place[threadIdx.x] = w.query_place(min(static_cast<int>(threadIdx.x), size - 1));
        if (plan.global_blocks == 1 && !p.exclude_window_landmarks)
            shared.global_bias[threadIdx.x] = global_bias(p, w.key_box(0, 0), batch, threadIdx.x);
    }

    float grad_bias[kBlock / 8][4] = {}; // of the warp's keys and all queries, summed over windows
    [[maybe_unused]] float grad_prefix_query[Prefix::kTiles][2] = {}; // likewise
    for (int window = first_window; window < last_window; ++window) {
        const Tokens& tokens = shared.tokens[(window - first_window) % 2];
        Tokens& next_tokens = shared.tokens[(window - first_window + 1) % 2];
        const bool has_next = window + 1 < last_window;
        copy_wait<0>();
        publish_tiles();
        __syncthreads();
        if (has_next) {
            describe(window + 1, next_tokens);
            load_numbers(next_tokens);
        }
        if (kGeneral && p.exclude_window_landmarks && plan.global_blocks == 1 && threadIdx.x < kBlock)
            shared.global_bias[threadIdx.x] =
                global_bias(p, w.key_box(window / w.columns, window % w.columns), batch, threadIdx.x);

        const int key_token[2] = {tokens.valid[own + group], tokens.valid[own + group + 8]};
        [[maybe_unused]] uint32_t prefix_weight[2], prefix_grad_score[2];
        if constexpr (kHasPrefix)
            Prefix{shared.prefix}.weigh(prefix_weight, prefix_grad_score, keys, values, own, key_token,
                                        scale_log2, dropout);
        uint32_t weight[kBlock / 16][4], key_grad_score[kBlock / 16][4];
        {
            // Keys on M, queries on N.
            float product[kBlock / 8][4];
            begin_products<kHeadDim>();
            multiply_transposed(product, keys, own, queries, size);
            end_products<kHeadDim>(product);
            const float* const bias[2] = {shared.bias_table + tokens.key_place[own + group],
                                          shared.bias_table + tokens.key_place[own + group + 8]};
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                float x[4] = {};
                if (8 * n < size) {
                    const int2 place = *reinterpret_cast<const int2*>(&shared.query_place[8 * n + pair]);
                    const float2 lse = *reinterpret_cast<const float2*>(&tokens.logsumexp[8 * n + pair]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float logit =
                            product[n][e] * scale_log2 + bias[e / 2][-(e % 2 ? place.y : place.x)];
                        x[e] = exp2_approx(logit - (e % 2 ? lse.y : lse.x));
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) weight[n / 2][n % 2 * 2 + r] = pack<S>(x[2 * r], x[2 * r + 1]);
            }
            begin_products<kHeadDim>();
            multiply_transposed(product, values, own, grad_outputs, size);
            end_products<kHeadDim>(product);
            const auto kept = dropout.template factors<kBlock / 8>(
                [&](int n, int e) { return tokens.valid[8 * n + pair + e % 2]; },
                [&](int, int e) { return key_token[e / 2]; });
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                const float2 row_delta = *reinterpret_cast<const float2*>(&tokens.delta[8 * n + pair]);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t& packed = weight[n / 2][n % 2 * 2 + r];
                    uint32_t& ds = key_grad_score[n / 2][n % 2 * 2 + r];
                    ds = 0;
                    if (8 * n < size) {
                        const float2 x = unpack<S>(packed);
                        const float left = x.x * (kept(product[n][2 * r], n, 2 * r) - row_delta.x);
                        const float right = x.y * (kept(product[n][2 * r + 1], n, 2 * r + 1) - row_delta.y);
                        if (kGeneral) packed = pack<S>(kept(x.x, n, 2 * r), kept(x.y, n, 2 * r + 1));
                        grad_bias[n][2 * r] += left;
                        grad_bias[n][2 * r + 1] += right;
                        ds = pack<S>(left, right);
                    }
                    *reinterpret_cast<uint32_t*>(grad_scores.unit(own + group + 8 * r, n) + pair) = ds;
                }
            }
        }
        publish_tiles();
        __syncthreads();

        const int chunk_blocks = !terms.omega ? 0
                                 : kGeneral   ? (tokens.chunks.count + kBlockChunks - 1) / kBlockChunks
                                              : 1;
        // For each block of chunks: the columns that the warp's tokens have in it.
        const auto for_chunks = [&](const auto& add) {
            for (int block = 0; block < chunk_blocks; ++block) {
                if (kGeneral && chunk_blocks > 1) {
                    __syncthreads();
#pragma unroll 1
                    for (int i = 0; i < kTermLoads; ++i) {
                        const int n = block * kBlockChunks + i * kRowsPerLoad + term_row;
                        store_term(load_term(plan.chunk_at(tokens.chunks, n)), i);
                    }
                    __syncthreads();
                }
                const int column[2] = {tokens.chunk[own + group] - block * kBlockChunks,
                                       tokens.chunk[own + group + 8] - block * kBlockChunks};
                add(column);
            }
        };
        const auto add_term = [&](float (&gradient)[kHeadDim / 8][4], int term, const int (&column)[2],
                                  float upper, float lower) {
            uint32_t factor[1][4];
            select_columns<S>(factor[0], column, upper, lower);
            multiply(gradient, factor, RowTile{shared.chunk_terms[term]}, kBlockChunks);
        };
        const auto store = [&](const Rows& rows) {
            S* const base = static_cast<S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
            store_staged(values, own, base, rows.token_stride, head_dim,
                         [&](int row) { return tokens.inside[row]; });
        };
        {
            float grad_value[kHeadDim / 8][4] = {};
            begin_products<kHeadDim>();
            multiply(grad_value, weight, grad_outputs, size);
            end_products<kHeadDim>(grad_value);
            if constexpr (kHasPrefix) Prefix{shared.prefix}.add_to_values(grad_value, prefix_weight);
            for_chunks([&](const int (&column)[2]) {
                add_term(grad_value, 0, column, tokens.chunk_weight[own + group],
                         tokens.chunk_weight[own + group + 8]);
            });
            stage_gradient(grad_value, values, own);
            store(p.grad_value);
        }
        if constexpr (kHasPrefix) Prefix{shared.prefix}.add_to_queries(grad_prefix_query, keys);
        {
            float grad_key[kHeadDim / 8][4] = {};
            begin_products<kHeadDim>();
            multiply(grad_key, key_grad_score, queries, size);
            end_products<kHeadDim>(grad_key);
            if constexpr (kHasPrefix) Prefix{shared.prefix}.add_to_keys(grad_key, prefix_grad_score);
            multiply_all(grad_key, scale);
            const float upper = tokens.chunk_grad[own + group], lower = tokens.chunk_grad[own + group + 8];
            for_chunks([&](const int (&column)[2]) {
                add_term(grad_key, 1, column, upper, lower);
                add_term(grad_key, 2, column, 1, 1);
            });
            uint32_t factor[1][4];
            const int diagonal[2] = {group, group + 8};
            select_columns<S>(factor[0], diagonal, -upper, -lower);
            multiply(grad_key, factor, RowTile{keys.data + own * kHeadDim}, 16);
            stage_gradient(grad_key, values, own);
            store(p.grad_key);
        }

        int query_token[2], visible_landmarks[2];
        float lse[2], row_delta[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = own + group + 8 * r;
            query_token[r] = tokens.valid[row];
            lse[r] = tokens.logsumexp[row];
            row_delta[r] = tokens.delta[row];
            visible_landmarks[r] =
                kGeneral && g.is_causal ? query_token[r] / static_cast<int>(g.chunk_width) : INT_MAX;
        }
        float grad_query[kHeadDim / 8][4];
        begin_products<kHeadDim>();
        multiply_left_transposed(grad_query, grad_scores, own, keys, size);
        end_products<kHeadDim>(grad_query);
        const int global_blocks = kGeneral ? plan.global_blocks : 1;
        for (int block = 0; block < global_blocks; ++block) {
            const int first = block * kBlock;
            if (kGeneral && global_blocks > 1) {
                __syncthreads();
                load_globals(block);
                copy_commit();
                if (threadIdx.x < kBlock)
                    shared.global_bias[threadIdx.x] = global_bias(
                        p, w.key_box(window / w.columns, window % w.columns), batch, first + threadIdx.x);
                copy_wait<0>();
                publish_tiles();
                __syncthreads();
            }
            // Queries on M, global columns on N.
            float product[kBlock / 8][4];
            begin_products<kHeadDim>();
            multiply_transposed(product, queries, own, global_keys, globals - first);
            end_products<kHeadDim>(product);
            uint32_t grad_score[kBlock / 16][4];
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                float x[4] = {};
                if (first + 8 * n < globals) {
                    const float2 bias = *reinterpret_cast<const float2*>(&shared.global_bias[8 * n + pair]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float logit = product[n][e] * scale_log2 + (e % 2 ? bias.y : bias.x);
                        x[e] = exp2_approx(logit - lse[e / 2]);
                        if (kGeneral && g.is_causal &&
                            first + 8 * n + pair + e % 2 >= visible_landmarks[e / 2])
                            x[e] = 0;
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    grad_score[n / 2][n % 2 * 2 + r] = pack<S>(x[2 * r], x[2 * r + 1]);
            }
            begin_products<kHeadDim>();
            multiply_transposed(product, grad_outputs, own, global_values, globals - first);
            end_products<kHeadDim>(product);
            const auto kept = dropout.template factors<kBlock / 8>(
                [&](int, int e) { return query_token[e / 2]; },
                [&](int n, int e) {
                    return global_entry<kHasPrefix>(first + 8 * n + pair + e % 2, landmarks, w.num_tokens);
                });
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                if (first + 8 * n >= globals) continue;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t& packed = grad_score[n / 2][n % 2 * 2 + r];
                    const float2 x = unpack<S>(packed);
                    packed = pack<S>(x.x * (kept(product[n][2 * r], n, 2 * r) - row_delta[r]),
                                     x.y * (kept(product[n][2 * r + 1], n, 2 * r + 1) - row_delta[r]));
                }
            }
            begin_products<kHeadDim>();
            multiply(grad_query, grad_score, global_keys, globals - first);
            end_products<kHeadDim>(grad_query);
        }
        multiply_all(grad_query, scale);
        for_chunks([&](const int (&column)[2]) { add_term(grad_query, 3, column, 1, 1); });
        stage_gradient(grad_query, values, own);
        __syncthreads();
        if (has_next) {
            find_rows(next_tokens);
            load_rows(queries, p.query);
            load_rows(keys, p.key);
            load_rows(grad_outputs, p.grad_output);
        }
        store(p.grad_query);
        if (has_next) {
            uint2 next_terms[kTermLoads];
#pragma unroll
            for (int i = 0; i < kTermLoads; ++i) next_terms[i] = load_first_term(next_tokens, i);
            load_rows(values, p.value);
            copy_commit();
            store_numbers(next_tokens);
#pragma unroll
            for (int i = 0; i < kTermLoads; ++i) store_term(next_terms[i], i);
        }
    }

    if constexpr (kHasPrefix) Prefix::store_queries(p, grad_prefix_query, bh * plan.slices + slice);
    if (!p.grad_relative_bias) return;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            shared.bias_sum[own + group + e / 2 * 8][8 * n + pair + e % 2] = grad_bias[n][e];
    __syncthreads();
    const int64_t piece = (head * p.shape.batch + batch) * plan.slices + slice;
    store_bias_gradient<kThreads>(shared.bias_sum, g, w.queries, 1.0f,
                                  static_cast<float*>(p.grad_relative_bias) +
                                      piece * g.bias_height * g.bias_width);
}

template <class Traits>
int64_t count_bias_pieces(const AttentionParams& p) {
    return count_slices(p.shape.batch * p.shape.heads, p.shape.geometry.num_windows(), Traits::kSlots);
}

// Whether dropout, a mask, hidden landmarks or more than one block of global columns or chunks are to be
// handled.
template <class Traits>
bool is_general(const AttentionParams& p) {
    const Geometry& g = p.shape.geometry;
    const auto most_chunks = [](int64_t window, int64_t chunk) { return (window + chunk - 2) / chunk + 1; };
    return p.dropout.threshold > 0 || p.key_padding_mask || g.is_causal || p.exclude_window_landmarks ||
           p.num_landmarks + g.num_prefix_tokens > Traits::kBlock ||
           most_chunks(g.window_height, g.chunk_height) * most_chunks(g.window_width, g.chunk_width) >
               Traits::kBlockChunks;
}

template <class Traits>
void launch_window_attention_bwd(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const int64_t slices = count_bias_pieces<Traits>(p);
    const int64_t blocks = p.shape.batch * p.shape.heads * slices;
    if (blocks == 0 || g.num_tokens() == 0) return;
    const WindowGradPlan plan{
        .windows = Windows::of(p),
        .slices = static_cast<int>(slices),
        .global_blocks = static_cast<int>(
            detail::max(detail::ceil_div(p.num_landmarks + g.num_prefix_tokens, Traits::kBlock), 1)),
        .num_chunks = static_cast<int>(g.num_chunks()),
        .chunk_columns = static_cast<int>(g.chunk_columns()),
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
        .chunk_height_reciprocal = reciprocal(static_cast<int>(g.chunk_height)),
        .chunk_width_reciprocal = reciprocal(static_cast<int>(g.chunk_width)),
    };
    constexpr int kBytes = sizeof(typename Traits::Shared);
    const auto kernel = window_attention_bwd_kernel<Traits>;
    static LimitsOf limits_of;
    limits_of(kernel);
    launch_dependent(kernel, blocks, Traits::kThreads, kBytes, stream, p, plan);
}

} // namespace eva_attn::cuda::mma
