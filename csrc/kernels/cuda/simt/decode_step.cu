// Causal decoding: one block a (batch, head), which takes in its tokens one by one.
#include <limits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/simt/warp.cuh"

namespace eva_attn::cuda::simt {
namespace {

template <class S>
constexpr int kDecodeWarps = sizeof(S) == 8 ? 4 : 8;
template <class S>
constexpr int kDecodeThreads = kDecodeWarps<S> * kLanes;
constexpr int kChannels = kMaxHeadDim / kLanes; // of a lane
constexpr int kStages = 5;                      // rows that a lane has in flight, and the one it adds

// A lane's channels of a row, in pieces of 16 bytes.
template <class S>
constexpr int kVector = 16 / sizeof(S);
template <class S>
struct alignas(16) Vector {
    S x[kVector<S>];
};
template <class S>
constexpr int kVectors = kChannels / kVector<S>;

// Of 16-bit numbers, tensor cores add up eight rows at a time: a tile, of keys or values.
template <class S>
constexpr bool kTiled = sizeof(S) == 2;
constexpr int kTileRows = 8;
// D is at most kDim; rows lie one vector apart, so that the same vector of all lies in different banks.
template <class S, int kDim>
struct Tile {
    static constexpr int kUnits = kDim / kVector<S>;
    static constexpr int kStages = 2 * 128 / kDim; // of a warp
    Vector<S> x[kTileRows][kUnits + 1];
};

// Lanes that share a row of D numbers: as few as hold it. A lane has kVector channels side by side, then the
// next ones `width` lanes further.
template <class S>
struct LaneGroup {
    using T = Accumulator<S>;
    int width, lane, index, count; // of the groups in the block

    __device__ explicit LaneGroup(int head_dim) {
        int log_width = 0;
        while (kChannels << log_width < head_dim) ++log_width;
        width = 1 << log_width;
        lane = simt::lane() & (width - 1);
        index = static_cast<int>(threadIdx.x) >> log_width;
        count = kDecodeThreads<S> >> log_width;
    }

    __device__ int channel(int vector) const { return (vector * width + lane) * kVector<S>; }

    // Calls body(i, d): this lane's i-th channel is d.
    template <class Body>
    __device__ void for_channels(Body body) const {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) body(i, channel(i / kVector<S>) + i % kVector<S>);
    }

    template <class Number>
    __device__ Number sum(Number x) const {
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2)
            if (const Number other = __shfl_xor_sync(~0u, x, offset); offset < width) x += other;
        return x;
    }
};

// A softmax over rows, and the sum of their values that it weighs. A is the type of the logits.
template <class A, class T>
struct Softmax {
    A maximum = std::numeric_limits<A>::lowest(); // finite, so that logits may be -infinity
    T total = 0;
    T sum[kChannels] = {};

    static __device__ T factor(A logit, A top) { return exp(static_cast<T>(logit - top)); }

    // value(i): the lane's i-th channel.
    template <class Value>
    __device__ void add(A logit, Value value) {
        const bool is_top = logit > maximum;
        const T ratio = exp(static_cast<T>(is_top ? maximum - logit : logit - maximum));
        const T correction = is_top ? ratio : T(1), weight = is_top ? T(1) : ratio;
        maximum = max(logit, maximum);
        total = total * correction + weight;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sum[i] = sum[i] * correction + weight * value(i);
    }
};

// Rows of D numbers are followed by zeros.
template <class S, int kDim>
struct DecodeShared {
    using T = Accumulator<S>;
    union WarpRows {
        Vector<S> lanes[kStages][2][kVectors<S>][kLanes]; // of keys and values
        Tile<S, kDim> tiles[kTiled<S> ? Tile<S, kDim>::kStages : 1][2];
        T sums[kMaxHeadDim];
    } rows[kDecodeWarps<S>];
    alignas(16) S query[kMaxHeadDim];
    S new_key[kMaxHeadDim], new_value[kMaxHeadDim];
    T mean[kMaxHeadDim], landmark_key[kMaxHeadDim], landmark_query[kMaxHeadDim];
    double maxima[kDecodeWarps<S> + 1]; // of the softmaxes of warps, and last of the token that is taken in
    T totals[kDecodeWarps<S> + 1];
};
static_assert(sizeof(DecodeShared<__half, 128>) <= 99 << 10 && sizeof(DecodeShared<__half, 256>) <= 99 << 10,
              "more than a block of compute capability 8.6 can have");

