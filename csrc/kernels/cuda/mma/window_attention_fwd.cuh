// Joint attention over [a window's keys | landmarks | prefix keys], forward.
#pragma once

#include <algorithm>

#include "kernels/cuda/mma/online_softmax.cuh"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {

constexpr int kAttentionThreads = kBlockM / 16 * kWarpSize;

template <class S, int kHeadDim>
struct AttentionFwdTraits {
    static constexpr int kCtasPerSm = kHeadDim <= 64 ? 4 : 3;
    // Up to kBlockN global columns stay in shared memory over all tiles of a CTA; else they come in blocks.
    static constexpr bool kMayKeepGlobals = kHeadDim <= 64;
    static constexpr int kTileElements = kBlockN * kHeadDim;
    static_assert(kBlockM == kBlockN);

    // One tile of each: the next keys are copied while the weights are computed and applied, the next values
    // while the next scores are. More CTAs a multiprocessor hide what this does not.
    struct Shared {
        alignas(128) S query[kTileElements];
        alignas(128) S key[kTileElements];
        alignas(128) S value[kTileElements]; // then the output
        alignas(128) S global_key[kMayKeepGlobals ? kTileElements : 8];
        alignas(128) S global_value[kMayKeepGlobals ? kTileElements : 8];
        union {
            int key_place[kBlockN];
            float bias[kBlockN];
        } column[2];
        int entry[2][kBlockN];       // of keys in dropout's counter
        int whole_place[kBlockN];    // of the keys of a window that lies in the grid as a whole
        float kept_bias[2][kBlockN]; // of global columns that stay
        float logsumexp[kBlockM];
        // Of the CTA's (batch, head); here, as registers are short.
        const S *query_rows, *key_rows, *value_rows;
        S* output_rows;
        float* logsumexp_rows;
        float bias_table[1];
    };
};

struct AttentionFwdPlan {
    Windows windows;
    int tiles_per_window, num_tiles, slices; // a CTA takes one slice of the tiles of one (batch, head)
    int num_globals, global_blocks;
    bool keeps_globals, biased_globals;
    bool fixed_rows; // a window is one tile, and its queries are its keys
};

// Q K^T for a warp's 16 queries and `columns` keys of a block.
template <class S, int kHeadDim>
__device__ inline void query_key_scores(float (&score)[kBlockN / 8][4], Tile<S, kHeadDim> query, int row,
                                        Tile<S, kHeadDim> key, int columns) {
    const bool needs_last = columns > kBlockN - 8;
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d += 4) {
        uint32_t a0[4], a1[4];
        query.load_a(a0, row, d);
        query.load_a(a1, row, d + 2);
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) {
            if (n == kBlockN / 8 - 1 && !needs_last) continue;
            uint32_t b[4];
            key.load_b_transposed(b, 8 * n, d);
            multiply_add<S>(score[n], a0, b[0], b[1]);
            multiply_add<S>(score[n], a1, b[2], b[3]);
        }
    }
}

// Adds the weighted values of a block.
template <class S, int kHeadDim>
__device__ inline void add_values(OnlineSoftmax<kHeadDim>& softmax, const float (&weight)[kBlockN / 8][4],
                                  Tile<S, kHeadDim> value) {
#pragma unroll
    for (int j = 0; j < kBlockN / 16; ++j) {
        uint32_t a[4];
        softmax.template pack_weights<S>(a, weight, j);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; d += 2) {
            uint32_t b[4];
            value.load_b(b, 16 * j, d);
            multiply_add<S>(softmax.output[d], a, b[0], b[1]);
            multiply_add<S>(softmax.output[d + 1], a, b[2], b[3]);
        }
    }
}

// Whether dropout takes two entries of a query: bits 0 and 1. Not inlined: that would be 64 times.
static __device__ __noinline__ uint32_t dropped_pair(uint64_t seed, uint64_t threshold, int first, int second,
                                                     int query, uint32_t batch_head) {
    PhiloxWords words = philox4x32_10(seed, first / 4, query, batch_head, 0);
    const uint32_t bits = words.of(first) < threshold;
    if (second / 4 != first / 4) words = philox4x32_10(seed, second / 4, query, batch_head, 0);
    return bits | static_cast<uint32_t>(words.of(second) < threshold) << 1;
}

