// Joint attention over [landmarks | prefix keys | window keys], forward and backward. A warp takes kRows rows
// of the logits, and columns 32 at a time, one a lane; the four warps of a block share the columns. A block
// accumulates one slice of the channels of its result.
#pragma once

#include "kernels/cuda/simt/chunk_summary.cuh"
#include "kernels/cuda/simt/kernels.h"
#include "kernels/cuda/simt/warp.cuh"

namespace eva_attn::cuda::simt {

constexpr int kColumns = kLanes;

// As many numbers as one shared memory access moves: the rows of a warp.
template <class T>
constexpr int kRows = 16 / sizeof(T);
template <class T>
constexpr int kTileRows = kWarps * kRows<T>; // of a block
template <class T>
struct alignas(16) RowVector {
    T x[kRows<T>];
};

// Products that are summed by themselves, which keeps rounding errors down.
constexpr int kBlock = 8;
constexpr int64_t whole_blocks(int64_t head_dim) { return detail::ceil_div(head_dim, kBlock) * kBlock; }

template <class S, class T = Accumulator<S>>
struct AttentionShared {
    Row<const S> first[kColumns], second[kColumns]; // keys and values, or queries and output gradients
    T slice[kColumns][kSlice<T> + 1];               // odd row stride: free of bank conflicts
    RowVector<T> weights[2][kWarps][kColumns];
};

// A row or column of the logits; `index` is of the landmark or of the token.
struct Entry {
    enum Kind { kNone, kLandmark, kPrefix, kGrid } kind = kNone;
    int index = 0;
    int y = 0, x = 0;   // on the grid
    uint32_t place = 0; // y * bias_width + x, modulo 2^32
};

// Landmarks, then prefix tokens, then the tokens of a box.
struct Entries {
    int landmarks = 0, prefix = 0;
    Box box{};

    __device__ int size() const {
        return landmarks + prefix + static_cast<int>(box.height()) * static_cast<int>(box.width());
    }
    __device__ Entry at(int i, const Geometry& g) const {
        if (i >= size()) return {};
        if (i < landmarks) return {.kind = Entry::kLandmark, .index = i};
        i -= landmarks;
        if (i < prefix) return {.kind = Entry::kPrefix, .index = i};
        i -= prefix;
        const int width = static_cast<int>(box.width());
        const int y = static_cast<int>(box.y0) + i / width, x = static_cast<int>(box.x0) + i % width;
        return {.kind = Entry::kGrid,
                .index = static_cast<int>(g.token(y, x)),
                .y = y,
                .x = x,
                .place = static_cast<uint32_t>(y * g.bias_width + x)};
    }
};

__device__ inline Entries all_tokens(const Geometry& g) {
    return {.prefix = static_cast<int>(g.num_prefix_tokens), .box = {0, g.grid_height, 0, g.grid_width}};
}

// What all logits of one (batch, head) have in common.
template <class S, class T = Accumulator<S>>
struct Head {
    const AttentionParams& p;
    int64_t bh, batch, head;

    __device__ Head(const AttentionParams& p, int64_t bh)
        : p(p), bh(bh), batch(bh / p.shape.heads), head(bh % p.shape.heads) {}

    // Nothing in place of padding.
    __device__ Entry valid(const Entry& entry) const {
        const bool padding = (entry.kind == Entry::kPrefix || entry.kind == Entry::kGrid) &&
                             is_padding(p.key_padding_mask, p.shape.geometry, batch, entry.index);
        return padding ? Entry{} : entry;
    }

    __device__ Row<const S> source(const Rows& rows, const Entry& token) const {
        if (token.kind == Entry::kNone) return {};
        return row_of<const S>(rows, batch, head, token.index);
    }
    __device__ Row<const S> key_source(const Rows& rows, const void* landmarks, const Entry& key) const {
        if (key.kind != Entry::kLandmark) return source(rows, key);
        return {static_cast<const S*>(landmarks) + (bh * p.num_landmarks + key.index) * p.shape.head_dim, 1};
    }

