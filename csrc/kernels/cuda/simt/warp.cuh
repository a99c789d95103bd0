// Numbers, rows of them in memory, and what the lanes of a warp do together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda::simt {

constexpr int kLanes = 32;
constexpr int kWarps = 4; // of a block
constexpr int kThreads = kWarps * kLanes;

template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Of sums in which large numbers cancel, so that their rounding is none beside that of S.
template <class S>
using Exact = std::conditional_t<sizeof(S) == 2, float, double>;

template <class T>
__device__ constexpr T infinity() {
    return static_cast<T>(INFINITY);
}

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void store(double* to, double x) { *to = x; }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kLanes; }

template <class T>
__device__ T warp_sum(T x) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
template <class T>
__device__ T warp_max(T x) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

// Channels that a warp accumulates in registers: lane l has first + l, first + l + 32, ...
template <class T>
constexpr int kSlice = 256 / sizeof(T);
template <class T>
constexpr int kPerLane = kSlice<T> / kLanes;
template <class T>
struct SliceRow {
    T x[kPerLane<T>] = {};
};

// Calls body(i, d) for the channels d of a slice that this lane has as its i-th.
template <class T, class Body>
__device__ void for_slice(int first, int head_dim, Body body) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
        const int d = first + i * kLanes + lane();
        if (d < head_dim) body(i, d);
    }
}

// A row of D numbers in memory; data null: no row.
template <class S>
struct Row {
    S* data;
    int64_t stride;

    __device__ Accumulator<std::remove_const_t<S>> operator[](int d) const { return widen(data[d * stride]); }
    __device__ void set(int d, Accumulator<std::remove_const_t<S>> x) const { store(data + d * stride, x); }
};

template <class S>
__device__ Row<S> row_of(const Rows& rows, int64_t batch, int64_t head, int64_t token) {
    return {static_cast<S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride +
                token * rows.token_stride,
            rows.dim_stride};
}

// An element of a parameter, which is in float or in the tensors' dtype.
template <class S, class T = Accumulator<S>>
__device__ T weight_at(DType dtype, const void* parameter, int64_t i) {
    if (dtype == DType::kFloat) return static_cast<T>(static_cast<const float*>(parameter)[i]);
    return widen(static_cast<const S*>(parameter)[i]);
}

// Launches nothing where there is nothing to do.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    if (blocks > 0) kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(arguments...);
}

__device__ inline bool is_padding(const bool* mask, const Geometry& g, int64_t batch, int64_t token) {
    return mask && mask[batch * g.num_tokens() + token];
}

} // namespace eva_attn::cuda::simt
