// Summaries of chunks, forward and backward, one block each; and what a member token gets from the gradients
// of its chunks.
#pragma once

#include "kernels/cuda/simt/kernels.h"
#include "kernels/cuda/simt/warp.cuh"

namespace eva_attn::cuda::simt {

template <class T>
struct SummaryShared {
    T warp_rows[kWarps][kMaxHeadDim];
    double warp_numbers[kWarps];
    T key_mean[kMaxHeadDim], query_mean[kMaxHeadDim];
    T key_hat[kMaxHeadDim], query_hat[kMaxHeadDim];
    T landmark_key[kMaxHeadDim], landmark_query[kMaxHeadDim];
    T omega[kMaxHeadDim];
};

template <class T>
struct SummaryGradients {
    T landmark_key[kMaxHeadDim], landmark_query[kMaxHeadDim];
    T beta[kMaxHeadDim];
    T omega[kMaxHeadDim];
    T linear[kMaxHeadDim];
};

// Call body(d) for the channels of a thread, and of a lane: few, so that these loops are not unrolled.
template <class Body>
__device__ void for_own_channels(int head_dim, Body body) {
#pragma unroll 1
    for (int d = threadIdx.x; d < head_dim; d += kThreads) body(d);
}
template <class Body>
__device__ void for_lane_channels(int head_dim, Body body) {
#pragma unroll 1
    for (int d = lane(); d < head_dim; d += kLanes) body(d);
}

// Sums of the warps' rows and numbers, always in the same order. All end in a barrier.
template <class T>
__device__ void block_sum(SummaryShared<T>& s, int head_dim, T* sum) {
    __syncthreads();
    for_own_channels(head_dim, [&](int d) {
        T total = 0;
        for (int w = 0; w < kWarps; ++w) total += s.warp_rows[w][d];
        sum[d] = total;
    });
    __syncthreads();
}
template <class T, class Number>
__device__ Number block_sum(SummaryShared<T>& s, Number x) {
    if (lane() == 0) s.warp_numbers[warp()] = x;
    __syncthreads();
    Number total = 0;
    for (int w = 0; w < kWarps; ++w) total += static_cast<Number>(s.warp_numbers[w]);
    __syncthreads();
    return total;
}
template <class T, class Number>
__device__ Number block_max(SummaryShared<T>& s, Number x) {
    if (lane() == 0) s.warp_numbers[warp()] = x;
    __syncthreads();
    Number most = static_cast<Number>(s.warp_numbers[0]);
    for (int w = 1; w < kWarps; ++w) most = max(most, static_cast<Number>(s.warp_numbers[w]));
    __syncthreads();
    return most;
}

// A chunk, and its valid members dealt to the warps.
struct Chunk {
    int64_t index; // among all B H C
    int64_t batch, head;
    Box box;

    __device__ Chunk(const Shape& shape, int64_t index)
        : index(index), batch(index / shape.geometry.num_chunks() / shape.heads),
          head(index / shape.geometry.num_chunks() % shape.heads),
          box(shape.geometry.chunk_box(index % shape.geometry.num_chunks())) {}