    // Keys of the window of a query, where they matter beside its being in the same window.
    __device__ Box visible(const Entry& query) const {
        const Geometry& g = p.shape.geometry;
        if (query.kind != Entry::kGrid || !(g.windows_overlap() || p.exclude_window_landmarks)) return {};
        return g.key_box(query.y / static_cast<int>(g.window_height) * g.window_columns() +
                         query.x / static_cast<int>(g.window_width));
    }

    // Place of a window key in the bias table.
    __device__ uint32_t bias_index(const Entry& query, const Entry& key) const {
        const Geometry& g = p.shape.geometry;
        return key.place - query.place +
               static_cast<uint32_t>(g.bias_height / 2 * g.bias_width + g.bias_width / 2);
    }

    // What is added to scale * q.k; -inf where the query does not see the key.
    __device__ T logit_bias(const Entry& query, const Box& visible, const Entry& key) const {
        const Geometry& g = p.shape.geometry;
        const T hidden = -infinity<T>();
        if (query.kind == Entry::kNone || key.kind == Entry::kNone) return hidden;
        if (key.kind == Entry::kPrefix) return 0;
        if (query.kind == Entry::kPrefix) return key.kind == Entry::kLandmark ? hidden : T(0);
        if (key.kind == Entry::kGrid) {
            if (g.windows_overlap() && !visible.contains(key.y, key.x)) return hidden;
            if (g.is_causal && key.x > query.x) return hidden;
            return p.relative_bias ? weight_at<S>(p.relative_bias_dtype, p.relative_bias,
                                                  head * p.relative_bias_head_stride + bias_index(query, key))
                                   : T(0);
        }
        if (g.is_causal && key.index >= query.x / static_cast<int>(g.chunk_width)) return hidden;
        if (p.extents) {
            const int32_t* const e = p.extents + batch * p.extents_batch_stride + key.index * 4;
            const Box members{e[0], e[1], e[2], e[3]};
            if (members.empty() || (p.exclude_window_landmarks && visible.contains(members))) return hidden;
        }
        T total = 0;
        if (p.landmark_bias)
            total += static_cast<const T*>(p.landmark_bias)[batch * p.num_landmarks + key.index];
        if (p.landmark_entropy)
            total += static_cast<const T*>(p.landmark_entropy)[bh * p.num_landmarks + key.index];
        return total;
    }

    // The factor of dropout.
    __device__ T kept(const Entry& query, const Entry& key) const {
        if (!p.dropout.threshold) return 1;
        const auto entry = static_cast<uint32_t>(
            key.index + (key.kind == Entry::kLandmark ? p.shape.geometry.num_tokens() : 0));
        const PhiloxWords words =
            philox4x32_10(static_cast<uint64_t>(*p.dropout_seed), entry / 4,
                          static_cast<uint32_t>(query.index), static_cast<uint32_t>(bh), 0);
        return words.word[entry % 4] >= p.dropout.threshold ? static_cast<T>(p.dropout.scale) : T(0);
    }

    __device__ const T* per_token(const void* numbers) const {
        return static_cast<const T*>(numbers) + bh * p.shape.geometry.num_tokens();
    }
};

// Vectors of a warp's rows in dynamic shared memory, [D], and zeros up to a whole block.
template <class T>
__device__ RowVector<T>* warp_rows(int operand, int head_dim) {
    extern __shared__ char dynamic_shared[];
    return reinterpret_cast<RowVector<T>*>(dynamic_shared) +
           (operand * kWarps + warp()) * whole_blocks(head_dim);
}

template <class T>
struct WarpRow {
    const RowVector<T>* rows;
    int r;
    __device__ T operator[](int d) const { return rows[d].x[r]; }
};

template <class S, class T = Accumulator<S>>
__device__ void load_rows(RowVector<T>* rows, const Row<const S> (&sources)[kRows<T>], int head_dim) {
    __syncwarp();
    for (int d = lane(); d < whole_blocks(head_dim); d += kLanes) {
        RowVector<T> vector;
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r)
            vector.x[r] = sources[r].data && d < head_dim ? sources[r][d] : T(0);
        rows[d] = vector;
    }
    __syncwarp();
}