// kGeneral: causality, dropout, padding, a prefix, and biases of landmarks.
template <class S, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads, AttentionFwdTraits<S, kHeadDim>::kCtasPerSm)
    window_attention_fwd_kernel(const __grid_constant__ AttentionParams p,
                                const __grid_constant__ AttentionFwdPlan plan) {
    using Traits = AttentionFwdTraits<S, kHeadDim>;
    using TileS = Tile<S, kHeadDim>;
    using Rows = GatherRows<kBlockN, kAttentionThreads, kHeadDim>;
    extern __shared__ __align__(128) char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(shared_bytes);
    wait_for_dependencies();

    const Windows& w = plan.windows;
    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int head = blockIdx.x % heads, item = blockIdx.x / heads;
    const int batch = item / plan.slices, slice = item % plan.slices;
    const int64_t batch_head = static_cast<int64_t>(batch) * heads + head;
    const int first_tile = static_cast<int>(static_cast<int64_t>(slice) * plan.num_tiles / plan.slices);
    const int last_tile = static_cast<int>(static_cast<int64_t>(slice + 1) * plan.num_tiles / plan.slices);
    const int landmarks = static_cast<int>(p.num_landmarks), chunk = static_cast<int>(g.chunk_width);
    const int prefix = kGeneral ? w.num_prefix_tokens : 0;
    const bool is_causal = kGeneral && g.is_causal;
    const bool has_dropout = kGeneral && p.dropout.threshold > 0;
    const bool* mask = kGeneral && p.key_padding_mask
                           ? p.key_padding_mask + static_cast<int64_t>(batch) * w.num_tokens
                           : nullptr;
    const float scale = static_cast<float>(p.scale) * kLog2e;
    if (threadIdx.x == 0) {
        shared.query_rows = head_rows<S>(p.query, batch, head);
        shared.key_rows = head_rows<S>(p.key, batch, head);
        shared.value_rows = head_rows<S>(p.value, batch, head);
        shared.output_rows = const_cast<S*>(head_rows<S>(p.output, batch, head));
        shared.logsumexp_rows = static_cast<float*>(p.logsumexp) + batch_head * w.num_tokens;
    }
    __syncthreads();

    const int lane = threadIdx.x % kWarpSize;
    const int warp_row = threadIdx.x / kWarpSize * 16;
    const int group = lane / 4, pair = lane % 4 * 2;
    const bool copies = Rows::unit() * 8 < head_dim; // else zeros

    // A tile: queries `first` onward of window (row, column).
    struct Cursor {
        int row, column, first;
    };
    const auto next_tile = [&](Cursor at) {
        at.first += kBlockM;
        if (at.first < w.queries.size()) return at;
        at.first = 0;
        if (++at.column == w.columns) {
            at.column = 0;
            ++at.row;
        }
        return at;
    };
    const auto window_blocks = [&](Cursor at) {
        const int keys = is_causal ? min(w.keys.size(), at.first + kBlockM + w.overlap_x) : w.keys.size();
        return (keys + kBlockN - 1) / kBlockN;
    };
    const auto streamed_global_blocks = [&](Cursor at) {
        if (plan.keeps_globals) return 0;
        if (!is_causal) return plan.global_blocks;
        const int last_query = at.column * w.queries.width + at.first + kBlockM - 1;
        return (min(landmarks, last_query / chunk) + kBlockN - 1) / kBlockN;
    };

    // Tokens of the rows of a box that this thread copies. A whole window has them at fixed offsets.
    int offset[Rows::kCount];
#pragma unroll
    for (int i = 0; i < Rows::kCount; ++i) {
        const int row = Rows::row(i), y = divide(row, w.queries.width_reciprocal);
        const bool inside = copies && row < w.queries.size();
        offset[i] = inside ? y * w.grid_width + row - y * w.queries.width : INT_MIN;
    }
    const auto find_tokens = [&](int (&token)[Rows::kCount], const TokenBox& box, int first) {
        if (plan.fixed_rows && box.is_whole()) {
#pragma unroll
            for (int i = 0; i < Rows::kCount; ++i) token[i] = box.first_token() + offset[i];
        } else if (box.shape.height == 1) {
            const int last = min(box.shape.width, w.grid_width - box.x0);
#pragma unroll
            for (int i = 0; i < Rows::kCount; ++i) {
                const int x = first + Rows::row(i);
                token[i] = copies && x < last && box.x0 + x >= 0 ? box.first_token() + x : -1;
            }
        } else {
#pragma unroll
            for (int i = 0; i < Rows::kCount; ++i) token[i] = copies ? box.token(first + Rows::row(i)) : -1;
        }
    };
    const auto drop_padding = [&](int (&token)[Rows::kCount]) {
        if (!mask) return;
#pragma unroll
        for (int i = 0; i < Rows::kCount; ++i)
            if (token[i] >= 0 && mask[token[i]]) token[i] = -1;
    };
    const auto has_whole_places = [&](const TokenBox& keys) {
        return plan.fixed_rows && !mask && keys.is_whole();
    };
    // A block of global columns, from column `first` onward.
    const auto gather_globals = [&](TileS tile, int first, const void* landmark_rows, const S* token_rows,
                                    int64_t token_stride) {
        const S* landmark = static_cast<const S*>(landmark_rows) + batch_head * landmarks * head_dim;
        if (prefix == 0 || first + kBlockN <= landmarks) {
            int index[Rows::kCount];
#pragma unroll
            for (int i = 0; i < Rows::kCount; ++i) {
                const int column = first + Rows::row(i);
                index[i] = copies && column < landmarks ? column : -1;
            }
            gather_rows<Rows>(tile, landmark, head_dim, index);
        } else if constexpr (kGeneral) {
#pragma unroll 1
            for (int i = 0; i < Rows::kCount; ++i) {
                const int row = Rows::row(i), token = first + row - landmarks;
                const bool is_landmark = token < 0;
                const bool valid = copies && token < prefix && (is_landmark || !mask || !mask[token]);
                const int64_t from = valid ? (is_landmark ? first + row : token) : 0;
                const S* row_data =
                    is_landmark ? landmark + from * head_dim : token_rows + from * token_stride;
                copy_async(tile.unit(row, Rows::unit()), row_data + Rows::unit() * 8, valid);
            }
        }
    };
    // Begin the copies of a block of columns; with the keys of a tile's first come its queries.
    const auto load_keys = [&](Cursor at, int block, int stage, int parity, bool refreshes_kept_bias) {
        const TokenBox keys = w.key_box(at.row, at.column);
        int token[Rows::kCount];
        if (block == 0) {
            find_tokens(token, w.query_box(at.row, at.column), at.first);
            drop_padding(token);
            gather_rows<Rows>(TileS{shared.query}, shared.query_rows, p.query.token_stride, token);
        }
        const int global_first = (block - window_blocks(at)) * kBlockN; // negative: a block of the window
        if (global_first < 0) {
            const int first = block * kBlockN;
            if (!plan.fixed_rows) {
                find_tokens(token, keys, first);
                drop_padding(token);
            }
            gather_rows<Rows>(TileS{shared.key}, shared.key_rows, p.key.token_stride, token);
            if (Rows::unit() == 0 && (has_dropout || !has_whole_places(keys))) {
#pragma unroll
                for (int i = 0; i < Rows::kCount; ++i) {
                    const int row = Rows::row(i);
                    shared.column[stage].key_place[row] = token[i] < 0 ? w.hidden : w.key_place(first + row);
                    if (has_dropout) shared.entry[stage][row] = token[i];
                }
            }
        } else {
            gather_globals(TileS{shared.key}, global_first, p.landmark_key, shared.key_rows,
                           p.key.token_stride);
        }
        if (threadIdx.x < kBlockN &&
            (plan.keeps_globals ? block == 0 && refreshes_kept_bias : global_first >= 0)) {
            float* bias = plan.keeps_globals ? shared.kept_bias[parity] : shared.column[stage].bias;
            const int column = max(global_first, 0) + threadIdx.x;
            if constexpr (kGeneral) {
                bias[threadIdx.x] = global_bias(p, keys, batch, column);
            } else {
                bias[threadIdx.x] = column < landmarks ? 0.0f : -kInfinity;
            }
        }
        copy_commit();
    };
    const auto load_values = [&](Cursor at, int block) {
        const int global_first = (block - window_blocks(at)) * kBlockN;
        if (global_first < 0) {
            int token[Rows::kCount];
            find_tokens(token, w.key_box(at.row, at.column), block * kBlockN);
            drop_padding(token);
            gather_rows<Rows>(TileS{shared.value}, shared.value_rows, p.value.token_stride, token);
        } else {
            gather_globals(TileS{shared.value}, global_first, p.landmark_value, shared.value_rows,
                           p.value.token_stride);
        }
        copy_commit();
    };

    if (first_tile == last_tile) return;
    const int first_window = first_tile / plan.tiles_per_window;
    Cursor at{first_window / w.columns, first_window % w.columns,
              first_tile % plan.tiles_per_window * kBlockM};
    if (plan.keeps_globals) {
        gather_globals(TileS{shared.global_key}, 0, p.landmark_key, shared.key_rows, p.key.token_stride);
        gather_globals(TileS{shared.global_value}, 0, p.landmark_value, shared.value_rows,
                       p.value.token_stride);
    }
    load_keys(at, 0, 0, 0, true);
    load_values(at, 0);
    fill_bias_table<kAttentionThreads>(p, w, head, shared.bias_table);
    if (threadIdx.x < kBlockN)
        shared.whole_place[threadIdx.x] = threadIdx.x < w.keys.size() ? w.key_place(threadIdx.x) : w.hidden;
    copy_wait<1>();
    __syncthreads();

    const TileS query_tile{shared.query}, output_tile{shared.value};
    int stage = 0, parity = 0;
    const float* bias[2]; // from where the places of keys count, for each of the lane's rows
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const TokenBox queries = w.query_box(at.row, at.column), keys = w.key_box(at.row, at.column);
        const int first_row = at.first + warp_row + group;
        if (tile == first_tile || plan.tiles_per_window > 1) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
                bias[r] = shared.bias_table - w.query_place(min(first_row + 8 * r, w.queries.size() - 1));
        }
        int token[2], visible_landmarks[2], always_visible = landmarks;
        if constexpr (kGeneral) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                token[r] = queries.token(first_row + 8 * r);
                if (is_causal) visible_landmarks[r] = token[r] / chunk;
            }
            if (is_causal) always_visible = min(landmarks, (at.column * w.queries.width + at.first) / chunk);
        }

        OnlineSoftmax<kHeadDim> softmax;
        const int in_window = window_blocks(at), streamed = in_window + streamed_global_blocks(at);
        const int first_block =
            plan.keeps_globals ? -1 : 0; // the global columns that stay need no keys to arrive
        for (int block = first_block; block < streamed; ++block) {
            const bool is_kept = block < 0;
            const bool is_window = !is_kept && block < in_window;
            const int global_first = is_kept ? 0 : (block - in_window) * kBlockN;
            const int columns = is_window ? w.keys.size() - block * kBlockN : plan.num_globals - global_first;
            copy_wait<1>();
            if (is_kept) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            float score[kBlockN / 8][4];
            query_key_scores(score, query_tile, warp_row, TileS{is_kept ? shared.global_key : shared.key},
                             columns);
            if (!is_kept) {
                copy_wait<0>();
                __syncthreads();
                const bool same_tile = block + 1 < streamed;
                if (same_tile || tile + 1 < last_tile)
                    load_keys(same_tile ? at : next_tile(at), same_tile ? block + 1 : 0, stage ^ 1,
                              parity ^ 1, tile == first_tile || (kGeneral && p.exclude_window_landmarks));
            }

            bool is_biased; // else the logits are the scores times the scale
            if (is_window) {
                const bool all_past =
                    is_causal && !p.relative_bias && (block + 1) * kBlockN <= at.first + w.overlap_x + 1;
                is_biased = mask || columns < kBlockN || !keys.is_whole() || (w.has_table && !all_past);
            } else {
                is_biased = (kGeneral && plan.biased_globals) || global_first + kBlockN > always_visible;
            }
            if (is_biased && is_window) {
                const int* key_place =
                    has_whole_places(keys) ? shared.whole_place : shared.column[stage].key_place;
#pragma unroll
                for (int n = 0; n < kBlockN / 8; ++n) {
                    const int2 place = *reinterpret_cast<const int2*>(&key_place[8 * n + pair]);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        score[n][2 * r] = score[n][2 * r] * scale + bias[r][place.x];
                        score[n][2 * r + 1] = score[n][2 * r + 1] * scale + bias[r][place.y];
                    }
                }
            } else if (is_biased) {
                const float* column_bias = is_kept ? shared.kept_bias[parity] : shared.column[stage].bias;
#pragma unroll
                for (int n = 0; n < kBlockN / 8; ++n) {
                    const float2 added = *reinterpret_cast<const float2*>(&column_bias[8 * n + pair]);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        score[n][2 * r] = score[n][2 * r] * scale + added.x;
                        score[n][2 * r + 1] = score[n][2 * r + 1] * scale + added.y;
                    }
                }
                if (is_causal) {
#pragma unroll
                    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (global_first + 8 * n + pair + i % 2 >= visible_landmarks[i / 2])
                                score[n][i] = -kInfinity;
                }
            }
            softmax.update(score, is_biased ? 1.0f : scale, block == first_block);
            if (has_dropout) {
                const auto seed = static_cast<uint64_t>(*p.dropout_seed);
#pragma unroll
                for (int n = 0; n < kBlockN / 8; ++n) {
                    const int column = 8 * n + pair;
                    int entry[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int global = global_first + column + i;
                        entry[i] = is_window            ? shared.entry[stage][column + i]
                                   : global < landmarks ? w.num_tokens + global
                                                        : global - landmarks;
                    }
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t dropped = dropped_pair(seed, p.dropout.threshold, entry[0], entry[1],
                                                              token[r], static_cast<uint32_t>(batch_head));
                        if (dropped & 1) score[n][2 * r] = 0.0f;
                        if (dropped & 2) score[n][2 * r + 1] = 0.0f;
                    }
                }
            }
            add_values(softmax, score, TileS{is_kept ? shared.global_value : shared.value});
            if (is_kept) continue;
            __syncthreads();
            if (block + 1 < streamed) load_values(at, block + 1);
            stage ^= 1;
        }

        // Through the warp's own rows of the value tile to stores of 16 bytes.
        const float kept_scale = has_dropout ? static_cast<float>(p.dropout.scale) : 1.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_row + group + 8 * r; // eight rows further down, units lie alike
            const float logsumexp = softmax.template store_row<S>(r, kept_scale, [&](int unit) {
                return output_tile.unit(warp_row + group, unit) + 8 * r * kHeadDim;
            });
            if (pair == 0) shared.logsumexp[row] = logsumexp;
        }
        __syncwarp();
        int to[Rows::kCount];
        find_tokens(to, queries, at.first);
        auto* output = reinterpret_cast<char*>(shared.output_rows + Rows::unit() * 8);
        const int output_stride = static_cast<int>(p.output.token_stride) * static_cast<int>(sizeof(S));
