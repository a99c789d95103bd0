// Last kernels of the joint attention's backward for windows of any size and overlap: one for the gradients
// of keys and values, one for those of queries. The block's 64 rows meet blocks of columns, one loaded ahead.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/window_attention_bwd_prefix.cuh"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {

template <class S_, int kHeadDim_, bool kHasDropout_, bool kHasPrefix_ = false>
struct BlockGradTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kHasDropout = kHasDropout_, kHasPrefix = kHasPrefix_;
    static constexpr int kBlockM = 64, kBlockN = kHeadDim == 64 ? 64 : 32;
    static constexpr int kThreads = kBlockM / 16 * kWarpSize;
    static constexpr int kCtasPerSm = kHasDropout || kHeadDim == 128 ? 2 : 3;

    struct Columns {
        alignas(1024) S first[kBlockN * kHeadDim];  // queries, or keys and global keys
        alignas(1024) S second[kBlockN * kHeadDim]; // gradients of outputs, or values and global values
        int token[kBlockN];                         // -1: none; of a landmark its number in dropout's counter
        union {
            float logsumexp[kBlockN]; // of queries, times log2(e)
            float bias[kBlockN];      // of keys and global columns, -inf: hidden
        };
        float delta[kBlockN]; // of queries
    };
    struct Shared {
        alignas(1024) S first[kBlockM * kHeadDim];
        alignas(1024) S second[kBlockM * kHeadDim];
        Columns columns[2];
        PrefixShared<S, kHeadDim, kHasPrefix> prefix;
    };
};

struct BlockGradPlan {
    Windows windows;
    int blocks_per_window; // of kBlockM queries, or of as many keys of the window's own
    int num_chunks, chunk_columns, chunk_height, chunk_width;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    window_attention_bwd_keys_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ BlockGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kBlockM = Traits::kBlockM,
                  kBlockN = Traits::kBlockN;
    constexpr bool kHasDropout = Traits::kHasDropout, kHasPrefix = Traits::kHasPrefix;
    using RowTile = Tile<S, kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();

    const Windows& w = plan.windows;
    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int head = blockIdx.x % heads;
    int rest = blockIdx.x / heads;
    const int first_key = rest % plan.blocks_per_window * kBlockM;
    rest /= plan.blocks_per_window;
    const int window = rest % w.num_windows, batch = rest / w.num_windows;
    const int64_t bh = int64_t{batch} * heads + head;
    const int own_row = window / w.columns, own_column = window % w.columns;
    const bool* const mask =
        p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * w.num_tokens : nullptr;
    const auto valid = [&](int token) { return token >= 0 && mask && mask[token] ? -1 : token; };
    const TokenBox keys_box = w.query_box(own_row, own_column);

    // The windows that may see these keys, and their blocks of queries, numbered through.
    const Box seeing = g.windows_seeing(window);
    const int seeing_columns = static_cast<int>(seeing.width());
    const int query_blocks = (w.queries.size() + kBlockN - 1) / kBlockN;
    const int last = static_cast<int>(seeing.height()) * seeing_columns * query_blocks;
    const int start =
        g.is_causal ? first_key / kBlockN : 0; // a causal window comes first of those that see it
    const auto window_row = [&](int i) {
        return static_cast<int>(seeing.y0) + i / query_blocks / seeing_columns;
    };
    const auto window_column = [&](int i) {
        return static_cast<int>(seeing.x0) + i / query_blocks % seeing_columns;
    };

    float logsumexp = 0, delta = 0;
    const auto load = [&](int i, typename Traits::Columns& columns) {
        const TokenBox box = w.query_box(window_row(i), window_column(i));
        const int first = i % query_blocks * kBlockN;
        using Gather = GatherRows<kBlockN, kThreads, kHeadDim>;
        int token[Gather::kCount];
#pragma unroll
        for (int j = 0; j < Gather::kCount; ++j)
            token[j] = Gather::unit() * 8 < head_dim ? valid(box.token(first + Gather::row(j))) : -1;
        gather_rows<Gather>(RowTile{columns.first}, head_rows<S>(p.query, batch, head), p.query.token_stride,
                            token);
        gather_rows<Gather>(RowTile{columns.second}, head_rows<S>(p.grad_output, batch, head),
                            p.grad_output.token_stride, token);
        copy_commit();
        if (threadIdx.x >= kBlockN) return;
        const int own_token = valid(box.token(first + threadIdx.x));
        columns.token[threadIdx.x] = own_token;
        const int64_t at = bh * w.num_tokens + own_token;
        logsumexp = own_token < 0 ? kInfinity : static_cast<const float*>(p.logsumexp)[at];
        delta = own_token < 0 ? 0.0f : static_cast<const float*>(p.delta)[at];
    };

