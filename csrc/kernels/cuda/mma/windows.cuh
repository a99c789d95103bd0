// Windows as the tensor-core kernels see them: boxes of queries and keys, and the bias between two positions.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

struct Windows {
    BoxShape queries, keys; // of one window; keys: overlap included
    int num_windows, columns;
    int overlap_y, overlap_x;
    int grid_height, grid_width, num_prefix_tokens, num_tokens;
    // The bias of a pair of positions is entry place(key) - place(query) of a table in shared memory; keys
    // that nobody may see have the place `hidden`, from where every query finds -inf.
    bool has_table;
    int place_stride_y, place_stride_x, table_height, table_width, center, hidden, table_size;
    uint32_t table_width_reciprocal;

    static Windows of(const AttentionParams& p) {
        const Geometry& g = p.shape.geometry;
        const int64_t right = g.is_causal ? 0 : g.overlap_x;
        Windows w{
            .queries = BoxShape::of(g.window_height, g.window_width),
            .keys = BoxShape::of(g.window_height + 2 * g.overlap_y, g.window_width + g.overlap_x + right),
            .num_windows = static_cast<int>(g.num_windows()),
            .columns = static_cast<int>(g.window_columns()),
            .overlap_y = static_cast<int>(g.overlap_y),
            .overlap_x = static_cast<int>(g.overlap_x),
            .grid_height = static_cast<int>(g.grid_height),
            .grid_width = static_cast<int>(g.grid_width),
            .num_prefix_tokens = static_cast<int>(g.num_prefix_tokens),
            .num_tokens = static_cast<int>(g.num_tokens()),
            .has_table = p.relative_bias || g.is_causal,
            .place_stride_y = 0,
            .place_stride_x = 0,
            .table_height = 1,
            .table_width = 1,
            .center = 0,
            .hidden = 1,
            .table_size = 2,
            .table_width_reciprocal = 0,
        };
        if (w.has_table) {
            w.table_height = 2 * (w.queries.height + w.overlap_y) - 1;
            w.table_width = 2 * (w.queries.width + w.overlap_x) - 1;
            w.place_stride_y = w.table_width;
            w.place_stride_x = 1;
            w.center = w.table_height / 2 * w.table_width + w.table_width / 2;
            const int last_query = (w.queries.height - 1) * w.table_width + w.queries.width - 1;
            w.hidden = w.table_height * w.table_width + last_query;
            w.table_size = w.hidden + 1;
        }
        w.table_width_reciprocal = reciprocal(w.table_width);
        return w;
    }

    // Window number `row`, `column`.
    __device__ TokenBox query_box(int row, int column) const { return box(queries, row, column, 0, 0); }
    __device__ TokenBox key_box(int row, int column) const {
        return box(keys, row, column, overlap_y, overlap_x);
    }

    __device__ int query_place(int i) const {
        const int y = divide(i, queries.width_reciprocal);
        return y * place_stride_y + (i - y * queries.width) * place_stride_x;
    }
    __device__ int key_place(int i) const {
        const int y = divide(i, keys.width_reciprocal);
        return center + (y - overlap_y) * place_stride_y + (i - y * keys.width - overlap_x) * place_stride_x;
    }

  private:
    __device__ TokenBox box(const BoxShape& shape, int row, int column, int above, int left) const {
        return TokenBox{
            .shape = shape,
            .y0 = row * queries.height - above,
            .x0 = column * queries.width - left,
            .grid_height = grid_height,
            .grid_width = grid_width,
            .num_prefix_tokens = num_prefix_tokens,
        };
    }
};