// Out of line: most steps end no chunk, and then fetch none of its instructions.
template <class S, int kDim>
__device__ __noinline__ void end_chunk(const DecodeParams&, DecodeShared<S, kDim>&, bool aligned, int chunk,
                                       int slot);

template <class S, int kDim>
struct DecodingHead {
    using T = Accumulator<S>;
    const DecodeParams& p;
    DecodeShared<S, kDim>& s;
    const bool aligned; // to 16 bytes: the rows of the state
    const LaneGroup<S> group;
    const int64_t bh;
    const int batch, head, head_dim, row_bytes, slots;

    __device__ DecodingHead(const DecodeParams& p, DecodeShared<S, kDim>& s, bool aligned)
        : p(p), s(s), aligned(aligned), group(static_cast<int>(p.head_dim)), bh(blockIdx.x),
          batch(static_cast<int>(blockIdx.x) / static_cast<int>(p.heads)),
          head(static_cast<int>(blockIdx.x) - batch * static_cast<int>(p.heads)),
          head_dim(static_cast<int>(p.head_dim)), row_bytes(head_dim * static_cast<int>(sizeof(S))),
          slots(static_cast<int>(p.window_size + p.overlap)) {}

    // The rows of this head in a tensor of the state, [B, H, count, D].
    __device__ S* rows(void* tensor, int64_t count) const {
        S* rows = static_cast<S*>(tensor) + bh * count * head_dim;
        asm("" : "+l"(rows)); // not to be computed anew for each row
        return rows;
    }
    __device__ S* row_at(S* rows, int i) const {
        return const_cast<S*>(row_at(static_cast<const S*>(rows), i));
    }
    // In bytes, so that one instruction finds a row.
    __device__ const S* row_at(const S* rows, int i) const {
        return reinterpret_cast<const S*>(reinterpret_cast<const char*>(rows) +
                                          uint64_t{static_cast<uint32_t>(i)} *
                                              static_cast<uint32_t>(row_bytes));
    }