    template <class Body>
    __device__ void for_members(const SummaryParams& p, Body body) const {
        const Geometry& g = p.shape.geometry;
        const int width = static_cast<int>(box.width()), count = static_cast<int>(box.height()) * width;
        for (int m = warp(); m < count; m += kWarps) {
            const int64_t token = g.token(box.y0 + m / width, box.x0 + m % width);
            if (!is_padding(p.key_padding_mask, g, batch, token)) body(token);
        }
    }
};

// landmark = A(mean); returns 1 / the LayerNorm's deviation. `hat` holds its normalised input.
template <class S, class T = Accumulator<S>>
__device__ T project(const Projection& a, bool has_projection, double eps, int head_dim, const T* mean,
                     T* hat, T* landmark) {
    if (!has_projection) {
        for_own_channels(head_dim, [&](int d) { landmark[d] = mean[d]; });
        __syncthreads();
        return 1;
    }
    for (int row = warp(); row < head_dim; row += kWarps) {
        T sum = 0;
        for (int d = lane(); d < head_dim; d += kLanes)
            sum += weight_at<S>(a.dtype, a.weight, static_cast<int64_t>(row) * head_dim + d) * mean[d];
        sum = warp_sum(sum);
        if (lane() == 0) landmark[row] = sum + (a.bias ? weight_at<S>(a.dtype, a.bias, row) : T(0));
    }
    __syncthreads();
    if (!a.norm_weight) return 1;
    T center = 0, variance = 0;
    for_lane_channels(head_dim, [&](int d) { center += landmark[d]; });
    center = warp_sum(center) / static_cast<T>(head_dim);
    for_lane_channels(head_dim, [&](int d) { variance += (landmark[d] - center) * (landmark[d] - center); });
    variance = warp_sum(variance) / static_cast<T>(head_dim);
    const T rstd = T(1) / sqrt(variance + static_cast<T>(eps));
    __syncthreads(); // the rows above are read by every warp
    for_own_channels(head_dim, [&](int d) {
        hat[d] = (landmark[d] - center) * rstd;
        landmark[d] = hat[d] * weight_at<S>(a.dtype, a.norm_weight, d) +
                      (a.norm_bias ? weight_at<S>(a.dtype, a.norm_bias, d) : T(0));
    });
    __syncthreads();
    return rstd;
}

// omega = c_mu (q~ + k~) + noise.
template <class T>
__device__ void make_omega(const SummaryParams& p, bool has_mu, int64_t chunk, SummaryShared<T>& s) {
    const int head_dim = static_cast<int>(p.shape.head_dim);
    for_own_channels(head_dim, [&](int d) {
        const T mu = has_mu ? static_cast<T>(p.mu_scale) * (s.landmark_query[d] + s.landmark_key[d]) : T(0);
        s.omega[d] = mu + (p.noise ? static_cast<const T*>(p.noise)[chunk * head_dim + d] : T(0));
        if (p.omega_rows) static_cast<T*>(p.omega_rows)[chunk * head_dim + d] = s.omega[d];
    });
    __syncthreads();
}

template <class S, class A, class B>
__device__ Exact<S> exact_dot(const A& a, const B& b, int head_dim) {
    Exact<S> sum = 0;
    for (int d = lane(); d < head_dim; d += kLanes) sum += static_cast<Exact<S>>(a[d]) * b[d];
    return warp_sum(sum);
}
template <class S, class Omega, class Key>
__device__ Exact<S> chunk_logit(double scale, bool tangent, const Omega& omega, const Key& key,
                                int head_dim) {
    Exact<S> product = 0, norm = 0;
    for (int d = lane(); d < head_dim; d += kLanes) {
        const Exact<S> k = key[d];
        product += omega[d] * k;
        norm += k * k;
    }
    return static_cast<Exact<S>>(scale) * (warp_sum(product) - (tangent ? 0 : warp_sum(norm) / 2));
}

// A softmax over the members of a chunk, of which each warp sees some.
template <class S, class T = Accumulator<S>>
struct Softmax {
    Exact<S> maximum = -infinity<Exact<S>>();
    T total = 0;
    T weight = 0, correction = 0; // of the latest member, and of what was added before it

