// Last kernel of the joint attention's backward, for windows of up to 64 tokens that don't overlap: the
// gradients of a window's queries, keys and values in one pass, with what its tokens get as members of
// chunks.
#pragma once

#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {

// The chunks that the tokens of a window are members of.
struct WindowChunks {
    int y0, x0, rows, columns;
};

template <class S_, int kHeadDim_, bool kHasDropout_>
struct WindowGradTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kHasDropout = kHasDropout_;
    static constexpr int kBlock = 64; // tokens of a window, landmarks of a block
    static constexpr int kThreads = kBlock / 16 * kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 2 : 1;
    static constexpr int kMaxStagedChunks = 16; // whose terms wait in shared memory
    static constexpr int kMaxOffsets = 256;     // (2 h - 1) (2 w - 1) for h w <= 64

    static constexpr int kPartWidth = 32;             // columns that pass through `staging` together
    static constexpr int kStagingLd = kPartWidth + 8; // free of bank conflicts

    // What is known of the tokens of a window.
    struct Tokens {
        int inside[kBlock]; // the token, -1 outside of the grid
        int valid[kBlock];  // likewise, -1 at padding too
        int chunk_y[kBlock], chunk_x[kBlock];
        int key_place[kBlock];
        float logsumexp[kBlock]; // times log2(e)
        float delta[kBlock];
        float chunk_weight[kBlock], chunk_grad[kBlock];
        WindowChunks chunks;
    };
    struct Shared {
        union {
            struct {
                alignas(1024) S query[kBlock * kHeadDim];
                alignas(1024) S key[kBlock * kHeadDim];
                alignas(1024) S value[kBlock * kHeadDim];
                alignas(1024) S grad_output[kBlock * kHeadDim];
            };
            float bias_sum[kBlock][kBlock + 1]; // [key, query], in the end
        };
        alignas(1024) S landmark_key[kBlock * kHeadDim];
        alignas(1024) S landmark_value[kBlock * kHeadDim];
        alignas(1024) S grad_score[kBlock * kBlock];          // [key, query]
        float staging[kThreads / kWarpSize][16 * kStagingLd]; // of gradients on their way out
        float chunk_terms[4][kMaxStagedChunks][kHeadDim + 8];
        Tokens tokens[2];
        int query_place[kBlock];
        float landmark_bias[kBlock];
        float bias_table[kMaxOffsets + 2 * kBlock];
    };
};

struct WindowGradPlan {
    Windows windows;
    int slices; // a block takes one slice of the windows of one (batch, head)
    int landmark_blocks;
    int num_chunks, chunk_columns, chunk_height, chunk_width;

    __device__ WindowChunks chunks_of(int window) const {
        const TokenBox box = windows.query_box(window / windows.columns, window % windows.columns);
        const int y0 = box.y0 / chunk_height, x0 = box.x0 / chunk_width;
        const int last_y = min(box.y0 + box.shape.height, box.grid_height) - 1;
        const int last_x = min(box.x0 + box.shape.width, box.grid_width) - 1;
        return WindowChunks{y0, x0, last_y / chunk_height - y0 + 1, last_x / chunk_width - x0 + 1};
    }
};

template <class S>
struct GradientRows {
    S* base;
    int stride, head_dim;
    const int* token; // of each of the 16 rows, negative: none
};