    template <class Body>
    __device__ void for_channels(Body body) const {
        for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kDecodeThreads<S>) body(d);
        __syncthreads();
    }

    struct KeyValue {
        const S *key, *value;
    };
    // A number that may still be under way, in one of two types: widened when it is asked for.
    struct Bias {
        T wide = -infinity<T>();
        S narrow{};
        bool is_narrow = false;

        __device__ T value() const { return is_narrow ? widen(narrow) : wide; }
    };
    // Its i-th row is the one at start + i, back to the first after `end`.
    struct Segment {
        const S *key, *value;
        int start, end;

        __device__ KeyValue row(const DecodingHead& head, int i) const {
            i += start;
            i -= i < end ? 0 : end;
            return {head.row_at(key, i), head.row_at(value, i)};
        }
    };

    // Starts copying a vector of a row, its elements from `first` on: zeros from `end` on.
    __device__ void copy(Vector<S>& to, const S* row, int first, int end) const {
        if (aligned) return copy_async(&to, row + first, first < end);
#pragma unroll 1
        for (int k = 0; k < kVector<S>; ++k) to.x[k] = first + k < end ? row[first + k] : S(0);
    }

    // Starts copying what this lane adds as its step-th row: zeros from `count` on.
    template <class Row>
    __device__ void fetch(int step, int count, Row row) const {
        const int j = step * group.count + group.index;
        const KeyValue from = row(j);
        auto& to = s.rows[warp()].lanes[step % kStages];
#pragma unroll
        for (int vector = 0; vector < kVectors<S>; ++vector) {
            const int first = group.channel(vector), end = j < count ? head_dim : 0;
            copy(to[0][vector][lane()], from.key, first, end);
            copy(to[1][vector][lane()], from.value, first, end);
        }
        copy_commit();
    }

    // The softmax over rows [0, count) of scale * (sum of term(x_d, key_d)) + bias(j), joined to that of the
    // new value at the logit that begin(x), called while the first rows are under way, leaves in s.maxima; it
    // sets this lane's channels of x. Calls out(d, sum of weight * value, top, sum of exp(logit - top)).
    template <class A, class Row, class Bias, class Term, class Begin, class Out>
    __device__ void attend(int count, A scale, Row row, Bias bias, Term term, Begin begin, Out out) const {
        // Each lane reads the bias of one of its group's next `width` rows.
        const auto biases = [&](int first) {
            const int j = (first + group.lane) * group.count + group.index;
            return j < count ? static_cast<A>(bias(j)) : -infinity<A>();
        };
        A latest_biases = 0, next_biases = 0;
        T x[kChannels];
        Softmax<A, T> softmax;
#pragma unroll 1 // one loop also for the first rows: code that is short is fetched soon
        for (int step = 1 - kStages; step <= 0 || step * group.count < count; ++step) {
            fetch(step + kStages - 1, count, row);
            const int from = step & (group.width - 1);
            if (step == 1 - kStages || (step >= 0 && from == 0)) {
                latest_biases = next_biases;
                next_biases = biases(step < 0 ? 0 : step + group.width);
            }
            if (step < 0) continue;
            if (step == 0) begin(x);
            copy_wait<kStages - 1>();
            const auto& [key, value] = s.rows[warp()].lanes[step % kStages];
            const auto channel = [](const auto& vectors, int i) {
                return widen(vectors[i / kVector<S>][lane()].x[i % kVector<S>]);
            };
            A sum = 0;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) sum += term(static_cast<A>(x[i]), channel(key, i));
            const A bias = __shfl_sync(~0u, latest_biases, from, group.width);
            softmax.add(scale * group.sum(sum) + bias, [&](int i) { return channel(value, i); });
        }
        copy_wait<0>();
        __syncwarp(); // the sums take the place of the rows
        join(softmax, out);
    }

    // Adds up the softmaxes of all groups, always in the same order.
    template <class A, class Out>
    __device__ void join(Softmax<A, T>& softmax, Out out) const {
        constexpr auto factor = Softmax<A, T>::factor;
#pragma unroll 1
        for (int offset = group.width; offset < kLanes; offset *= 2) {
            const A other = __shfl_xor_sync(~0u, softmax.maximum, offset);
            const A top = max(softmax.maximum, other);
            const T mine = factor(softmax.maximum, top), others = factor(other, top);
            softmax.total = softmax.total * mine + __shfl_xor_sync(~0u, softmax.total, offset) * others;
#pragma unroll
            for (int i = 0; i < kChannels; ++i)
                softmax.sum[i] =
                    softmax.sum[i] * mine + __shfl_xor_sync(~0u, softmax.sum[i], offset) * others;
            softmax.maximum = top;
        }
        if (lane() < group.width)
            group.for_channels([&](int i, int d) { s.rows[warp()].sums[d] = softmax.sum[i]; });
        join_warps(softmax.maximum, softmax.total, out);
    }

    // ... and those of all warps, whose sums are in shared memory, with that of the new value.
    template <class A, class Out>
    __device__ void join_warps(A warp_maximum, T warp_total, Out out) const {
        constexpr int kOwn = kDecodeWarps<S>;
        if (lane() == 0) s.maxima[warp()] = warp_maximum, s.totals[warp()] = warp_total;
        __syncthreads();
        const int other = min(lane(), kOwn);
        const A maximum = static_cast<A>(s.maxima[other]), top = warp_max(maximum);
        const T weight = Softmax<A, T>::factor(maximum, top);
        const T total = warp_sum(lane() <= kOwn ? s.totals[other] * weight : T(0));
        const T own_weight = __shfl_sync(~0u, weight, kOwn);
#pragma unroll 1
        for (int first = warp() * kLanes; first < head_dim; first += kDecodeThreads<S>) {
            const int d = first + lane();
            T sum = own_weight > 0 ? own_weight * widen(s.new_value[d]) : T(0);
#pragma unroll
            for (int w = 0; w < kOwn; ++w) sum += s.rows[w].sums[d] * __shfl_sync(~0u, weight, w);
            if (d < head_dim) out(d, total == 0 ? T(0) : sum / total, top, total);
        }
        __syncthreads();
    }

    // Starts copying rows [first, first + kTileRows) of a segment: zeros from `count` on.
    __device__ void fetch_tile(int stage, Segment segment, int first, int count) const {
        constexpr int kUnits = Tile<S, kDim>::kUnits, kRows = kLanes / kUnits;
        auto& [key, value] = s.rows[warp()].tiles[stage];
        const int unit = lane() % kUnits;
        const auto copy_rows = [&](int i) {
            i += lane() / kUnits;
            const KeyValue from = segment.row(*this, first + i);
            const int end = first + i < count ? head_dim : 0;
            copy(key.x[i][unit], from.key, unit * kVector<S>, end);
            copy(value.x[i][unit], from.value, unit * kVector<S>, end);
        };
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kTileRows; i += kRows) copy_rows(i);
        } else {
#pragma unroll 1
            for (int i = 0; i < kTileRows; i += kRows) copy_rows(i);
        }
    }

    // attend() by tensor cores, of x = s.query and the product as term, over a segment of keys and one of
    // landmarks: segment(is_key), bias(is_key, i).
    template <class SegmentOf, class BiasOf, class Begin, class Out>
    __device__ void attend_tiled(int num_keys, int num_landmarks, float scale, SegmentOf segment, BiasOf bias,
                                 Begin begin, Out out) const {
        using Tile = Tile<S, kDim>;
        constexpr int kBlocks = kDim / 16, kBiasSteps = kLanes / kTileRows;
        const int lane_row = lane() / 4, pair = 2 * (lane() % 4);
        const int first_landmark = (num_keys + kTileRows - 1) / kTileRows * kTileRows; // tiles hold either
        const int count = first_landmark + num_landmarks;
        const auto first_row = [](int step) { return (step * kDecodeWarps<S> + warp()) * kTileRows; };
        // Each lane reads the bias of a row of one of the next kBiasSteps tiles.
        const auto biases = [&](int step) {
            const int j = first_row(step + lane() / kTileRows) + lane() % kTileRows;
            const bool is_key = j < first_landmark;
            const int i = is_key ? j : j - first_landmark;
            return i < (is_key ? num_keys : num_landmarks) ? bias(is_key, i) : Bias{};
        };
        asm("" : "+f"(scale)); // not to be converted anew for each tile
        const auto exponential = [](float x) { return exp2_approx(x * 1.4426950408889634f); };
        float latest_biases = 0;
        Bias next_biases;
        // C [D, 8]: of weights rounded to S in even columns, of what that leaves of them in odd ones.
        float sums[kBlocks][4] = {};
        float maximum = std::numeric_limits<float>::lowest();
        float total = 0; // of the lane's two rows of each tile
#pragma unroll 1
        for (int step = -Tile::kStages, stage = 0; step <= 0 || first_row(step) < count; ++step) {
            if (step == 0) begin();
            const int from = step & (kBiasSteps - 1);
            if (step >= 0 && first_row(step) < count) { // a warp may have none
                if (from == 0) latest_biases = next_biases.value();
                copy_wait<Tile::kStages - 1>();
                __syncwarp();
                const auto& [key, value] = s.rows[warp()].tiles[stage];
                float products[2][4] = {};
#pragma unroll
                for (int i = 0; i < kBlocks; i += 2) {
                    uint32_t q[2][4], k[4]; // all rows of A are the query
                    load_matrix(q[0], s.query + 16 * i + lane() / 16 * 8);
                    load_matrix(q[1], s.query + 16 * i + lane() / 16 * 8 + 16);
                    load_matrix(k, &key.x[lane() % 8][2 * i + lane() / 8]);
                    multiply_add<S>(products[0], q[0], k[0], k[1]);
                    multiply_add<S>(products[1], q[1], k[2], k[3]);
                }
                float logits[2], weights[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    logits[i] = scale * (products[0][i] + products[1][i]) +
                                __shfl_sync(~0u, latest_biases, from * kTileRows + pair + i);
                float top = max(logits[0], logits[1]);
                top = max(top, __shfl_xor_sync(~0u, top, 1));
                top = max(top, __shfl_xor_sync(~0u, top, 2));
                if (top > maximum) {
                    const float correction = exponential(maximum - top);
                    maximum = top;
                    total *= correction;
#pragma unroll
                    for (auto& block : sums)
#pragma unroll
                        for (float& sum : block) sum *= correction;
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    weights[i] = exponential(logits[i] - maximum);
                    total += weights[i];
                }
                uint32_t weight = pack<S>(weights[0], weights[1]);
                if (const float2 rounded = unpack<S>(weight); lane_row % 2)
                    weight = pack<S>(weights[0] - rounded.x, weights[1] - rounded.y);
#pragma unroll
                for (int i = 0; i < kBlocks; i += 2) {
                    uint32_t v[4];
                    load_matrix_transposed(v, &value.x[lane() % 8][2 * i + lane() / 8]);
                    multiply_add<S>(sums[i], {v[0], v[1]}, weight);
                    multiply_add<S>(sums[i + 1], {v[2], v[3]}, weight);
                }
                __syncwarp();
            }
            if (const int first = first_row(step + Tile::kStages); first < count) {
                const bool is_key = first < first_landmark;
                fetch_tile(stage, segment(is_key), is_key ? first : first - first_landmark,
                           is_key ? num_keys : num_landmarks);
            }
            copy_commit();
            if (step == -Tile::kStages || (step >= 0 && from == 0))
                next_biases = biases(step < 0 ? 0 : step + kBiasSteps);
            stage = stage + 1 < Tile::kStages ? stage + 1 : 0;
        }
        copy_wait<0>();
        __syncwarp(); // the sums take the place of the rows
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
            if (i % 4 == lane() % 4)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    s.rows[warp()].sums[16 * i + 8 * half + lane_row] =
                        sums[i][2 * half] + sums[i][2 * half + 1];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        join_warps(maximum, total, out);
    }

    __device__ void take_in(int64_t token, int& position) const {
        constexpr int kOwn = (kMaxHeadDim + kDecodeThreads<S> - 1) / kDecodeThreads<S>;
        // Nothing here depends on the position, which may still be under way.
        const auto query = row_of<S>(p.query, batch, head, token), key = row_of<S>(p.key, batch, head, token),
                   value = row_of<S>(p.value, batch, head, token);
        T* const key_sum = static_cast<T*>(p.key_sum) + bh * head_dim;
        T* const query_sum = static_cast<T*>(p.query_sum) + bh * head_dim;
        S new_query[kOwn], new_key[kOwn], new_value[kOwn];
        T old_key_sum[kOwn], old_query_sum[kOwn];
        const auto for_own = [&](auto body) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int d = i * kDecodeThreads<S> + static_cast<int>(threadIdx.x);
                if (d < kMaxHeadDim) body(i, d, d < head_dim);
            }
        };
        for_own([&](int i, int d, bool valid) {
            new_key[i] = valid ? key.data[d * key.stride] : S(0);
            new_value[i] = valid ? value.data[d * value.stride] : S(0);
            new_query[i] = valid ? query.data[d * query.stride] : S(0);
            old_key_sum[i] = valid ? key_sum[d] : T(0);
            old_query_sum[i] = valid ? query_sum[d] : T(0);
        });
        const auto window_bias = [&](int offset) {
            const int64_t at = head * p.relative_bias_head_stride + slots - 1 + offset;
            if (!p.relative_bias) return Bias{.wide = 0};
            if (p.relative_bias_dtype == DType::kFloat)
                return Bias{.wide = static_cast<T>(static_cast<const float*>(p.relative_bias)[at])};
            return Bias{.narrow = static_cast<const S*>(p.relative_bias)[at], .is_narrow = true};
        };
        position = max(position, 0);

        const auto size = [](int64_t x) { return static_cast<unsigned>(x); };
        const int in_window = static_cast<int>(position % size(p.window_size));
        const int chunk = static_cast<int>(position / size(p.chunk_size));
        const int in_chunk = position - chunk * static_cast<int>(p.chunk_size);
        const int slot = static_cast<int>(position % size(slots));
        const int overlap = static_cast<int>(p.overlap), capacity = static_cast<int>(p.num_landmarks);
        const int num_keys = min(in_window + overlap, position); // before the token
        const int first_slot = slot < num_keys ? slot - num_keys + slots : slot - num_keys;
        int num_landmarks = min(chunk, capacity);
        if (p.exclude_window_landmarks) // chunks divide windows
            num_landmarks =
                min(max(chunk - static_cast<int>((in_window - in_chunk + overlap) / size(p.chunk_size)), 0),
                    capacity);

        S* const window_key = rows(p.window_key, slots);
        S* const window_value = rows(p.window_value, slots);
        const S* const landmark_key = rows(p.landmark_key, p.num_landmarks);
        const S* const landmark_value = rows(p.landmark_value, p.num_landmarks);
        const T scale = static_cast<T>(p.scale), landmark_bias = static_cast<T>(p.landmark_bias);
        const T* const entropy =
            p.landmark_entropy ? static_cast<const T*>(p.landmark_entropy) + bh * p.num_landmarks : nullptr;
        const auto output = row_of<S>(p.output, batch, head, token);
        const auto segment = [&](bool is_key) {
            return Segment{is_key ? window_key : landmark_key, is_key ? window_value : landmark_value,
                           is_key ? first_slot : 0, is_key ? slots : capacity};
        };
        const auto bias = [&](bool is_key, int i) {
            if (is_key) return window_bias(i - num_keys);
            return Bias{.wide = entropy ? entropy[i] : landmark_bias};
        };
        const auto begin = [&] {
            const Bias own_bias = window_bias(0);
            int members = in_chunk;
            asm volatile("" : "+r"(members)); // not before: the sums may still be under way
            for_own([&](int i, int d, bool valid) {
                s.query[d] = new_query[i];
                s.new_key[d] = new_key[i];
                s.new_value[d] = new_value[i];
                if (!valid) return;
                row_at(window_key, slot)[d] = new_key[i];
                row_at(window_value, slot)[d] = new_value[i];
                key_sum[d] = (members == 0 ? T(0) : old_key_sum[i]) + widen(new_key[i]);
                query_sum[d] = (members == 0 ? T(0) : old_query_sum[i]) + widen(new_query[i]);
            });
            __syncthreads();
            if (warp() != 0) return;
            T product = 0;
#pragma unroll
            for (int d = lane(); d < kMaxHeadDim; d += kLanes)
                product += widen(s.query[d]) * widen(s.new_key[d]);
            product = warp_sum(product);
            if (lane() == 0)
                s.maxima[kDecodeWarps<S>] = scale * product + own_bias.value(), s.totals[kDecodeWarps<S>] = 1;
        };
        const auto out = [&](int d, T x, T, T) { output.set(d, x); };
        if constexpr (kTiled<S>) {
            attend_tiled(num_keys, num_landmarks, scale, segment, bias, begin, out);
        } else {
            const auto located = [num_keys](int j, auto body) {
                const bool is_key = j < num_keys;
                return body(is_key, is_key ? j : j - num_keys);
            };
            attend<T>(
                num_keys + num_landmarks, scale,
                [&](int j) {
                    return located(j, [&](bool is_key, int i) { return segment(is_key).row(*this, i); });
                },
                [&](int j) { return located(j, bias).value(); }, [](T query, T key) { return query * key; },
                [&](T(&x)[kChannels]) {
                    begin();
                    group.for_channels([&](int i, int d) { x[i] = widen(s.query[d]); });
                },
                out);
        }
        if (in_chunk + 1 == p.chunk_size && chunk < capacity) end_chunk(p, s, aligned, chunk, slot);
    }

    // landmark = A(mean of the chunk)
    __device__ void project(const Projection& a, const void* sums, T* landmark) const {
        const T* const sum = static_cast<const T*>(sums) + bh * head_dim;
        T* const mean = p.has_projection ? s.mean : landmark;
        for_channels([&](int d) { mean[d] = sum[d] / static_cast<T>(p.chunk_size); });
        if (!p.has_projection) return;
        for (int row = warp(); row < head_dim; row += kDecodeWarps<S>) {
            T product = 0;
            for (int d = lane(); d < head_dim; d += kLanes)
                product +=
                    weight_at<S>(a.dtype, a.weight, static_cast<int64_t>(row) * head_dim + d) * mean[d];
            product = warp_sum(product);
            if (lane() == 0) landmark[row] = product + (a.bias ? weight_at<S>(a.dtype, a.bias, row) : T(0));
        }
        __syncthreads();
        if (!a.norm_weight) return;
        T center = 0, variance = 0;
        for (int d = lane(); d < head_dim; d += kLanes) center += landmark[d];
        center = warp_sum(center) / static_cast<T>(head_dim);
        for (int d = lane(); d < head_dim; d += kLanes)
            variance += (landmark[d] - center) * (landmark[d] - center);
        variance = warp_sum(variance) / static_cast<T>(head_dim);
        const T rstd = T(1) / sqrt(variance + static_cast<T>(p.norm_eps));
        __syncthreads(); // every warp has read what is now overwritten
        for_channels([&](int d) {
            landmark[d] = (landmark[d] - center) * rstd * weight_at<S>(a.dtype, a.norm_weight, d) +
                          (a.norm_bias ? weight_at<S>(a.dtype, a.norm_bias, d) : T(0));
        });
    }

    // Makes the landmark of the chunk whose last token is in `slot`.
    __device__ void make_landmark(int chunk, int slot) const {
        const bool tangent = p.landmark_entropy;
        const bool has_mu = !p.has_projection || p.has_query_projection;
        const int chunk_size = static_cast<int>(p.chunk_size);
#pragma unroll 1
        for (const bool is_key : {true, false})
            if (is_key ? !tangent : has_mu)
                project(is_key ? p.key_projection : p.query_projection, is_key ? p.key_sum : p.query_sum,
                        is_key ? s.landmark_key : s.landmark_query);
        T* const omega = s.landmark_query;
        S* const landmark_key = row_at(rows(p.landmark_key, p.num_landmarks), chunk);
        S* const landmark_value = row_at(rows(p.landmark_value, p.num_landmarks), chunk);
        for_channels([&](int d) {
            if (tangent) return; // omega is the mean query
            store(landmark_key + d, s.landmark_key[d]);
            omega[d] = has_mu ? s.landmark_query[d] + s.landmark_key[d] : T(0);
        });
        const int first_slot = slot + 1 < chunk_size ? slot + 1 - chunk_size + slots : slot + 1 - chunk_size;
        const auto scale = static_cast<Exact<S>>(p.scale), half = static_cast<Exact<S>>(tangent ? 0 : 0.5);
        const Segment members{rows(p.window_key, slots), rows(p.window_value, slots), first_slot, slots};
        Exact<S> log_sum = 0;
        // The sum of the members' values, of tangents then that of their keys.
#pragma unroll 1
        for (const bool of_keys : {false, true}) {
            if (of_keys && !tangent) return;
            attend<Exact<S>>(
                chunk_size, scale,
                [&](int j) {
                    const KeyValue from = members.row(*this, j);
                    return KeyValue{from.key, of_keys ? from.key : from.value};
                },
                [](int) { return T(0); },
                [half](Exact<S> omega, T key) { return key * (omega - half * key); },
                [&](T(&x)[kChannels]) {
                    if (threadIdx.x == 0) s.maxima[kDecodeWarps<S>] = -infinity<double>();
                    group.for_channels([&](int i, int d) { x[i] = d < head_dim ? omega[d] : T(0); });
                },
                [&](int d, T x, Exact<S> top, T total) {
                    store((of_keys ? landmark_key : landmark_value) + d, x);
                    s.landmark_key[d] = x;
                    log_sum = top + log(static_cast<Exact<S>>(total));
                });
        }
        // The mean of the logits, which are linear in the keys, is that of their mean.
        Exact<S> product = 0;
        for (int d = lane(); d < head_dim; d += kLanes)
            product += static_cast<Exact<S>>(omega[d]) * s.landmark_key[d];
        product = warp_sum(product);
        if (threadIdx.x == 0)
            static_cast<T*>(p.landmark_entropy)[bh * p.num_landmarks + chunk] =
                static_cast<T>(log_sum - scale * product);
        __syncthreads(); // the next token reads it
    }

    __device__ void run() const {
        int position = static_cast<int>(p.position[bh]);
        const int64_t count =
            p.num_tokens ? detail::min(detail::max(p.num_tokens[batch], 0), p.tokens) : p.tokens;
        for (int64_t token = 0; token < count; ++token, ++position) take_in(token, position);
        for (int64_t token = count; token < p.tokens; ++token) {
            const auto output = row_of<S>(p.output, batch, head, token);
            for_channels([&](int d) { output.set(d, 0); });
        }
        if (threadIdx.x == 0) p.position[bh] = position;
    }
};

