// Causal decoding: one block a (batch, head), which takes in its tokens one by one.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/simt/warp.cuh"

namespace eva_attn::cuda::simt {
namespace {

// Registers are short in double.
template <class S>
constexpr int kDecodeWarps = sizeof(S) == sizeof(double) ? 8 : 16;
template <class S>
constexpr int kDecodeThreads = kDecodeWarps<S> * kLanes;
constexpr int kChannels = kMaxHeadDim / kLanes; // of a lane
constexpr int kUnroll = 4;                      // rows that a lane has in flight

// Lanes that share a row of D numbers: as few as hold it. A lane has kVector channels side by side, then the
// next ones `width` lanes further.
template <class S, int kVector>
struct LaneGroup {
    using T = Accumulator<S>;
    int head_dim, width, lane, index, count; // of the groups in the block

    __device__ explicit LaneGroup(int head_dim) : head_dim(head_dim), width(1) {
        while (width * kChannels < head_dim) width *= 2;
        lane = simt::lane() % width;
        index = static_cast<int>(threadIdx.x) / width;
        count = kDecodeThreads<S> / width;
    }

    // Calls body(i, d) for the first channel of each vector: this lane's i-th is channel d.
    template <class Body>
    __device__ void for_vectors(Body body) const {
#pragma unroll
        for (int i = 0; i < kChannels; i += kVector) {
            const int d = i * width + lane * kVector;
            if (d < head_dim) body(i, d);
        }
    }

    // This lane's channels of a row, as they are in memory.
    struct alignas(kVector * sizeof(S)) Vector {
        S x[kVector];
    };
    struct Channels {
        Vector vector[kChannels / kVector];
        __device__ T operator[](int i) const { return widen(vector[i / kVector].x[i % kVector]); }
    };
    __device__ Channels load(const S* row) const {
        Channels channels{};
        for_vectors(
            [&](int i, int d) { channels.vector[i / kVector] = *reinterpret_cast<const Vector*>(row + d); });
        return channels;
    }

    template <class Number>
    __device__ Number sum(Number x) const {
        for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
        return x;
    }
};

// A softmax over rows, and the sum of their values that it weighs. A is the type of the logits.
template <class A, class T>
struct Softmax {
    A maximum = -infinity<A>();
    T total = 0;
    T sum[kChannels] = {};

    // exp(logit - top), also where both are -infinity.
    static __device__ T factor(A logit, A top) {
        return logit == -infinity<A>() ? T(0) : exp(static_cast<T>(logit - top));
    }
};

template <class S>
struct DecodeShared {
    using T = Accumulator<S>;
    T query[kMaxHeadDim], mean[kMaxHeadDim];
    T landmark_key[kMaxHeadDim], landmark_query[kMaxHeadDim];
    T warp_sums[kDecodeWarps<S>][kMaxHeadDim];
    double warp_maxima[kDecodeWarps<S>];
    T warp_totals[kDecodeWarps<S>];
    double log_sum; // of the exponentials of the latest softmax
};

template <class S, int kVector>
struct DecodingHead {
    using T = Accumulator<S>;
    const DecodeParams& p;
    DecodeShared<S>& s;
    const LaneGroup<S, kVector> group;
    const int64_t bh, batch, head;
    const int head_dim, slots;

    __device__ DecodingHead(const DecodeParams& p, DecodeShared<S>& s)
        : p(p), s(s), group(static_cast<int>(p.head_dim)), bh(blockIdx.x), batch(bh / p.heads),
          head(bh % p.heads), head_dim(static_cast<int>(p.head_dim)),
          slots(static_cast<int>(p.window_size + p.overlap)) {}

    __device__ S* slot(void* window, int i) const {
        return static_cast<S*>(window) + (bh * slots + i) * head_dim;
    }
    __device__ S* landmark(void* landmarks, int64_t chunk) const {
        return static_cast<S*>(landmarks) + (bh * p.num_landmarks + chunk) * head_dim;
    }
    __device__ int wrapped(int i) const { return i < slots ? i : i - slots; }

    template <class Body>
    __device__ void for_channels(Body body) const {
        for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kDecodeThreads<S>) body(d);
        __syncthreads();
    }

    __device__ void append(int64_t token, int64_t position) const {
        const auto query = row_of<S>(p.query, batch, head, token), key = row_of<S>(p.key, batch, head, token),
                   value = row_of<S>(p.value, batch, head, token);
        const int to = static_cast<int>(position % slots);
        S *const key_slot = slot(p.window_key, to), *const value_slot = slot(p.window_value, to);
        T* const key_sum = static_cast<T*>(p.key_sum) + bh * head_dim;
        T* const query_sum = static_cast<T*>(p.query_sum) + bh * head_dim;
        const bool begins = position % p.chunk_size == 0;
        for_channels([&](int d) { // all loads before the first store, which they might depend on
            const S new_key = key.data[d * key.stride], new_value = value.data[d * value.stride];
            const T new_query = query[d];
            const T old_key_sum = key_sum[d], old_query_sum = query_sum[d];
            key_slot[d] = new_key;
            value_slot[d] = new_value;
            s.query[d] = new_query;
            key_sum[d] = (begins ? T(0) : old_key_sum) + widen(new_key);
            query_sum[d] = (begins ? T(0) : old_query_sum) + new_query;
        });
    }