    const RowTile keys{shared.first}, values{shared.second};
    {
        const auto key_token = [&](int row) { return valid(keys_box.token(first_key + row)); };
        gather<kBlockM, kThreads>(keys, head_rows<S>(p.key, batch, head), p.key.token_stride, head_dim,
                                  key_token);
        gather<kBlockM, kThreads>(values, head_rows<S>(p.value, batch, head), p.value.token_stride, head_dim,
                                  key_token);
        if constexpr (kHasPrefix) PrefixQueries<S, kHeadDim>{shared.prefix}.load(p, batch, head);
        load(start, shared.columns[0]);
    }

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2, own = warp * 16;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
    const DropoutWeights<kHasDropout> dropout(p, bh);
    int token[2];
    Position at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        token[r] = valid(keys_box.token(first_key + own + group + 8 * r));
        at[r] = keys_box.position(first_key + own + group + 8 * r);
    }

    float grad_key[kHeadDim / 8][4] = {}, grad_value[kHeadDim / 8][4] = {};
    for (int i = start, stage = 0; i < last; ++i, stage ^= 1) {
        auto& columns = shared.columns[stage];
        if (threadIdx.x < kBlockN) {
            columns.logsumexp[threadIdx.x] = logsumexp * kLog2e;
            columns.delta[threadIdx.x] = delta;
        }
        copy_wait<0>();
        publish_tiles();
        __syncthreads();
        if (i + 1 < last) load(i + 1, shared.columns[stage ^ 1]);

        const TokenBox seen = w.key_box(window_row(i), window_column(i));
        float bias[2]; // -inf: the window's queries don't see the key
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int y = at[r].y - seen.y0, x = at[r].x - seen.x0;
            const bool visible =
                token[r] >= 0 && y >= 0 && y < seen.shape.height && x >= 0 && x < seen.shape.width;
            bias[r] = visible ? 0.0f : -kInfinity;
        }
        const RowTile queries{columns.first}, grad_outputs{columns.second};
        const int count = w.queries.size() - i % query_blocks * kBlockN;
        float score[kBlockN / 8][4], grad_weight[kBlockN / 8][4];
        begin_products<kHeadDim>();
        multiply_transposed(score, keys, own, queries, count);
        multiply_transposed(grad_weight, values, own, grad_outputs, count);
        end_products<kHeadDim>(score, grad_weight);
        if (g.is_causal && i < query_blocks && i * kBlockN < first_key + kBlockM) {
#pragma unroll
            for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (token[e / 2] > columns.token[8 * n + pair + e % 2]) score[n][e] = -kInfinity;
        }
        const auto kept = dropout.template factors<kBlockN / 8>(
            [&](int n, int e) { return columns.token[8 * n + pair + e % 2]; },
            [&](int, int e) { return token[e / 2]; });
        uint32_t weight[kBlockN / 16][4], grad_score[kBlockN / 16][4];
        weigh_queries<S>(weight, grad_score, score, grad_weight, scale_log2, bias, columns.logsumexp,
                         columns.delta, kept);
        begin_products<kHeadDim>();
        multiply(grad_value, weight, grad_outputs, count);
        multiply(grad_key, grad_score, queries, count);
        end_products<kHeadDim>(grad_value, grad_key);
    }

    if constexpr (kHasPrefix) {
        using Prefix = PrefixQueries<S, kHeadDim>;
        const Prefix prefix{shared.prefix};
        uint32_t weight[2], grad_score[2];
        prefix.weigh(weight, grad_score, keys, values, own, token, scale_log2, dropout);
        prefix.add_to_values(grad_value, weight);
        prefix.add_to_keys(grad_key, grad_score);
        __syncthreads();
        float grad_query[Prefix::kTiles][2] = {};
        prefix.add_to_queries(grad_query, keys);
        const int block = first_key / kBlockM;
        prefix.store_queries(p, grad_query, (bh * w.num_windows + window) * plan.blocks_per_window + block);
    }
    multiply_all(grad_key, scale);
    const ChunkTerms& terms = p.chunk_terms;
    if (terms.omega) {
        int64_t chunk_row[2] = {-1, -1}, token_row[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (token[r] < 0) continue;
            const int chunk = at[r].y / plan.chunk_height * plan.chunk_columns + at[r].x / plan.chunk_width;
            chunk_row[r] = (bh * plan.num_chunks + chunk) * head_dim;
            token_row[r] = bh * w.num_tokens + token[r];
        }
        add_key_terms<S>(grad_key, grad_value, terms, chunk_row, token_row, head_dim, [&](int d, int r) {
            return reinterpret_cast<const uint32_t*>(keys.unit(own + group + 8 * r, d) + pair);
        });
    }
    __syncthreads();
    const auto store = [&](const float (&gradient)[kHeadDim / 8][4], const Rows& rows) {
        S* const base = static_cast<S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
        stage_gradient(gradient, values, own);
        store_staged(values, own, base, rows.token_stride, head_dim,
                     [&](int row) { return keys_box.token(first_key + row); });
    };
    store(grad_value, p.grad_value);
    store(grad_key, p.grad_key);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    window_attention_bwd_queries_kernel(const __grid_constant__ AttentionParams p,
                                        const __grid_constant__ BlockGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kBlockM = Traits::kBlockM,
                  kBlockN = Traits::kBlockN;
    constexpr bool kHasDropout = Traits::kHasDropout, kHasPrefix = Traits::kHasPrefix;
    using RowTile = Tile<S, kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();

    const Windows& w = plan.windows;
    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int landmarks = static_cast<int>(p.num_landmarks);
    const int head = blockIdx.x % heads;
    int rest = blockIdx.x / heads;
    const int first_query = rest % plan.blocks_per_window * kBlockM;
    rest /= plan.blocks_per_window;
    const int window = rest % w.num_windows, batch = rest / w.num_windows;
    const int64_t bh = int64_t{batch} * heads + head;
    const int row = window / w.columns, column = window % w.columns;
    const bool* const mask =
        p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * w.num_tokens : nullptr;
    const auto valid = [&](int token) { return token >= 0 && mask && mask[token] ? -1 : token; };
    const TokenBox box = w.query_box(row, column), keys_box = w.key_box(row, column);

    // Blocks of window keys, then of global columns.
    int num_keys = w.keys.size(), num_globals = landmarks + (kHasPrefix ? w.num_prefix_tokens : 0);
    if (g.is_causal) {
        const int last_query = min(first_query + kBlockM, w.queries.size()) - 1;
        num_keys = min(num_keys, last_query + 1 + w.overlap_x);
        num_globals = min(landmarks, (box.x0 + last_query) / static_cast<int>(g.chunk_width));
    }
    const int key_blocks = (num_keys + kBlockN - 1) / kBlockN;
    const int last = key_blocks + (num_globals + kBlockN - 1) / kBlockN;

    const auto load = [&](int i, typename Traits::Columns& columns) {
        const RowTile first{columns.first}, second{columns.second};
        const int first_column = (i - key_blocks) * kBlockN;
        if (i < key_blocks) {
            using Gather = GatherRows<kBlockN, kThreads, kHeadDim>;
            int token[Gather::kCount];
#pragma unroll
            for (int j = 0; j < Gather::kCount; ++j)
                token[j] =
                    Gather::unit() * 8 < head_dim ? valid(keys_box.token(i * kBlockN + Gather::row(j))) : -1;
            gather_rows<Gather>(first, head_rows<S>(p.key, batch, head), p.key.token_stride, token);
            gather_rows<Gather>(second, head_rows<S>(p.value, batch, head), p.value.token_stride, token);
        } else {
            gather_globals<kBlockN, kThreads, kHasPrefix>(first, p, p.landmark_key, p.key, batch, head,
                                                          first_column);
            gather_globals<kBlockN, kThreads, kHasPrefix>(second, p, p.landmark_value, p.value, batch, head,
                                                          first_column);
        }
        copy_commit();
        if (threadIdx.x >= kBlockN) return;
        if (i < key_blocks) {
            const int token = valid(keys_box.token(i * kBlockN + threadIdx.x));
            columns.token[threadIdx.x] = token;
            columns.bias[threadIdx.x] = token < 0 ? -kInfinity : 0.0f;
        } else {
            const int column = first_column + threadIdx.x;
            columns.token[threadIdx.x] = global_entry<kHasPrefix>(column, landmarks, w.num_tokens);
            columns.bias[threadIdx.x] = global_bias(p, keys_box, batch, column);
        }
    };

    const RowTile queries{shared.first}, grad_outputs{shared.second};
    const auto query_token = [&](int i) { return valid(box.token(first_query + i)); };
    gather<kBlockM, kThreads>(queries, head_rows<S>(p.query, batch, head), p.query.token_stride, head_dim,
                              query_token);
    gather<kBlockM, kThreads>(grad_outputs, head_rows<S>(p.grad_output, batch, head),
                              p.grad_output.token_stride, head_dim, query_token);
    if (last > 0) load(0, shared.columns[0]);

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2, own = warp * 16;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
    const DropoutWeights<kHasDropout> dropout(p, bh);
    int token[2], visible_landmarks[2];
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        token[r] = valid(box.token(first_query + own + group + 8 * r));
        visible_landmarks[r] = g.is_causal ? token[r] / static_cast<int>(g.chunk_width) : INT_MAX;
        const int64_t at = bh * w.num_tokens + token[r];
        lse[r] = token[r] < 0 ? kInfinity : static_cast<const float*>(p.logsumexp)[at] * kLog2e;
        delta[r] = token[r] < 0 ? 0.0f : static_cast<const float*>(p.delta)[at];
    }

    float grad_query[kHeadDim / 8][4] = {};
    for (int i = 0; i < last; ++i) {
        auto& columns = shared.columns[i % 2];
        copy_wait<0>();
        publish_tiles();
        __syncthreads();
        if (i + 1 < last) load(i + 1, shared.columns[(i + 1) % 2]);

        const RowTile first{columns.first}, second{columns.second};
        const bool of_window = i < key_blocks;
        const int count = of_window ? num_keys - i * kBlockN : num_globals - (i - key_blocks) * kBlockN;
        float score[kBlockN / 8][4], grad_weight[kBlockN / 8][4];
        begin_products<kHeadDim>();
        multiply_transposed(score, queries, own, first, count);
        multiply_transposed(grad_weight, grad_outputs, own, second, count);
        end_products<kHeadDim>(score, grad_weight);
        if (g.is_causal) {
            const int first_landmark = (i - key_blocks) * kBlockN;
#pragma unroll
            for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int c = 8 * n + pair + e % 2;
                    const bool hidden = of_window ? columns.token[c] > token[e / 2]
                                                  : first_landmark + c >= visible_landmarks[e / 2];
                    if (hidden) score[n][e] = -kInfinity;
                }
        }
        const auto kept = dropout.template factors<kBlockN / 8>(
            [&](int, int e) { return token[e / 2]; },
            [&](int n, int e) { return columns.token[8 * n + pair + e % 2]; });
        uint32_t grad_score[kBlockN / 16][4];
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) {
            const float2 bias = *reinterpret_cast<const float2*>(&columns.bias[8 * n + pair]);
            float ds[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float logit = score[n][e] * scale_log2 + (e % 2 ? bias.y : bias.x);
                ds[e] = exp2_approx(logit - lse[e / 2]) * (kept(grad_weight[n][e], n, e) - delta[e / 2]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) grad_score[n / 2][n % 2 * 2 + r] = pack<S>(ds[2 * r], ds[2 * r + 1]);
        }
        begin_products<kHeadDim>();
        multiply(grad_query, grad_score, first, count);
        end_products<kHeadDim>(grad_query);
    }

    multiply_all(grad_query, scale);
    if (p.chunk_terms.omega) {
        int64_t chunk_row[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Position at = box.position(first_query + own + group + 8 * r);
            const int chunk = at.y / plan.chunk_height * plan.chunk_columns + at.x / plan.chunk_width;
            chunk_row[r] = token[r] < 0 ? -1 : (bh * plan.num_chunks + chunk) * head_dim;
        }
        const float one[2] = {1, 1};
        add_chunk_term<S>(grad_query, p.chunk_terms.grad_query_mean, chunk_row, head_dim, one);
    }
    __syncthreads();
    S* const base = static_cast<S*>(p.grad_query.data) + batch * p.grad_query.batch_stride +
                    head * p.grad_query.head_stride;
    stage_gradient(grad_query, queries, own);
    store_staged(queries, own, base, p.grad_query.token_stride, head_dim,
                 [&](int row) { return box.token(first_query + row); });
}

template <class Traits>
void launch_window_attention_bwd_blocks(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    BlockGradPlan plan{
        .windows = Windows::of(p),
        .blocks_per_window = 0,
        .num_chunks = static_cast<int>(g.num_chunks()),
        .chunk_columns = static_cast<int>(g.chunk_columns()),
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
    };
    plan.blocks_per_window = static_cast<int>(detail::ceil_div(plan.windows.queries.size(), Traits::kBlockM));
    const int64_t blocks = p.shape.batch * p.shape.heads * plan.windows.num_windows * plan.blocks_per_window;
    if (blocks == 0) return;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of[2];
    auto* limits = limits_of;
    for (const auto kernel :
         {window_attention_bwd_keys_kernel<Traits>, window_attention_bwd_queries_kernel<Traits>}) {
        (*limits++)(kernel);
        launch_dependent(kernel, blocks, Traits::kThreads, kBytes, stream, p, plan);
    }
}

} // namespace eva_attn::cuda::mma