    __device__ void add(Exact<S> logit) {
        const Exact<S> top = max(maximum, logit);
        correction = exp(static_cast<T>(maximum - top));
        weight = exp(static_cast<T>(logit - top));
        total = total * correction + weight;
        maximum = top;
    }
    // Makes the warps' maxima one, and their total.
    __device__ void join(SummaryShared<T>& s) {
        const Exact<S> top = block_max(s, maximum);
        correction = total > 0 ? exp(static_cast<T>(maximum - top)) : T(0);
        total = block_sum(s, total * correction);
        maximum = top;
    }
};

__device__ inline bool has_mu(const SummaryParams& p) { return !p.has_projection || p.has_query_projection; }

template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) chunk_summary_fwd_kernel(const SummaryParams p) {
    __shared__ SummaryShared<T> s;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const Chunk chunk(p.shape, blockIdx.x);
    const auto load = [&](const Rows& rows, int64_t token) {
        return row_of<S>(rows, chunk.batch, chunk.head, token);
    };
    T* const warp_row = s.warp_rows[warp()];

    T count = 0;
    chunk.for_members(p, [&](int64_t) { count += 1; });
    count = block_sum(s, count);
    const T divisor = p.mean_divisor ? static_cast<T>(p.mean_divisor) : max(count, T(1));
    const auto average = [&](const Rows& rows, T* mean, void* out) {
        for_lane_channels(head_dim, [&](int d) { warp_row[d] = 0; });
        chunk.for_members(p, [&](int64_t token) {
            const Row<S> row = load(rows, token);
            for (int d = lane(); d < head_dim; d += kLanes) warp_row[d] += row[d];
        });
        block_sum(s, head_dim, mean);
        for_own_channels(head_dim, [&](int d) {
            mean[d] /= divisor;
            static_cast<T*>(out)[chunk.index * head_dim + d] = mean[d];
        });
        __syncthreads();
    };
    if (p.tangent) { // its key is made below
        for_own_channels(head_dim, [&](int d) {
            s.landmark_key[d] = static_cast<T*>(p.key_mean)[chunk.index * head_dim + d] = 0;
        });
    } else {
        average(p.key, s.key_mean, p.key_mean);
        project<S>(p.key_projection, p.has_projection, p.norm_eps, head_dim, s.key_mean, s.key_hat,
                   s.landmark_key);
    }
    if (has_mu(p)) {
        average(p.query, s.query_mean, p.query_mean);
        project<S>(p.query_projection, p.has_projection, p.norm_eps, head_dim, s.query_mean, s.query_hat,
                   s.landmark_query);
    } else {
        for_own_channels(head_dim,
                         [&](int d) { static_cast<T*>(p.query_mean)[chunk.index * head_dim + d] = 0; });
    }
    make_omega(p, has_mu(p), chunk.index, s);

    Softmax<S> softmax;
    for_lane_channels(head_dim, [&](int d) { warp_row[d] = 0; });
    chunk.for_members(p, [&](int64_t token) {
        softmax.add(chunk_logit<S>(p.scale, p.tangent, s.omega, load(p.key, token), head_dim));
        const Row<S> value = load(p.value, token);
        for (int d = lane(); d < head_dim; d += kLanes)
            warp_row[d] = warp_row[d] * softmax.correction + softmax.weight * value[d];
    });
    softmax.join(s);
    for_lane_channels(head_dim, [&](int d) { warp_row[d] *= softmax.correction; });
    T* const beta = s.query_mean; // of no use any more
    block_sum(s, head_dim, beta);
    if (p.tangent) {
        const Exact<S> log_total = log(static_cast<Exact<S>>(softmax.total));
        Exact<S> entropy = 0;
        for_lane_channels(head_dim, [&](int d) { warp_row[d] = 0; });
        chunk.for_members(p, [&](int64_t token) {
            const Row<S> key = load(p.key, token);
            const Exact<S> log_weight =
                chunk_logit<S>(p.scale, true, s.omega, key, head_dim) - softmax.maximum - log_total;
            const T weight = exp(static_cast<T>(log_weight));
            entropy -= weight * log_weight;
            for (int d = lane(); d < head_dim; d += kLanes) warp_row[d] += weight * key[d];
        });
        entropy = block_sum(s, entropy);
        block_sum(s, head_dim, s.landmark_key);
        if (threadIdx.x == 0) static_cast<T*>(p.landmark_entropy)[chunk.index] = static_cast<T>(entropy);
    }
    for_own_channels(head_dim, [&](int d) {
        const int64_t at = chunk.index * head_dim + d;
        store(static_cast<S*>(p.landmark_key) + at, s.landmark_key[d]);
        store(static_cast<S*>(p.landmark_value) + at, count > 0 ? beta[d] / softmax.total : T(0));
    });
}

// What the gradients of a projection's parameters are made of, from the row of a chunk on.
template <class T>
struct ProjectionRows {
    T *grad_linear, *hat, *grad_landmark;

    __device__ ProjectionRows(const SummaryParams& p, int projection, int64_t chunk) {
        const int64_t size = p.shape.batch * p.shape.heads * p.shape.geometry.num_chunks() * p.shape.head_dim;
        grad_linear = static_cast<T*>(p.projection_rows) + projection * 3 * size + chunk * p.shape.head_dim;
        hat = grad_linear + size;
        grad_landmark = hat + size;
    }
};