    // The softmax over rows [0, count) of scale * (sum of term(x_d, key_d)) + bias(j), for the vector `x`;
    // calls out(d, sum of weight * value).
    template <class A, class Row, class Bias, class Term, class Out>
    __device__ void attend(const T* vector, int count, A scale, Row row, Bias bias, Term term,
                           Out out) const {
        T x[kChannels];
        group.for_vectors([&](int i, int d) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) x[i + k] = vector[d + k];
        });
        Softmax<A, T> softmax;
        for (int base = 0; base < count; base += kUnroll * group.count) {
            typename LaneGroup<S, kVector>::Channels keys[kUnroll], values[kUnroll];
            A logits[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) { // the last row again where there are no more
                const auto [key, value] = row(min(base + u * group.count + group.index, count - 1));
                keys[u] = group.load(key);
                values[u] = group.load(value);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int j = base + u * group.count + group.index;
                logits[u] = j < count ? static_cast<A>(bias(j)) : -infinity<A>();
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                A sum = 0;
                group.for_vectors([&](int i, int) {
#pragma unroll
                    for (int k = 0; k < kVector; ++k) sum += term(static_cast<A>(x[i + k]), keys[u][i + k]);
                });
                logits[u] += scale * group.sum(sum);
            }
            A top = softmax.maximum;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) top = max(top, logits[u]);
            const T correction = Softmax<A, T>::factor(softmax.maximum, top);
            softmax.maximum = top;
            softmax.total *= correction;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) softmax.sum[i] *= correction;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                if (base + u * group.count + group.index >= count) continue;
                const T weight = Softmax<A, T>::factor(logits[u], top);
                softmax.total += weight;