template <class S, class T = Accumulator<S>>
__device__ void load_slice(AttentionShared<S>& s, const Row<const S>* columns, int first, int head_dim) {
    __syncthreads();
    for (int j = warp(); j < kColumns; j += kWarps) {
        const Row<const S> source = columns[j];
#pragma unroll
        for (int k = lane(); k < kSlice<T>; k += kLanes) {
            const int d = first + k;
            s.slice[j][k] = source.data && d < head_dim ? source[d] : T(0);
        }
    }
    __syncthreads();
}

// dots[r] = row r . this lane's column.
template <class S, class T = Accumulator<S>>
__device__ void dot_products(AttentionShared<S>& s, const Row<const S>* columns, const RowVector<T>* rows,
                             int head_dim, T (&dots)[kRows<T>]) {
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) dots[r] = 0;
    for (int first = 0; first < head_dim; first += kSlice<T>) {
        load_slice(s, columns, first, head_dim);
        const int count = min(kSlice<T>, head_dim - first);
        for (int block = 0; block < count; block += kBlock) {
            T block_dots[kRows<T>] = {};
#pragma unroll
            for (int k = block; k < block + kBlock; ++k) {
                const T x = s.slice[lane()][k];
                const RowVector<T> row = rows[first + k];
#pragma unroll
                for (int r = 0; r < kRows<T>; ++r) block_dots[r] += row.x[r] * x;
            }
#pragma unroll
            for (int r = 0; r < kRows<T>; ++r) dots[r] += block_dots[r];
        }
    }
}

// sums[r] += weights[j][r] * column j, over all j, in the slice of channels from `first` on.
template <class S, class T = Accumulator<S>>
__device__ void add_weighted(AttentionShared<S>& s, const Row<const S>* columns, const RowVector<T>* weights,
                             int first, int head_dim, SliceRow<T> (&sums)[kRows<T>]) {
    load_slice(s, columns, first, head_dim);
    for (int block = 0; block < kColumns; block += kBlock) {
        SliceRow<T> block_sums[kRows<T>];
#pragma unroll
        for (int j = block; j < block + kBlock; ++j) {
            const RowVector<T> weight = weights[j];
#pragma unroll
            for (int i = 0; i < kPerLane<T>; ++i) {
                const T x = s.slice[j][i * kLanes + lane()];
#pragma unroll
                for (int r = 0; r < kRows<T>; ++r) block_sums[r].x[i] += weight.x[r] * x;
            }
        }
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r)
#pragma unroll
            for (int i = 0; i < kPerLane<T>; ++i) sums[r].x[i] += block_sums[r].x[i];
    }
}

// A slice's row in shared memory, where loops find it that are not unrolled: each lane its own channels.
template <class S, class T = Accumulator<S>>
__device__ void put_row(AttentionShared<S>& s, int row, const SliceRow<T>& sums) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) s.slice[row][i * kLanes + lane()] = sums.x[i];
}
template <class S, class T = Accumulator<S>>
__device__ SliceRow<T> take_row(const AttentionShared<S>& s, int row) {
    SliceRow<T> sums;
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) sums.x[i] = s.slice[row][i * kLanes + lane()];
    return sums;
}

// The slice of channels of a block.
template <class T>
__device__ int first_channel() {
    return static_cast<int>(blockIdx.y) * kSlice<T>;
}

// Tiles of query rows of one (batch, head): those of each window, then those of the prefix.
struct QueryTiles {
    int64_t per_window, of_windows, count;

    constexpr QueryTiles(const Geometry& g, int rows)
        : per_window(detail::ceil_div(g.window_height * g.window_width, rows)),
          of_windows(g.num_windows() * per_window),
          count(of_windows + detail::ceil_div(g.num_prefix_tokens, rows)) {}
};

template <class T>
struct QueryTile {
    Entries queries, keys;
    int first; // row

    __device__ Entry row(int r, const Geometry& g) const {
        return queries.at(first + warp() * kRows<T> + r, g);
    }