// From the gradient of A's output to that of its input, divided by the mean's divisor.
template <class S, class T = Accumulator<S>>
__device__ void project_backward(const Projection& a, bool has_projection, int head_dim, T rstd, T divisor,
                                 const T* hat, const T* grad_landmark, T* grad_linear,
                                 const ProjectionRows<T>& out, T* mean_out) {
    if (!has_projection) {
        for_own_channels(head_dim, [&](int d) { mean_out[d] = grad_landmark[d] / divisor; });
        return;
    }
    T mean = 0, mean_hat = 0;
    if (a.norm_weight) {
        for_lane_channels(head_dim, [&](int d) {
            const T grad_hat = grad_landmark[d] * weight_at<S>(a.dtype, a.norm_weight, d);
            mean += grad_hat;
            mean_hat += grad_hat * hat[d];
        });
        mean = warp_sum(mean) / static_cast<T>(head_dim);
        mean_hat = warp_sum(mean_hat) / static_cast<T>(head_dim);
    }
    for_own_channels(head_dim, [&](int d) {
        T grad = grad_landmark[d];
        if (a.norm_weight) {
            grad = (grad * weight_at<S>(a.dtype, a.norm_weight, d) - mean - hat[d] * mean_hat) * rstd;
            out.hat[d] = hat[d];
        }
        grad_linear[d] = out.grad_linear[d] = grad;
        out.grad_landmark[d] = grad_landmark[d];
    });
    __syncthreads();
    for_own_channels(head_dim, [&](int d) {
        T sum = 0;
        for (int row = 0; row < head_dim; ++row)
            sum +=
                grad_linear[row] * weight_at<S>(a.dtype, a.weight, static_cast<int64_t>(row) * head_dim + d);
        mean_out[d] = sum / divisor;
    });
    __syncthreads();
}