// Fills the table of biases of a head, times `unit`; future keys of a causal window are hidden.
template <int kThreads>
__device__ inline void fill_bias_table(const AttentionParams& p, const Windows& w, int64_t head, float* table,
                                       float unit = kLog2e) {
    const Geometry& g = p.shape.geometry;
    const int entries = w.table_height * w.table_width;
    // Cut to the offsets that occur.
    const int64_t first = head * p.relative_bias_head_stride +
                          (g.bias_height - w.table_height) / 2 * g.bias_width +
                          (g.bias_width - w.table_width) / 2;
    const auto bias = [&](int64_t i) {
        switch (p.relative_bias_dtype) {
        case DType::kBFloat16:
            return __bfloat162float(static_cast<const __nv_bfloat16*>(p.relative_bias)[i]);
        case DType::kHalf:
            return __half2float(static_cast<const __half*>(p.relative_bias)[i]);
        default:
            return static_cast<const float*>(p.relative_bias)[i];
        }
    };
    for (int i = threadIdx.x; i < w.table_size; i += kThreads) {
        const int y = divide(i, w.table_width_reciprocal), x = i - y * w.table_width;
        const bool visible = i < entries && !(g.is_causal && x > w.table_width / 2);
        table[i] = !visible ? -kInfinity : p.relative_bias ? unit * bias(first + y * g.bias_width + x) : 0.0f;
    }
}

// The global columns, which every query outside of the prefix may see: landmarks, then prefix keys.
// What is added to the logits of one, in units of log 2; -inf: nobody in the window of `keys` sees it.
__device__ inline float global_bias(const AttentionParams& p, const TokenBox& keys, int64_t batch,
                                    int column) {
    const Geometry& g = p.shape.geometry;
    const int landmarks = static_cast<int>(p.num_landmarks);
    if (column >= landmarks) {
        const int token = column - landmarks;
        const bool hidden = token >= keys.num_prefix_tokens ||
                            (p.key_padding_mask && p.key_padding_mask[batch * g.num_tokens() + token]);
        return hidden ? -kInfinity : 0.0f;
    }
    if (p.extents) {
        const int4 box = reinterpret_cast<const int4*>(p.extents + batch * p.extents_batch_stride)[column];
        const bool empty = box.x >= box.y || box.z >= box.w;
        const bool inside = keys.y0 <= box.x && box.y <= keys.y0 + keys.shape.height && keys.x0 <= box.z &&
                            box.w <= keys.x0 + keys.shape.width;
        if (empty || (p.exclude_window_landmarks && inside)) return -kInfinity;
    }
    return p.landmark_bias ? kLog2e * static_cast<const float*>(p.landmark_bias)[batch * landmarks + column]
                           : 0.0f;
}

// What dropout counts for the global column: landmarks come behind all tokens.
template <bool kHasPrefix>
__device__ inline int global_entry(int column, int landmarks, int num_tokens) {
    return kHasPrefix && column >= landmarks ? column - landmarks : num_tokens + column;
}

// Begins to copy kRows global columns of a head from column `first` on: rows of `landmark_rows`
// [B H, landmarks, D], then of `token_rows`; zeros beyond them and at padding.
template <int kRows, int kThreads, bool kHasPrefix, class S, int kHeadDim>
__device__ inline void gather_globals(Tile<S, kHeadDim> tile, const AttentionParams& p,
                                      const void* landmark_rows, const Rows& token_rows, int batch, int head,
                                      int first) {
    const int landmarks = static_cast<int>(p.num_landmarks), head_dim = static_cast<int>(p.shape.head_dim);
    const S* const base =
        static_cast<const S*>(landmark_rows) + (batch * p.shape.heads + head) * landmarks * int64_t{head_dim};
    if constexpr (!kHasPrefix) {
        gather<kRows, kThreads>(tile, base, head_dim, head_dim,
                                [&](int row) { return first + row < landmarks ? first + row : -1; });
    } else {
        using Gather = GatherRows<kRows, kThreads, kHeadDim>;
        const Geometry& g = p.shape.geometry;
        const S* const tokens = head_rows<S>(token_rows, batch, head);
        const bool* const mask = p.key_padding_mask ? p.key_padding_mask + batch * g.num_tokens() : nullptr;
#pragma unroll
        for (int i = 0; i < Gather::kCount; ++i) {
            const int row = Gather::row(i), unit = Gather::unit(), token = first + row - landmarks;
            const bool is_landmark = token < 0;
            const bool valid =
                unit * 8 < head_dim && token < g.num_prefix_tokens && (is_landmark || !(mask && mask[token]));
            const S* const from = is_landmark ? base + int64_t{first + row} * head_dim
                                              : tokens + token * token_rows.token_stride;
            copy_async(tile.unit(row, unit), from + unit * 8, valid);
        }
    }
}

} // namespace eva_attn::cuda::mma