    __device__ QueryTile(const AttentionParams& p, const QueryTiles& tiles, int64_t index) {
        const Geometry& g = p.shape.geometry;
        const int prefix = static_cast<int>(g.num_prefix_tokens);
        if (index < tiles.of_windows) {
            const int64_t window = index / tiles.per_window;
            queries = {.box = g.window_box(window)};
            keys = {
                .landmarks = static_cast<int>(p.num_landmarks), .prefix = prefix, .box = g.key_box(window)};
            first = static_cast<int>(index % tiles.per_window) * kTileRows<T>;
        } else {
            queries = {.prefix = prefix};
            keys = all_tokens(g);
            first = static_cast<int>(index - tiles.of_windows) * kTileRows<T>;
        }
    }
};

template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) window_attention_fwd_kernel(const AttentionParams p) {
    __shared__ AttentionShared<S> s;
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const QueryTiles tiles(g, kTileRows<T>);
    const Head<S> head(p, blockIdx.x / tiles.count);
    const QueryTile<T> tile(p, tiles, blockIdx.x % tiles.count);
    if (tile.first >= tile.queries.size()) return;

    Entry query[kRows<T>];
    Row<const S> sources[kRows<T>];
    T maximum[kRows<T>], total[kRows<T>];
    SliceRow<T> sums[kRows<T>];
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
        query[r] = head.valid(tile.row(r, g));
        sources[r] = head.source(p.query, query[r]);
        maximum[r] = -infinity<T>();
        total[r] = 0;
    }
    RowVector<T>* const rows = warp_rows<T>(0, head_dim);
    load_rows<S>(rows, sources, head_dim);
    const Box visible = tile.keys.box;

    const int num_keys = tile.keys.size();
    for (int base = 0; base < num_keys; base += kColumns) {
        const Entry key = head.valid(tile.keys.at(base + lane(), g));
        if (warp() == 0) {
            s.first[lane()] = head.key_source(p.key, p.landmark_key, key);
            s.second[lane()] = head.key_source(p.value, p.landmark_value, key);
        }
        T score[kRows<T>];
        dot_products<S>(s, s.first, rows, head_dim, score);
        RowVector<T> weights;
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r) {
            const T logit = static_cast<T>(p.scale) * score[r] + head.logit_bias(query[r], visible, key);
            const T top = max(maximum[r], warp_max(logit));
            weights.x[r] = 0;
            if (top == -infinity<T>()) continue;
            const T correction = exp(maximum[r] - top), weight = exp(logit - top);
            maximum[r] = top;
            total[r] = total[r] * correction + weight;
            weights.x[r] = weight * head.kept(query[r], key);
#pragma unroll
            for (int i = 0; i < kPerLane<T>; ++i) sums[r].x[i] *= correction;
        }
        s.weights[0][warp()][lane()] = weights;
        add_weighted<S>(s, s.second, s.weights[0][warp()], first_channel<T>(), head_dim, sums);
    }

#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
        const Entry row = tile.row(r, g);
        if (row.kind == Entry::kNone) continue;
        const T sum = warp_sum(total[r]);
        const auto output = row_of<S>(p.output, head.batch, head.head, row.index);
        for_slice<T>(first_channel<T>(), head_dim,
                     [&](int i, int d) { output.set(d, sum > 0 ? sums[r].x[i] / sum : T(0)); });
        if (lane() == 0 && blockIdx.y == 0)
            static_cast<T*>(p.logsumexp)[head.bh * g.num_tokens() + row.index] =
                sum > 0 ? maximum[r] + log(sum) : infinity<T>();
    }
}

// delta = grad_output . output, one token a warp; 0 where the query saw nothing.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) delta_kernel(const AttentionParams p) {
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int64_t tokens = p.shape.geometry.num_tokens();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
    const int64_t bh = row / tokens, token = row % tokens;
    const int64_t batch = bh / p.shape.heads, head = bh % p.shape.heads;
    if (batch >= p.shape.batch) return;
    T delta = 0;
    if (static_cast<const T*>(p.logsumexp)[row] != infinity<T>()) {
        const auto grad = row_of<S>(p.grad_output, batch, head, token);
        const auto output = row_of<S>(p.output, batch, head, token);
        for (int d = lane(); d < head_dim; d += kLanes) delta += grad[d] * output[d];
        delta = warp_sum(delta);
    }
    if (lane() == 0) static_cast<T*>(p.delta)[row] = delta;
}