template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads, 6) chunk_summary_bwd_kernel(const SummaryParams p) {
    __shared__ SummaryShared<T> s;
    __shared__ SummaryGradients<T> gradient;
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const Chunk chunk(p.shape, blockIdx.x);
    const auto chunk_row = [&](void* rows) { return static_cast<T*>(rows) + chunk.index * head_dim; };
    T* const warp_row = s.warp_rows[warp()];

    const int64_t bh = chunk.index / g.num_chunks(), column = chunk.index % g.num_chunks();
    for_own_channels(head_dim, [&](int d) {
        T grad_key = 0, grad_beta = 0;
        for (int64_t piece = 0; piece < p.pieces; ++piece) {
            const int64_t at = ((bh * p.pieces + piece) * p.global_columns + column) * head_dim + d;
            grad_key += static_cast<const T*>(p.grad_landmark_key)[at];
            grad_beta += static_cast<const T*>(p.grad_landmark_value)[at];
        }
        gradient.landmark_key[d] = grad_key;
        gradient.beta[d] = chunk_row(p.grad_beta)[d] = grad_beta;
        s.key_mean[d] = chunk_row(p.key_mean)[d];
        s.query_mean[d] = chunk_row(p.query_mean)[d];
    });
    __syncthreads();
    const T key_rstd = project<S>(p.key_projection, p.has_projection, p.norm_eps, head_dim, s.key_mean,
                                  s.key_hat, s.landmark_key);
    const T query_rstd = has_mu(p) ? project<S>(p.query_projection, p.has_projection, p.norm_eps, head_dim,
                                                s.query_mean, s.query_hat, s.landmark_query)
                                   : T(1);
    make_omega(p, has_mu(p), chunk.index, s);

    // The members' softmax, and the mean of grad_beta . v_j under it.
    const auto load = [&](const Rows& rows, int64_t token) {
        return row_of<S>(rows, chunk.batch, chunk.head, token);
    };
    Exact<S> grad_entropy = 0;
    for (int64_t piece = 0; p.tangent && piece < p.pieces; ++piece)
        grad_entropy +=
            static_cast<const T*>(p.grad_landmark_entropy)[(bh * p.pieces + piece) * g.num_chunks() + column];
    // The gradient of a member's weight, up to what is the same for all.
    const auto grad_weight = [&](int64_t token, const Row<S>& key, Exact<S> logit) {
        Exact<S> grad = exact_dot<S>(gradient.beta, load(p.value, token), head_dim);
        if (p.tangent) grad += exact_dot<S>(gradient.landmark_key, key, head_dim) - grad_entropy * logit;
        return grad;
    };
    Softmax<S> softmax;
    Exact<S> moment = 0;
    T count = 0;
    chunk.for_members(p, [&](int64_t token) {
        const Row<S> key = load(p.key, token);
        const Exact<S> logit = chunk_logit<S>(p.scale, p.tangent, s.omega, key, head_dim);
        softmax.add(logit);
        moment = moment * softmax.correction + softmax.weight * grad_weight(token, key, logit);
        count += 1;
    });
    count = block_sum(s, count);
    const T divisor = p.mean_divisor ? static_cast<T>(p.mean_divisor) : max(count, T(1));
    softmax.join(s);
    moment = block_sum(s, moment * softmax.correction);
    if (count > 0) moment /= softmax.total;

    for_lane_channels(head_dim, [&](int d) { warp_row[d] = 0; });
    chunk.for_members(p, [&](int64_t token) {
        const Row<S> key = load(p.key, token);
        const Exact<S> logit = chunk_logit<S>(p.scale, p.tangent, s.omega, key, head_dim);
        const T weight = exp(static_cast<T>(logit - softmax.maximum)) / softmax.total;
        const T grad_logit =
            static_cast<T>(p.scale) * weight * static_cast<T>(grad_weight(token, key, logit) - moment);
        for (int d = lane(); d < head_dim; d += kLanes) warp_row[d] += grad_logit * key[d];
        if (p.token_weight && lane() == 0) {
            static_cast<T*>(p.token_weight)[bh * g.num_tokens() + token] = weight;
            static_cast<T*>(p.token_grad)[bh * g.num_tokens() + token] = grad_logit;
        }
    });
    block_sum(s, head_dim, gradient.omega);
    for_own_channels(head_dim, [&](int d) {
        const T grad_mu = has_mu(p) ? static_cast<T>(p.mu_scale) * gradient.omega[d] : T(0);
        if (!p.tangent) gradient.landmark_key[d] += grad_mu;
        gradient.landmark_query[d] = grad_mu;
        chunk_row(p.omega)[d] = s.omega[d];
        if (!has_mu(p)) chunk_row(p.grad_query_mean)[d] = 0;
    });
    if (threadIdx.x == 0) {
        Exact<S>* const stats = static_cast<Exact<S>*>(p.chunk_stats) + chunk.index * 2;
        stats[0] = softmax.maximum + log(static_cast<Exact<S>>(softmax.total));
        stats[1] = moment;
        if (p.tangent) static_cast<T*>(p.grad_entropy)[chunk.index] = static_cast<T>(grad_entropy);
    }
    __syncthreads();
    project_backward<S>(p.key_projection, p.has_projection, head_dim, key_rstd, p.tangent ? T(1) : divisor,
                        s.key_hat, gradient.landmark_key, gradient.linear,
                        ProjectionRows<T>(p, 0, chunk.index), chunk_row(p.grad_key_mean));
    if (has_mu(p))
        project_backward<S>(p.query_projection, p.has_projection, head_dim, query_rstd, divisor, s.query_hat,
                            gradient.landmark_query, gradient.linear, ProjectionRows<T>(p, 1, chunk.index),
                            chunk_row(p.grad_query_mean));
}

// Summands of the gradients of the projections' parameters: a warp takes kWeightRows rows of a Linear's
// weight, or the three vectors, over a slice of the channels and the chunks of a piece.
constexpr int kWeightRows = 4;