#pragma unroll
        for (int i = 0; i < Rows::kCount; ++i) {
            if (to[i] < 0) continue;
            const int row = Rows::row(i);
            uint4 out = *reinterpret_cast<const uint4*>(output_tile.unit(row, Rows::unit()));
            if (mask && mask[to[i]]) out = uint4{0, 0, 0, 0};
            *reinterpret_cast<uint4*>(output + static_cast<int64_t>(to[i]) * output_stride) = out;
        }
        if (lane < 16) {
            const int to = queries.token(at.first + warp_row + lane);
            const bool is_padding = to >= 0 && mask && mask[to];
            if (to >= 0)
                shared.logsumexp_rows[to] = is_padding ? kInfinity : shared.logsumexp[warp_row + lane];
        }
        at = next_tile(at);
        parity ^= 1;
        __syncwarp();
        if (tile + 1 < last_tile) load_values(at, 0);
    }
}

// Slices of the tiles of each (batch, head) that fill the machine most evenly.
inline int count_slices(int64_t batch_heads, int num_tiles, int slots) {
    int best = 1;
    int64_t best_time = INT64_MAX;
    for (int slices = 1; slices <= std::min(num_tiles, kMaxSlices); ++slices) {
        // A CTA's start costs about as much as a tile.
        const int64_t time =
            detail::ceil_div(batch_heads * slices, slots) * (detail::ceil_div(num_tiles, slices) + 1);
        if (time < best_time) {
            best_time = time;
            best = slices;
        }
    }
    return best;
}