template <class S, int kDim>
__device__ void end_chunk(const DecodeParams& p, DecodeShared<S, kDim>& s, bool aligned, int chunk,
                          int slot) {
    DecodingHead<S, kDim>(p, s, aligned).make_landmark(chunk, slot);
}

template <class S, int kDim>
__global__ void __launch_bounds__(kDecodeThreads<S>, sizeof(S) == 4 || kDim < kMaxHeadDim ? 2 : 1)
    decode_step_kernel(const __grid_constant__ DecodeParams p, bool aligned) {
    extern __shared__ __align__(16) unsigned char shared[];
    DecodingHead<S, kDim>(p, *reinterpret_cast<DecodeShared<S, kDim>*>(shared), aligned).run();
}

template <class S, int kDim = kMaxHeadDim>
void launch_decode_step(const DecodeParams& p, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(p.batch * p.heads);
    if (blocks == 0) return;
    bool aligned = p.head_dim % kVector<S> == 0;
    for (const void* rows : {p.window_key, p.window_value, p.landmark_key, p.landmark_value})
        aligned &= reinterpret_cast<uintptr_t>(rows) % sizeof(Vector<S>) == 0;
    static LimitsOf limits_of;
    limits_of(decode_step_kernel<S, kDim>);
    decode_step_kernel<S, kDim>
        <<<blocks, kDecodeThreads<S>, sizeof(DecodeShared<S, kDim>), stream>>>(p, aligned);
}

} // namespace

void decode_step(DType dtype, const DecodeParams& p, cudaStream_t stream) {
    switch (dtype) {
    case DType::kFloat:
        return launch_decode_step<float>(p, stream);
    case DType::kDouble:
        return launch_decode_step<double>(p, stream);
    case DType::kBFloat16:
        return p.head_dim <= 128 ? launch_decode_step<__nv_bfloat16, 128>(p, stream)
                                 : launch_decode_step<__nv_bfloat16>(p, stream);
    case DType::kHalf:
        return p.head_dim <= 128 ? launch_decode_step<__half, 128>(p, stream)
                                 : launch_decode_step<__half>(p, stream);
    }
}

} // namespace eva_attn::cuda::simt