// Writes 16 rows of gradients from a warp's accumulators; `finish` makes of eight sums of a row what is
// written.
template <class Traits, class S, class Finish>
__device__ inline void store_gradient(const float (&gradient)[Traits::kHeadDim / 8][4], float* staging,
                                      const GradientRows<S>& rows, const Finish& finish) {
    constexpr int kWidth = Traits::kPartWidth, kLd = Traits::kStagingLd;
    const int lane = threadIdx.x % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < Traits::kHeadDim / kWidth; ++part) {
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *reinterpret_cast<float2*>(staging + (group + 8 * r) * kLd + 8 * n + pair) = make_float2(
                    gradient[part * kWidth / 8 + n][2 * r], gradient[part * kWidth / 8 + n][2 * r + 1]);
        __syncwarp();
        const int within = lane % 4 * 8, column = part * kWidth + within;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = lane / 4 + 8 * i, token = rows.token[row];
            if (token < 0 || column >= rows.head_dim) continue;
            float y[8];
            load_floats(y, staging + row * kLd + within);
            finish(y, row, column);
            *reinterpret_cast<uint4*>(rows.base + int64_t{token} * rows.stride + column) = make_uint4(
                pack<S>(y[0], y[1]), pack<S>(y[2], y[3]), pack<S>(y[4], y[5]), pack<S>(y[6], y[7]));
        }
        __syncwarp();
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    window_attention_bwd_kernel(const __grid_constant__ AttentionParams p,
                                const __grid_constant__ WindowGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kBlock = Traits::kBlock;
    constexpr bool kHasDropout = Traits::kHasDropout;
    using RowTile = Tile<S, kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

    const Windows& w = plan.windows;
    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int landmarks = static_cast<int>(p.num_landmarks);
    const int head = blockIdx.x % heads;
    const int slice = blockIdx.x / heads % plan.slices;
    const int batch = blockIdx.x / heads / plan.slices;
    const int64_t bh = int64_t{batch} * heads + head;
    const int first_window = static_cast<int>(int64_t{w.num_windows} * slice / plan.slices);
    const int last_window = static_cast<int>(int64_t{w.num_windows} * (slice + 1) / plan.slices);
    const int size = w.queries.size();

    const RowTile queries{shared.query}, keys{shared.key}, values{shared.value},
        grad_outputs{shared.grad_output};
    const RowTile landmark_keys{shared.landmark_key}, landmark_values{shared.landmark_value};
    const Tile<S, kBlock> grad_scores{shared.grad_score};
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int own = warp * 16; // first of the warp's keys, and then of its queries
    const bool* const mask =
        p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * w.num_tokens : nullptr;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
    const ChunkTerms& terms = p.chunk_terms;
    const DropoutWeights<kHasDropout> dropout(p, bh);

    // Fills all but the numbers of `load_numbers` and `store_numbers`, which are in flight longer.
    const auto describe = [&](int window, typename Traits::Tokens& tokens) {
        const int i = threadIdx.x;
        if (i == kBlock) tokens.chunks = plan.chunks_of(window);
        if (i >= kBlock) return;
        const TokenBox box = w.query_box(window / w.columns, window % w.columns);
        const int token = box.token(i);
        const int valid = token >= 0 && mask && mask[token] ? -1 : token;
        tokens.inside[i] = token;
        tokens.valid[i] = valid;
        tokens.key_place[i] = valid < 0 ? w.hidden : w.key_place(i);
        const Position at = box.position(i);
        tokens.chunk_y[i] = at.y / plan.chunk_height;
        tokens.chunk_x[i] = at.x / plan.chunk_width;
    };
    const void* const term_rows[4] = {terms.grad_beta, terms.omega, terms.grad_key_mean,
                                      terms.grad_query_mean};
    const auto load_chunk_terms = [&](const WindowChunks& chunks) {
        constexpr int kQuarters = kHeadDim / 4;
        for (int i = threadIdx.x; i < chunks.rows * chunks.columns * kQuarters; i += kThreads) {
            const int staged = i / kQuarters, column = i % kQuarters * 4;
            const int y = staged / chunks.columns, x = staged - y * chunks.columns;
            const int chunk = (chunks.y0 + y) * plan.chunk_columns + chunks.x0 + x;
            const int64_t at = (bh * plan.num_chunks + chunk) * head_dim + (column < head_dim ? column : 0);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                copy_async(&shared.chunk_terms[k][staged][column],
                           static_cast<const float*>(term_rows[k]) + at, column < head_dim);
        }
        copy_commit();
    };
    float logsumexp = 0, delta = 0, chunk_weight = 0, chunk_grad = 0;
    const auto load_numbers = [&](const typename Traits::Tokens& tokens) {
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
    const auto store_numbers = [&](typename Traits::Tokens& tokens) {
        if (threadIdx.x >= kBlock) return;
        tokens.logsumexp[threadIdx.x] = logsumexp * kLog2e;
        tokens.delta[threadIdx.x] = delta;
        tokens.chunk_weight[threadIdx.x] = chunk_weight;
        tokens.chunk_grad[threadIdx.x] = chunk_grad;
    };

    using Gather = GatherRows<kBlock, kThreads, kHeadDim>;
    int row_token[Gather::kCount]; // of the window whose rows come next
    const auto find_rows = [&](const typename Traits::Tokens& tokens) {
#pragma unroll
        for (int i = 0; i < Gather::kCount; ++i)
            row_token[i] = Gather::unit() * 8 < head_dim ? tokens.valid[Gather::row(i)] : -1;
    };
    const auto load_rows = [&](RowTile tile, const Rows& rows) {
        gather_rows<Gather>(tile, head_rows<S>(rows, batch, head), rows.token_stride, row_token);
    };
    const auto load_landmarks = [&](int block) {
        const auto landmark_of = [&](int row) {
            const int landmark = block * kBlock + row;
            return landmark < landmarks ? landmark : -1;
        };
        const int64_t first = bh * landmarks * head_dim;
        gather<kBlock, kThreads>(landmark_keys, static_cast<const S*>(p.landmark_key) + first, head_dim,
                                 head_dim, landmark_of);
        gather<kBlock, kThreads>(landmark_values, static_cast<const S*>(p.landmark_value) + first, head_dim,
                                 head_dim, landmark_of);
    };
    // Where row 0 of a gradient goes, and how.
    const auto output = [&](const Rows& rows, const typename Traits::Tokens& tokens) {
        S* const base = static_cast<S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
        return GradientRows<S>{base, static_cast<int>(rows.token_stride), head_dim, tokens.inside + own};
    };

    if (first_window < last_window) {
        describe(first_window, shared.tokens[0]);
        load_numbers(shared.tokens[0]);
        store_numbers(shared.tokens[0]);
        __syncthreads();
        find_rows(shared.tokens[0]);
        load_rows(queries, p.query);
        load_rows(keys, p.key);
        load_rows(values, p.value);
        load_rows(grad_outputs, p.grad_output);
        if (plan.landmark_blocks == 1) load_landmarks(0);
        copy_commit();
    }
    fill_bias_table<kThreads>(p, w, head, shared.bias_table);
    if (threadIdx.x < kBlock) {
        shared.query_place[threadIdx.x] = w.query_place(min(static_cast<int>(threadIdx.x), size - 1));
        if (plan.landmark_blocks == 1 && !p.exclude_window_landmarks)
            shared.landmark_bias[threadIdx.x] = global_bias(p, w.key_box(0, 0), batch, threadIdx.x);
    }

    float grad_bias[kBlock / 8][4] = {}; // of the warp's keys and all queries, summed over windows
    for (int window = first_window; window < last_window; ++window) {
        const auto& tokens = shared.tokens[(window - first_window) % 2];
        auto& next_tokens = shared.tokens[(window - first_window + 1) % 2];
        const bool has_next = window + 1 < last_window;
        copy_wait<0>();
        publish_tiles();
        __syncthreads();
        const WindowChunks chunks = tokens.chunks;
        const bool staged = terms.omega && chunks.rows * chunks.columns <= Traits::kMaxStagedChunks;
        if (staged) load_chunk_terms(chunks);
        if (has_next) {
            describe(window + 1, next_tokens);
            load_numbers(next_tokens);
        }
        if (p.exclude_window_landmarks && plan.landmark_blocks == 1 && threadIdx.x < kBlock)
            shared.landmark_bias[threadIdx.x] =
                global_bias(p, w.key_box(window / w.columns, window % w.columns), batch, threadIdx.x);

        float grad_key[kHeadDim / 8][4] = {}, grad_value[kHeadDim / 8][4] = {};
        {
            // Keys on M, queries on N.
            float score[kBlock / 8][4], grad_weight[kBlock / 8][4];
            begin_products<kHeadDim>();
            multiply_transposed(score, keys, own, queries, size);
            multiply_transposed(grad_weight, values, own, grad_outputs, size);
            end_products<kHeadDim>(score, grad_weight);
            uint32_t weight[kBlock / 16][4], grad_score[kBlock / 16][4];
            int key_token[2];
            const float* bias[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                key_token[r] = tokens.valid[own + group + 8 * r];
                bias[r] = shared.bias_table + tokens.key_place[own + group + 8 * r];
            }
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                float w[4] = {}, ds[4] = {};
                if (8 * n < size) {
                    const int at = 8 * n + pair;
                    const int2 place = *reinterpret_cast<const int2*>(&shared.query_place[at]);
                    const float2 lse = *reinterpret_cast<const float2*>(&tokens.logsumexp[at]);
                    const float2 delta = *reinterpret_cast<const float2*>(&tokens.delta[at]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float logit =
                            score[n][e] * scale_log2 + bias[e / 2][-(e % 2 ? place.y : place.x)];
                        w[e] = exp2_approx(logit - (e % 2 ? lse.y : lse.x));
                        const float kept = dropout.factor(tokens.valid[at + e % 2], key_token[e / 2]);
                        ds[e] = w[e] * (grad_weight[n][e] * kept - (e % 2 ? delta.y : delta.x));
                        w[e] *= kept;
                        grad_bias[n][e] += ds[e];
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    weight[n / 2][n % 2 * 2 + r] = pack<S>(w[2 * r], w[2 * r + 1]);
                    grad_score[n / 2][n % 2 * 2 + r] = pack<S>(ds[2 * r], ds[2 * r + 1]);
                    *reinterpret_cast<uint32_t*>(grad_scores.unit(own + group + 8 * r, n) + pair) =
                        grad_score[n / 2][n % 2 * 2 + r];
                }
            }
            begin_products<kHeadDim>();
            multiply(grad_value, weight, grad_outputs, size);
            multiply(grad_key, grad_score, queries, size);
            end_products<kHeadDim>(grad_value, grad_key);
        }
        copy_wait<0>();
        publish_tiles();
        __syncthreads();
        if (has_next) {
            find_rows(next_tokens);
            load_rows(values, p.value);
        }
        // Eight columns of a row of chunk terms, of a valid token.
        const auto load_terms = [&](float (&x)[8], int k, int row, int column) {
            const int chunk_y = tokens.chunk_y[row], chunk_x = tokens.chunk_x[row];
            if (staged) {
                load_floats(x, &shared.chunk_terms[k][(chunk_y - chunks.y0) * chunks.columns + chunk_x -
                                                      chunks.x0][column]);
            } else {
                const int64_t chunk = bh * plan.num_chunks + chunk_y * plan.chunk_columns + chunk_x;
                load_floats(x, static_cast<const float*>(term_rows[k]) + chunk * head_dim + column);
            }
        };
        store_gradient<Traits>(grad_value, shared.staging[warp], output(p.grad_value, tokens),
                               [&](float (&y)[8], int i, int column) {
                                   if (!terms.omega || tokens.valid[own + i] < 0) return;
                                   float grad_beta[8];
                                   load_terms(grad_beta, 0, own + i, column);
                                   const float weight = tokens.chunk_weight[own + i];
#pragma unroll
                                   for (int d = 0; d < 8; ++d) y[d] += weight * grad_beta[d];
                               });
        store_gradient<Traits>(grad_key, shared.staging[warp], output(p.grad_key, tokens),
                               [&](float (&y)[8], int i, int column) {
#pragma unroll
                                   for (int d = 0; d < 8; ++d) y[d] *= scale;
                                   if (!terms.omega || tokens.valid[own + i] < 0) return;
                                   const float grad = tokens.chunk_grad[own + i];
                                   float omega[8], grad_mean[8], key[8];
                                   load_terms(omega, 1, own + i, column);
                                   load_terms(grad_mean, 2, own + i, column);
                                   unpack_row<S>(
                                       key, *reinterpret_cast<const uint4*>(keys.unit(own + i, column / 8)));
#pragma unroll
                                   for (int d = 0; d < 8; ++d)
                                       y[d] += grad * (omega[d] - key[d]) + grad_mean[d];
                               });

        int query_token[2], visible_landmarks[2];
        float lse[2], row_delta[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = own + group + 8 * r;
            query_token[r] = tokens.valid[row];
            lse[r] = tokens.logsumexp[row];
            row_delta[r] = tokens.delta[row];
            visible_landmarks[r] = g.is_causal ? query_token[r] / static_cast<int>(g.chunk_width) : INT_MAX;
        }
        float grad_query[kHeadDim / 8][4];
        const auto load_next = [&] {
            __syncthreads();
            if (!has_next) return;
            load_rows(queries, p.query);
            load_rows(keys, p.key);
            load_rows(grad_outputs, p.grad_output);
            copy_commit();
        };
        if (plan.landmark_blocks == 0) {
            begin_products<kHeadDim>();
            multiply_left_transposed(grad_query, grad_scores, own, keys, size);
            end_products<kHeadDim>(grad_query);
            load_next();
        }
        for (int block = 0; block < plan.landmark_blocks; ++block) {
            const int first = block * kBlock;
            if (plan.landmark_blocks > 1) {
                __syncthreads();
                load_landmarks(block);
                copy_commit();
                if (threadIdx.x < kBlock)
                    shared.landmark_bias[threadIdx.x] = global_bias(
                        p, w.key_box(window / w.columns, window % w.columns), batch, first + threadIdx.x);
                copy_wait<0>();
                publish_tiles();
                __syncthreads();
            }
            // Queries on M, landmarks on N.
            float score[kBlock / 8][4], grad_weight[kBlock / 8][4];
            begin_products<kHeadDim>();
            if (block == 0) multiply_left_transposed(grad_query, grad_scores, own, keys, size);
            multiply_transposed(score, queries, own, landmark_keys, landmarks - first);
            multiply_transposed(grad_weight, grad_outputs, own, landmark_values, landmarks - first);
            end_products<kHeadDim>(grad_query, score, grad_weight);
            if (block == plan.landmark_blocks - 1) load_next();
            uint32_t grad_score[kBlock / 16][4];
#pragma unroll
            for (int n = 0; n < kBlock / 8; ++n) {
                float ds[4] = {};
                if (first + 8 * n < landmarks) {
                    const int at = 8 * n + pair;
                    const float2 bias = *reinterpret_cast<const float2*>(&shared.landmark_bias[at]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float logit = score[n][e] * scale_log2 + (e % 2 ? bias.y : bias.x);
                        const int landmark = first + at + e % 2;
                        if (landmark >= visible_landmarks[e / 2]) logit = -kInfinity;
                        const float kept = dropout.factor(query_token[e / 2], w.num_tokens + landmark);
                        ds[e] =
                            exp2_approx(logit - lse[e / 2]) * (grad_weight[n][e] * kept - row_delta[e / 2]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    grad_score[n / 2][n % 2 * 2 + r] = pack<S>(ds[2 * r], ds[2 * r + 1]);
            }
            begin_products<kHeadDim>();
            multiply(grad_query, grad_score, landmark_keys, landmarks - first);
            end_products<kHeadDim>(grad_query);
        }
        store_gradient<Traits>(grad_query, shared.staging[warp], output(p.grad_query, tokens),
                               [&](float (&y)[8], int i, int column) {
#pragma unroll
                                   for (int d = 0; d < 8; ++d) y[d] *= scale;
                                   if (!terms.omega || tokens.valid[own + i] < 0) return;
                                   float grad_mean[8];
                                   load_terms(grad_mean, 3, own + i, column);
#pragma unroll
                                   for (int d = 0; d < 8; ++d) y[d] += grad_mean[d];
                               });
        if (has_next) store_numbers(next_tokens);
    }

    if (!p.grad_relative_bias) return;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            shared.bias_sum[own + group + e / 2 * 8][8 * n + pair + e % 2] = grad_bias[n][e];
    __syncthreads();
    const int bias_width = static_cast<int>(g.bias_width);
    const int entries = static_cast<int>(g.bias_height) * bias_width;
    float* const out = static_cast<float*>(p.grad_relative_bias) + (bh * plan.slices + slice) * entries;
    for (int i = threadIdx.x; i < entries; i += kThreads) {
        // The pairs of positions whose offset key - query is (y, x).
        const int height = w.queries.height, width = w.queries.width;
        const int y = i / bias_width - static_cast<int>(g.bias_height) / 2,
                  x = i % bias_width - bias_width / 2;
        float sum = 0;
        for (int query_y = max(0, -y); query_y < min(height, height - y); ++query_y)
            for (int query_x = max(0, -x); query_x < min(width, width - x); ++query_x) {
                const int query = query_y * width + query_x;
                sum += shared.bias_sum[query + y * width + x][query];
            }
        out[i] = sum;
    }
}

template <class Traits>
int64_t count_bias_pieces(const AttentionParams& p) {
    return count_slices(p.shape.batch * p.shape.heads, p.shape.geometry.num_windows(),
                        132 * Traits::kCtasPerSm);
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
        .landmark_blocks = static_cast<int>(detail::ceil_div(p.num_landmarks, Traits::kBlock)),
        .num_chunks = static_cast<int>(g.num_chunks()),
        .chunk_columns = static_cast<int>(g.chunk_columns()),
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
    };
    constexpr int kBytes = sizeof(typename Traits::Shared);
    cudaFuncSetAttribute(window_attention_bwd_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kBytes);
    window_attention_bwd_kernel<Traits>
        <<<static_cast<unsigned>(blocks), Traits::kThreads, kBytes, stream>>>(p, plan);
}

} // namespace eva_attn::cuda::mma