// Gradients of a warp's keys and values, loaded as its rows 0 and 1, over the queries [begin, end); and this
// lane's share of those of what is added to all logits of a key.
template <class S, class T = Accumulator<S>>
__device__ void key_gradients(AttentionShared<S>& s, const Head<S>& head, const Entry (&keys)[kRows<T>],
                              const Entries& queries, int begin, int end, SliceRow<T> (&grad_key)[kRows<T>],
                              SliceRow<T> (&grad_value)[kRows<T>], T (&grad_bias)[kRows<T>]) {
    const AttentionParams& p = head.p;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    for (int base = begin; base < end; base += kColumns) {
        Entry query = base + lane() < end ? queries.at(base + lane(), p.shape.geometry) : Entry{};
        const T logsumexp =
            query.kind == Entry::kNone ? infinity<T>() : head.per_token(p.logsumexp)[query.index];
        if (logsumexp == infinity<T>()) query = {};
        const T delta = query.kind == Entry::kNone ? T(0) : head.per_token(p.delta)[query.index];
        if (warp() == 0) {
            s.first[lane()] = head.source(p.query, query);
            s.second[lane()] = head.source(p.grad_output, query);
        }
        T score[kRows<T>], grad_weight[kRows<T>];
        dot_products<S>(s, s.first, warp_rows<T>(0, head_dim), head_dim, score);
        dot_products<S>(s, s.second, warp_rows<T>(1, head_dim), head_dim, grad_weight);
        const Box visible = head.visible(query);
        RowVector<T> weights, grad_logits;
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r) {
            const T logit = static_cast<T>(p.scale) * score[r] + head.logit_bias(query, visible, keys[r]);
            const T weight = exp(logit - logsumexp), kept = head.kept(query, keys[r]);
            weights.x[r] = weight * kept;
            grad_logits.x[r] = weight * (grad_weight[r] * kept - delta);
            grad_bias[r] += grad_logits.x[r];
        }
        s.weights[0][warp()][lane()] = weights;
        s.weights[1][warp()][lane()] = grad_logits;
        add_weighted<S>(s, s.second, s.weights[0][warp()], first_channel<T>(), head_dim, grad_value);
        add_weighted<S>(s, s.first, s.weights[1][warp()], first_channel<T>(), head_dim, grad_key);
    }
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r)
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) grad_key[r].x[i] *= static_cast<T>(p.scale);
}

template <class S, class T = Accumulator<S>>
__device__ void load_keys(const Head<S>& head, const Entry (&keys)[kRows<T>]) {
    const AttentionParams& p = head.p;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    Row<const S> sources[kRows<T>];
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) sources[r] = head.key_source(p.key, p.landmark_key, keys[r]);
    load_rows<S>(warp_rows<T>(0, head_dim), sources, head_dim);
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) sources[r] = head.key_source(p.value, p.landmark_value, keys[r]);
    load_rows<S>(warp_rows<T>(1, head_dim), sources, head_dim);
}