template <class S, int kHeadDim, bool kGeneral>
void launch_window_attention_fwd(const AttentionParams& p, cudaStream_t stream) {
    using Traits = AttentionFwdTraits<S, kHeadDim>;
    const Windows w = Windows::of(p);
    const auto tiles_per_window = static_cast<int>(detail::ceil_div(w.queries.size(), kBlockM));
    const int num_tiles = w.num_windows * tiles_per_window;
    const int num_globals = static_cast<int>(p.num_landmarks) + w.num_prefix_tokens;
    const auto global_blocks = static_cast<int>(detail::ceil_div(num_globals, kBlockN));
    const int64_t batch_heads = p.shape.batch * p.shape.heads;
    if (batch_heads == 0 || num_tiles == 0) return;
    const AttentionFwdPlan plan{
        .windows = w,
        .tiles_per_window = tiles_per_window,
        .num_tiles = num_tiles,
        .slices = count_slices(batch_heads, num_tiles, multiprocessors() * Traits::kCtasPerSm),
        .num_globals = num_globals,
        .global_blocks = global_blocks,
        .keeps_globals = Traits::kMayKeepGlobals && global_blocks == 1,
        .biased_globals = p.landmark_bias || p.extents,
        .fixed_rows = tiles_per_window == 1 && w.overlap_y == 0 && w.overlap_x == 0,
    };

    const auto kernel = window_attention_fwd_kernel<S, kHeadDim, kGeneral>;
    const size_t bytes = sizeof(typename Traits::Shared) + sizeof(float) * w.table_size;
    static LimitsOf limits_of;
    limits_of(kernel);
    launch_dependent(kernel, batch_heads * plan.slices, kAttentionThreads, bytes, stream, p, plan);
}

} // namespace eva_attn::cuda::mma