template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) projection_gradients_kernel(const SummaryParams p) {
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int tasks = detail::ceil_div(head_dim, kWeightRows) + 1;
    const int64_t pieces = p.projection_pieces;
    int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
    const int row = static_cast<int>(index % tasks) * kWeightRows;
    const int projection = static_cast<int>((index /= tasks) % 2);
    const int64_t piece = (index /= 2) % pieces;
    const int first = static_cast<int>(index / pieces) * kSlice<T>;
    if (first >= head_dim || (projection == 1 && !p.has_query_projection)) return;
    const bool vectors = row >= head_dim;
    const int64_t chunks = p.shape.batch * p.shape.heads * p.shape.geometry.num_chunks();
    const T* const means = static_cast<const T*>(projection ? p.query_mean : p.key_mean);

    Exact<S> sums[kWeightRows][kPerLane<T>] = {};
    for (int64_t chunk = chunks * piece / pieces; chunk < chunks * (piece + 1) / pieces; ++chunk) {
        const ProjectionRows<T> rows(p, projection, chunk);
        for_slice<T>(first, head_dim, [&](int i, int d) {
            if (vectors) {
                sums[0][i] += rows.grad_linear[d];
                sums[1][i] += rows.grad_landmark[d] * rows.hat[d];
                sums[2][i] += rows.grad_landmark[d];
                return;
            }
            const Exact<S> mean = means[chunk * head_dim + d];
#pragma unroll
            for (int r = 0; r < kWeightRows; ++r)
                sums[r][i] += rows.grad_linear[min(row + r, head_dim - 1)] * mean;
        });
    }
    T* const out = static_cast<T*>(p.grad_projections) + (piece * 2 + projection) * (head_dim + 3) * head_dim;
#pragma unroll
    for (int r = 0; r < kWeightRows; ++r) {
        const int at = vectors ? head_dim + r : row + r;
        if (at < (vectors ? head_dim + 3 : head_dim))
            for_slice<T>(first, head_dim,
                         [&](int i, int d) { out[at * head_dim + d] = static_cast<T>(sums[r][i]); });
    }
}

// Calls body(index among all B H C) for the chunks that a token is a member of.
template <class Body>
__device__ void for_chunks_of(const Geometry& g, int64_t bh, int64_t token, Body body) {
    const int64_t position = token - g.num_prefix_tokens;
    const Box chunks = g.chunks_of(position / g.grid_width, position % g.grid_width);
    for (int64_t cy = chunks.y0; cy < chunks.y1; ++cy)
        for (int64_t cx = chunks.x0; cx < chunks.x1; ++cx)
            body(bh * g.num_chunks() + cy * g.chunk_columns() + cx);
}

// Element d of the row that a chunk has in one of the terms.
template <class S, class T = Accumulator<S>>
__device__ T chunk_term(const ChunkTerms& terms, const void* rows, int64_t chunk, int head_dim, int d) {
    const int64_t at = chunk * head_dim + d;
    return terms.rounded ? static_cast<T>(static_cast<const S*>(rows)[at]) : static_cast<const T*>(rows)[at];
}