// One block a tile of landmarks and prefix keys, and a piece of the queries.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) global_key_gradients_kernel(const AttentionParams p) {
    __shared__ AttentionShared<S> s;
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const Entries globals{.landmarks = static_cast<int>(p.num_landmarks),
                          .prefix = static_cast<int>(g.num_prefix_tokens)};
    const int64_t tiles = detail::ceil_div(globals.size(), kTileRows<T>);
    const int64_t piece = blockIdx.x / tiles % p.pieces;
    const Head<S> head(p, blockIdx.x / tiles / p.pieces);
    const int first = static_cast<int>(blockIdx.x % tiles) * kTileRows<T> + warp() * kRows<T>;

    Entry keys[kRows<T>];
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) keys[r] = head.valid(globals.at(first + r, g));
    load_keys<S>(head, keys);
    SliceRow<T> grad_key[kRows<T>], grad_value[kRows<T>];
    const int64_t tokens = g.num_tokens();
    T grad_bias[kRows<T>] = {};
    key_gradients<S>(s, head, keys, all_tokens(g), static_cast<int>(tokens * piece / p.pieces),
                     static_cast<int>(tokens * (piece + 1) / p.pieces), grad_key, grad_value, grad_bias);
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
        if (first + r >= globals.size()) continue;
        if (p.grad_landmark_entropy && first + r < p.num_landmarks && blockIdx.y == 0) {
            const T sum = warp_sum(grad_bias[r]);
            if (lane() == 0)
                static_cast<T*>(
                    p.grad_landmark_entropy)[(head.bh * p.pieces + piece) * p.num_landmarks + first + r] =
                    sum;
        }
        const int64_t at = ((head.bh * p.pieces + piece) * globals.size() + first + r) * head_dim;
        for_slice<T>(first_channel<T>(), head_dim, [&](int i, int d) {
            static_cast<T*>(p.grad_global_key)[at + d] = grad_key[r].x[i];
            static_cast<T*>(p.grad_global_value)[at + d] = grad_value[r].x[i];
        });
    }
}

// One block a tile of the keys of a window, from the queries of all windows that see them.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) key_gradients_kernel(const AttentionParams p) {
    __shared__ AttentionShared<S> s;
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int64_t tiles = detail::ceil_div(g.window_height * g.window_width, kTileRows<T>);
    const int64_t window = blockIdx.x / tiles % g.num_windows();
    const Head<S> head(p, blockIdx.x / tiles / g.num_windows());
    const Entries own{.box = g.window_box(window)};
    const int first = static_cast<int>(blockIdx.x % tiles) * kTileRows<T>;
    if (first >= own.size()) return;

    const auto row = [&](int r) { return own.at(first + warp() * kRows<T> + r, g); };
    Entry keys[kRows<T>];
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) keys[r] = head.valid(row(r));
    load_keys<S>(head, keys);
    const Box seeing = g.windows_seeing(window);
    const Entries queries{
        .prefix = static_cast<int>(g.num_prefix_tokens),
        .box = {seeing.y0 * g.window_height, detail::min(seeing.y1 * g.window_height, g.grid_height),
                seeing.x0 * g.window_width, detail::min(seeing.x1 * g.window_width, g.grid_width)}};
    SliceRow<T> grad_key[kRows<T>], grad_value[kRows<T>];
    T grad_bias[kRows<T>] = {};
    key_gradients<S>(s, head, keys, queries, 0, queries.size(), grad_key, grad_value, grad_bias);

    static_assert(2 * kTileRows<T> <= kColumns);
    const int slot = warp() * 2 * kRows<T>;
    __syncthreads(); // no warp reads the latest columns any more
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
        put_row<S>(s, slot + r, grad_key[r]);
        put_row<S>(s, slot + kRows<T> + r, grad_value[r]);
    }
#pragma unroll 1 // the terms of chunks are long
    for (int r = 0; r < kRows<T>; ++r) {
        const Entry token = row(r);
        if (token.kind == Entry::kNone) continue;
        SliceRow<T> own_key = take_row<S>(s, slot + r), own_value = take_row<S>(s, slot + kRows<T> + r);
        if (p.chunk_terms.omega && head.valid(token).kind != Entry::kNone) {
            add_key_value_terms<S>(g, p.chunk_terms, p.scale, head.bh, token.index, first_channel<T>(),
                                   head_dim, WarpRow<T>{warp_rows<T>(0, head_dim), r},
                                   WarpRow<T>{warp_rows<T>(1, head_dim), r}, own_key, own_value);
        }
        const auto key_out = row_of<S>(p.grad_key, head.batch, head.head, token.index);
        const auto value_out = row_of<S>(p.grad_value, head.batch, head.head, token.index);
        for_slice<T>(first_channel<T>(), head_dim, [&](int i, int d) {
            key_out.set(d, own_key.x[i]);
            value_out.set(d, own_value.x[i]);
        });
    }
}