#pragma unroll
                for (int i = 0; i < kChannels; ++i) softmax.sum[i] += weight * values[u][i];
            }
        }
        join(softmax, out);
    }

    // Adds up the softmaxes of all groups, always in the same order.
    template <class A, class Out>
    __device__ void join(Softmax<A, T> softmax, Out out) const {
        constexpr auto factor = Softmax<A, T>::factor;
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
            group.for_vectors([&](int i, int d) {
#pragma unroll
                for (int k = 0; k < kVector; ++k) s.warp_sums[warp()][d + k] = softmax.sum[i + k];
            });
        if (lane() == 0) s.warp_maxima[warp()] = softmax.maximum, s.warp_totals[warp()] = softmax.total;
        __syncthreads();
        A top = -infinity<A>();
        for (int w = 0; w < kDecodeWarps<S>; ++w) top = max(top, static_cast<A>(s.warp_maxima[w]));
        for_channels([&](int d) {
            T total = 0, sum = 0;
            for (int w = 0; w < kDecodeWarps<S>; ++w) {
                const T weight = factor(static_cast<A>(s.warp_maxima[w]), top);
                total += s.warp_totals[w] * weight;
                sum += s.warp_sums[w][d] * weight;
            }
            out(d, total == 0 ? T(0) : sum / total);
            if (d == 0) s.log_sum = top + log(static_cast<A>(total));
        });
    }

    struct KeyValue {
        const S *key, *value;
    };

    __device__ void attend_state(int64_t token, int64_t position) const {
        const int64_t first = detail::max(position / p.window_size * p.window_size - p.overlap, 0);
        const int num_keys = static_cast<int>(position + 1 - first);
        const int num_landmarks = static_cast<int>(detail::min(
            p.exclude_window_landmarks ? detail::ceil_div(first, p.chunk_size) : position / p.chunk_size,
            p.num_landmarks));
        const int first_slot = static_cast<int>(first % slots);
        const int64_t bias_start = head * p.relative_bias_head_stride + first - position + slots - 1;
        const T scale = static_cast<T>(p.scale), landmark_bias = static_cast<T>(p.landmark_bias);
        const T* const entropy =
            p.landmark_entropy ? static_cast<const T*>(p.landmark_entropy) + bh * p.num_landmarks : nullptr;
        const auto output = row_of<S>(p.output, batch, head, token);
        attend<T>(
            s.query, num_keys + num_landmarks, scale,
            [&](int j) {
                if (j < num_keys) {
                    const int from = wrapped(first_slot + j);
                    return KeyValue{slot(p.window_key, from), slot(p.window_value, from)};
                }
                return KeyValue{landmark(p.landmark_key, j - num_keys),
                                landmark(p.landmark_value, j - num_keys)};
            },
            [&](int j) {
                if (j >= num_keys) return entropy ? entropy[j - num_keys] : landmark_bias;
                return p.relative_bias ? weight_at<S>(p.relative_bias_dtype, p.relative_bias, bias_start + j)
                                       : T(0);
            },
            [](T query, T key) { return query * key; }, [&](int d, T x) { output.set(d, x); });
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

    // Makes the landmark of the chunk whose last token is at `position`.
    __device__ void end_chunk(int64_t position) const {
        const int64_t chunk = position / p.chunk_size;
        if (chunk >= p.num_landmarks) return;
        const bool tangent = p.landmark_entropy;
        if (!tangent) project(p.key_projection, p.key_sum, s.landmark_key);
        const bool has_mu = !p.has_projection || p.has_query_projection;
        if (has_mu) project(p.query_projection, p.query_sum, s.landmark_query);
        T* const omega = s.landmark_query;
        S* const landmark_key = landmark(p.landmark_key, chunk);
        S* const landmark_value = landmark(p.landmark_value, chunk);
        for_channels([&](int d) {
            if (tangent) return; // omega is the mean query
            store(landmark_key + d, s.landmark_key[d]);
            omega[d] = has_mu ? s.landmark_query[d] + s.landmark_key[d] : T(0);
        });
        const int first_slot = static_cast<int>(chunk * p.chunk_size % slots);
        const auto scale = static_cast<Exact<S>>(p.scale), half = static_cast<Exact<S>>(tangent ? 0 : 0.5);
        const auto sum_members = [&](void* window, auto out) {
            attend<Exact<S>>(
                omega, static_cast<int>(p.chunk_size), scale,
                [&](int j) {
                    const int from = wrapped(first_slot + j);
                    return KeyValue{slot(p.window_key, from), slot(window, from)};
                },
                [](int) { return T(0); },
                [half](Exact<S> omega, T key) { return key * (omega - half * key); }, out);
        };
        sum_members(p.window_value, [&](int d, T x) { store(landmark_value + d, x); });
        if (!tangent) return;
        sum_members(p.window_key, [&](int d, T x) {
            store(landmark_key + d, x);
            s.landmark_key[d] = x;
        });
        if (warp() > 0) return;
        // The mean of the logits, which are linear in the keys, is that of their mean.
        Exact<S> product = 0;
        for (int d = lane(); d < head_dim; d += kLanes)
            product += static_cast<Exact<S>>(omega[d]) * s.landmark_key[d];
        product = warp_sum(product);
        if (lane() == 0)
            static_cast<T*>(p.landmark_entropy)[bh * p.num_landmarks + chunk] =
                static_cast<T>(static_cast<Exact<S>>(s.log_sum) - scale * product);
    }

    __device__ void run() const {
        const int64_t begin = detail::max(p.position[bh], 0);
        const int64_t count =
            p.num_tokens ? detail::min(detail::max(p.num_tokens[batch], 0), p.tokens) : p.tokens;
        __syncthreads(); // every thread has read the position
        for (int64_t token = 0; token < count; ++token) {
            const int64_t position = begin + token;
            append(token, position);
            attend_state(token, position);
            if ((position + 1) % p.chunk_size == 0) end_chunk(position);
        }
        for (int64_t token = count; token < p.tokens; ++token) {
            const auto output = row_of<S>(p.output, batch, head, token);
            for_channels([&](int d) { output.set(d, 0); });
        }
        if (threadIdx.x == 0) p.position[bh] = begin + count;
    }
};

template <class S, int kVector>
__global__ void __launch_bounds__(kDecodeThreads<S>) decode_step_kernel(const DecodeParams p) {
    __shared__ DecodeShared<S> s;
    DecodingHead<S, kVector>(p, s).run();
}

template <class S>
void launch_decode_step(const DecodeParams& p, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(p.batch * p.heads);
    if (blocks == 0) return;
    constexpr int kVector = 16 / sizeof(S);
    bool aligned = p.head_dim % kVector == 0;
    for (const void* rows : {p.window_key, p.window_value, p.landmark_key, p.landmark_value})
        aligned &= reinterpret_cast<uintptr_t>(rows) % 16 == 0;
    const auto kernel = aligned ? decode_step_kernel<S, kVector> : decode_step_kernel<S, 1>;
    kernel<<<blocks, kDecodeThreads<S>, 0, stream>>>(p);
}

} // namespace

void decode_step(DType dtype, const DecodeParams& p, cudaStream_t stream) {
    switch (dtype) {
    case DType::kFloat:
        return launch_decode_step<float>(p, stream);
    case DType::kDouble:
        return launch_decode_step<double>(p, stream);
    case DType::kBFloat16:
        return launch_decode_step<__nv_bfloat16>(p, stream);
    case DType::kHalf:
        return launch_decode_step<__half>(p, stream);
    }
}

} // namespace eva_attn::cuda::simt