// Adds to a slice of the gradients of one valid token of the grid what its chunks' gradients pass on: to
// those of its key and value, and of its query.
template <class S, class Key, class Value, class T = Accumulator<S>>
__device__ void add_key_value_terms(const Geometry& g, const ChunkTerms& terms, double scale, int64_t bh,
                                    int64_t token, int first, int head_dim, const Key& key,
                                    const Value& value, SliceRow<T>& grad_key, SliceRow<T>& grad_value) {
    for_chunks_of(g, bh, token, [&](int64_t chunk) {
        const auto term = [&](const void* rows, int d) {
            return chunk_term<S>(terms, rows, chunk, head_dim, d);
        };
        const bool tangent = terms.grad_entropy;
        T weight, grad_logit;
        if (terms.token_weight) {
            weight = static_cast<const T*>(terms.token_weight)[bh * g.num_tokens() + token];
            grad_logit = static_cast<const T*>(terms.token_grad)[bh * g.num_tokens() + token];
        } else { // where terms are not rounded
            const auto chunk_row = [&](const void* rows) {
                return static_cast<const T*>(rows) + chunk * head_dim;
            };
            const T *const omega = chunk_row(terms.omega), *const grad_beta = chunk_row(terms.grad_beta),
                           *const grad_mean = chunk_row(terms.grad_key_mean);
            const auto* const stats = static_cast<const Exact<S>*>(terms.chunk_stats) + chunk * 2;
            const Exact<S> logit = chunk_logit<S>(scale, tangent, omega, key, head_dim);
            weight = exp(static_cast<T>(logit - stats[0]));
            Exact<S> grad_weight = exact_dot<S>(grad_beta, value, head_dim);
            if (tangent)
                grad_weight += exact_dot<S>(grad_mean, key, head_dim) -
                               static_cast<const T*>(terms.grad_entropy)[chunk] * logit;
            grad_logit = static_cast<T>(scale) * weight * static_cast<T>(grad_weight - stats[1]);
        }
        for_slice<T>(first, head_dim, [&](int i, int d) {
            grad_value.x[i] += weight * term(terms.grad_beta, d);
            const T omega = term(terms.omega, d), grad_mean = term(terms.grad_key_mean, d);
            grad_key.x[i] +=
                tangent ? grad_logit * omega + weight * grad_mean : grad_logit * (omega - key[d]) + grad_mean;
        });
    });
}
template <class S, class T = Accumulator<S>>
__device__ void add_query_terms(const Geometry& g, const ChunkTerms& terms, int64_t bh, int64_t token,
                                int first, int head_dim, SliceRow<T>& grad_query) {
    for_chunks_of(g, bh, token, [&](int64_t chunk) {
        for_slice<T>(first, head_dim, [&](int i, int d) {
            grad_query.x[i] += chunk_term<S>(terms, terms.grad_query_mean, chunk, head_dim, d);
        });
    });
}

// The chunk terms alone, one token a warp.
template <class S, class T = Accumulator<S>>
__global__ void __launch_bounds__(kThreads) chunk_terms_kernel(const TermsParams p) {
    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
    const int64_t bh = index / g.num_tokens(), token = index % g.num_tokens();
    const int64_t batch = bh / p.shape.heads, head = bh % p.shape.heads;
    if (batch >= p.shape.batch) return;
    const auto row = [&](const Rows& rows) { return row_of<S>(rows, batch, head, token); };
    const bool member = token >= g.num_prefix_tokens && !is_padding(p.key_padding_mask, g, batch, token);
    for (int first = 0; first < head_dim; first += kSlice<T>) {
        SliceRow<T> grad_query, grad_key, grad_value;
        if (member) {
            add_query_terms<S>(g, p.chunk_terms, bh, token, first, head_dim, grad_query);
            add_key_value_terms<S>(g, p.chunk_terms, p.scale, bh, token, first, head_dim, row(p.key),
                                   row(p.value), grad_key, grad_value);
        }
        for_slice<T>(first, head_dim, [&](int i, int d) {
            row(p.grad_query).set(d, grad_query.x[i]);
            row(p.grad_key).set(d, grad_key.x[i]);
            row(p.grad_value).set(d, grad_value.x[i]);
        });
    }
}

inline int64_t num_chunks(const Shape& shape) {
    return shape.batch * shape.heads * shape.geometry.num_chunks();
}

template <class S>
void Kernels<S>::chunk_summary_fwd(const SummaryParams& p, cudaStream_t stream) {
    launch(chunk_summary_fwd_kernel<S>, num_chunks(p.shape), 0, stream, p);
}
template <class S>
void Kernels<S>::chunk_summary_bwd(const SummaryParams& p, cudaStream_t stream) {
    launch(chunk_summary_bwd_kernel<S>, num_chunks(p.shape), 0, stream, p);
    if (!p.has_projection) return;
    const int64_t tasks = detail::ceil_div(p.shape.head_dim, kWeightRows) + 1;
    const int64_t slices = detail::ceil_div(p.shape.head_dim, kSlice<Accumulator<S>>);
    launch(projection_gradients_kernel<S>, detail::ceil_div(slices * p.projection_pieces * 2 * tasks, kWarps),
           0, stream, p);
}
template <class S>
void Kernels<S>::chunk_terms(const TermsParams& p, cudaStream_t stream) {
    const int64_t rows = p.shape.batch * p.shape.heads * p.shape.geometry.num_tokens();
    launch(chunk_terms_kernel<S>, detail::ceil_div(rows, kWarps), 0, stream, p);
}

} // namespace eva_attn::cuda::simt