// The pieces of the gradients of prefix keys, added in order; one prefix token a warp.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) prefix_key_gradients_kernel(const AttentionParams p) {
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
    const int64_t bh = row / g.num_prefix_tokens, token = row % g.num_prefix_tokens;
    const int64_t batch = bh / p.shape.heads, head = bh % p.shape.heads;
    if (batch >= p.shape.batch) return;
    const int64_t columns = p.num_landmarks + g.num_prefix_tokens;
    const auto key_out = row_of<S>(p.grad_key, batch, head, token);
    const auto value_out = row_of<S>(p.grad_value, batch, head, token);
    for (int d = lane(); d < head_dim; d += kLanes) {
        T grad_key = 0, grad_value = 0;
        for (int64_t piece = 0; piece < p.pieces; ++piece) {
            const int64_t at = ((bh * p.pieces + piece) * columns + p.num_landmarks + token) * head_dim + d;
            grad_key += static_cast<const T*>(p.grad_global_key)[at];
            grad_value += static_cast<const T*>(p.grad_global_value)[at];
        }
        key_out.set(d, grad_key);
        value_out.set(d, grad_value);
    }
}

// One block a tile of queries; with a relative bias one block several of them, each warp with its own summand
// of the bias gradient.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) query_gradients_kernel(const AttentionParams p, int64_t blocks) {
    __shared__ AttentionShared<S> s;
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const QueryTiles tiles(g, kTileRows<T>);
    const Head<S> head(p, blockIdx.x / blocks);
    const int64_t block = blockIdx.x % blocks;

    T* grad_bias = nullptr;
    if (p.grad_relative_bias && blockIdx.y == 0) {
        const int64_t size = g.bias_height * g.bias_width;
        grad_bias =
            static_cast<T*>(p.grad_relative_bias) +
            ((head.head * p.shape.batch + head.batch) * p.bias_pieces + block * kWarps + warp()) * size;
        for (int64_t i = lane(); i < size; i += kLanes) grad_bias[i] = 0;
        __syncwarp();
    }

    for (int64_t index = tiles.count * block / blocks; index < tiles.count * (block + 1) / blocks; ++index) {
        const QueryTile<T> tile(p, tiles, index);
        if (tile.first >= tile.queries.size()) continue;
        Entry query[kRows<T>];
        Row<const S> query_sources[kRows<T>], grad_sources[kRows<T>];
        T logsumexp[kRows<T>], delta[kRows<T>];
        SliceRow<T> sums[kRows<T>];
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r) {
            query[r] = tile.row(r, g);
            logsumexp[r] =
                query[r].kind == Entry::kNone ? infinity<T>() : head.per_token(p.logsumexp)[query[r].index];
            if (logsumexp[r] == infinity<T>()) query[r] = {};
            delta[r] = query[r].kind == Entry::kNone ? T(0) : head.per_token(p.delta)[query[r].index];
            query_sources[r] = head.source(p.query, query[r]);
            grad_sources[r] = head.source(p.grad_output, query[r]);
        }
        RowVector<T>*const rows = warp_rows<T>(0, head_dim), *const grad_rows = warp_rows<T>(1, head_dim);
        load_rows<S>(rows, query_sources, head_dim);
        load_rows<S>(grad_rows, grad_sources, head_dim);
        const Box visible = tile.keys.box;

        const int num_keys = tile.keys.size();
        for (int base = 0; base < num_keys; base += kColumns) {
            const Entry key = head.valid(tile.keys.at(base + lane(), g));
            if (warp() == 0) {
                s.first[lane()] = head.key_source(p.key, p.landmark_key, key);
                s.second[lane()] = head.key_source(p.value, p.landmark_value, key);
            }
            T score[kRows<T>], grad_weight[kRows<T>];
            dot_products<S>(s, s.first, rows, head_dim, score);
            dot_products<S>(s, s.second, grad_rows, head_dim, grad_weight);
            RowVector<T> grad_logits;
#pragma unroll
            for (int r = 0; r < kRows<T>; ++r) {
                const T logit = static_cast<T>(p.scale) * score[r] + head.logit_bias(query[r], visible, key);
                const T weight = exp(logit - logsumexp[r]);
                grad_logits.x[r] = weight * (grad_weight[r] * head.kept(query[r], key) - delta[r]);
                if (grad_bias) {
                    if (query[r].kind == Entry::kGrid && key.kind == Entry::kGrid)
                        grad_bias[head.bias_index(query[r], key)] += grad_logits.x[r];
                    __syncwarp(); // the next row's keys have other places
                }
            }
            s.weights[0][warp()][lane()] = grad_logits;
            add_weighted<S>(s, s.first, s.weights[0][warp()], first_channel<T>(), head_dim, sums);
        }

        const int slot = warp() * kRows<T>;
        __syncthreads(); // no warp reads the latest columns any more
#pragma unroll
        for (int r = 0; r < kRows<T>; ++r) put_row<S>(s, slot + r, sums[r]);
#pragma unroll 1
        for (int r = 0; r < kRows<T>; ++r) {
            const Entry row = tile.row(r, g);
            if (row.kind == Entry::kNone) continue;
            SliceRow<T> own = take_row<S>(s, slot + r);
#pragma unroll
            for (int i = 0; i < kPerLane<T>; ++i) own.x[i] *= static_cast<T>(p.scale);
            if (p.chunk_terms.omega && head.valid(row).kind == Entry::kGrid)
                add_query_terms<S>(g, p.chunk_terms, head.bh, row.index, first_channel<T>(), head_dim, own);
            const auto out = row_of<S>(p.grad_query, head.batch, head.head, row.index);
            for_slice<T>(first_channel<T>(), head_dim, [&](int i, int d) { out.set(d, own.x[i]); });
        }
    }
}

// With the rows of `operands` in shared memory, and for every slice of the channels.
template <class S, class... Arguments>
void launch_slices(void (*kernel)(Arguments...), int64_t blocks, int operands, cudaStream_t stream,
                   const AttentionParams& p, std::type_identity_t<Arguments>... arguments) {
    using T = Accumulator<S>;
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(detail::ceil_div(p.shape.head_dim, kSlice<T>)));
    const size_t bytes = sizeof(RowVector<T>) * operands * kWarps * whole_blocks(p.shape.head_dim);
    if (blocks > 0) kernel<<<grid, kThreads, bytes, stream>>>(arguments...);
}

template <class S>
void Kernels<S>::window_attention_fwd(const AttentionParams& p, cudaStream_t stream) {
    const int64_t tiles = QueryTiles(p.shape.geometry, kTileRows<Accumulator<S>>).count;
    launch_slices<S>(window_attention_fwd_kernel<S>, p.shape.batch * p.shape.heads * tiles, 1, stream, p, p);
}

template <class S>
void Kernels<S>::window_attention_bwd_global(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const int64_t heads = p.shape.batch * p.shape.heads;
    launch(delta_kernel<S>, detail::ceil_div(heads * g.num_tokens(), kWarps), 0, stream, p);
    const int64_t tiles = detail::ceil_div(p.num_landmarks + g.num_prefix_tokens, kTileRows<Accumulator<S>>);
    launch_slices<S>(global_key_gradients_kernel<S>, heads * tiles * p.pieces, 2, stream, p, p);
}

template <class S>
void Kernels<S>::window_attention_bwd(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const int64_t heads = p.shape.batch * p.shape.heads;
    constexpr int kRowsOfTile = kTileRows<Accumulator<S>>;
    const int64_t blocks = p.grad_relative_bias ? p.bias_pieces / kWarps : QueryTiles(g, kRowsOfTile).count;
    launch_slices<S>(query_gradients_kernel<S>, heads * blocks, 2, stream, p, p, blocks);
    const int64_t tiles = detail::ceil_div(g.window_height * g.window_width, kRowsOfTile);
    launch_slices<S>(key_gradients_kernel<S>, heads * g.num_windows() * tiles, 2, stream, p, p);
    launch(prefix_key_gradients_kernel<S>, detail::ceil_div(heads * g.num_prefix_tokens, kWarps), 0, stream,
           p);
}

} // namespace eva_attn::cuda::simt
