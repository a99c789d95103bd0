// The chunks' projections as products of matrices whose factors are sums of two bfloat16, which makes them as
// exact as products of floats are, but for the last few bits.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

// Two floats as sums of two bfloat16.
struct SplitPair {
    uint32_t high, low;
};
__device__ inline SplitPair split(float x, float y) {
    const uint32_t high = pack<__nv_bfloat16>(x, y);
    const float2 rounded = unpack<__nv_bfloat16>(high);
    return SplitPair{high, pack<__nv_bfloat16>(x - rounded.x, y - rounded.y)};
}

template <class S>
__device__ inline float parameter(const Projection& a, const void* data, int i) {
    if (a.dtype == DType::kFloat) return static_cast<const float*>(data)[i];
    return static_cast<float>(static_cast<const S*>(data)[i]);
}

// Rows of floats as sums of two bfloat16, kHeadDim high halves and then as many low ones; their place may
// hold the floats themselves.
template <int kHeadDim>
struct SplitRows {
    static constexpr int kUnits = kHeadDim / 8;
    using Halves = Tile<__nv_bfloat16, 2 * kHeadDim>;

    static constexpr int kRowBytes = 4 * kHeadDim, kLowBytes = 2 * kHeadDim;

    Halves halves; // starts at a multiple of kRowBytes

    // Of units 2 n and 2 n + 1 further than `unit`, an even one or the next, the addresses are ^ 32 n.
    __device__ uint32_t address(int row, int unit) const { return shared_address(halves.unit(row, unit)); }
    __device__ void store(int row, int column, const Float8& x) const {
        SplitPair pair[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pair[i] = split(x.x[2 * i], x.x[2 * i + 1]);
        *reinterpret_cast<uint4*>(halves.unit(row, column / 8)) =
            uint4{pair[0].high, pair[1].high, pair[2].high, pair[3].high};
        *reinterpret_cast<uint4*>(halves.unit(row, kUnits + column / 8)) =
            uint4{pair[0].low, pair[1].low, pair[2].low, pair[3].low};
    }
    __device__ float* floats(int row, int column) const {
        return reinterpret_cast<float*>(halves.unit(row, column / 4)) + column % 4;
    }
    __device__ Float8 load_floats(int row, int column) const {
        Float8 x;
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            *reinterpret_cast<float4*>(x.x + i) = *reinterpret_cast<const float4*>(floats(row, column + i));
        return x;
    }
};

// C += A B, but for the product of the low halves: n8 columns of B from its column tile `n` of two.
__device__ inline void multiply_add_split(float (&c)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[2][4],
                                          int n) {
    multiply_add<__nv_bfloat16>(c, a[1], b[0][2 * n], b[0][2 * n + 1]);
    multiply_add<__nv_bfloat16>(c, a[0], b[1][2 * n], b[1][2 * n + 1]);
    multiply_add<__nv_bfloat16>(c, a[0], b[0][2 * n], b[0][2 * n + 1]);
}

// A W^T, or A W: 16 kRowTiles rows, 16 columns from `column` onward.
template <bool kTransposed, int kHeadDim, int kRowTiles>
__device__ inline void multiply_weight(float (&y)[kRowTiles][2][4], SplitRows<kHeadDim> a,
                                       SplitRows<kHeadDim> weight, int column) {
    using Rows = SplitRows<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t a_rows = a.address(lane % 16, lane / 16);
    const uint32_t b_rows = kTransposed ? weight.address(column + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                                        : weight.address(lane % 16, column / 8 + lane / 16);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) y[r][i / 4][i % 4] = 0;
#pragma unroll 4
    for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t b[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            kTransposed
                ? load_matrix(b[half], (b_rows ^ 32 * k) + half * Rows::kLowBytes)
                : load_matrix_transposed(b[half], b_rows + 16 * k * Rows::kRowBytes + half * Rows::kLowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            uint32_t from_a[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_matrix(from_a[half],
                            (a_rows ^ 32 * k) + 16 * r * Rows::kRowBytes + half * Rows::kLowBytes);
            multiply_add_split(y[r][0], from_a, b, 0);
            multiply_add_split(y[r][1], from_a, b, 1);
        }
    }
}

// Leaves such a product as floats.
template <int kHeadDim, int kRowTiles>
__device__ inline void store_product(SplitRows<kHeadDim> to, const float (&y)[kRowTiles][2][4], int column) {
    const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<float2*>(to.floats(16 * r + group + 4 * e, column + 8 * n + pair)) =
                    make_float2(y[r][n][e], y[r][n][e + 1]);
}

// A row, eight columns of which each of kLanes lanes holds, becomes its deviation from its mean over its
// standard deviation, whose reciprocal is returned.
template <int kLanes>
__device__ inline float standardise(Float8& x, bool inside, float reciprocal_dim, float eps) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.x[i];
    const float center = lanes_sum<kLanes>(sum) * reciprocal_dim;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x.x[i] = inside ? x.x[i] - center : 0.0f;
        squares += x.x[i] * x.x[i];
    }
    const float rstd = rsqrtf(lanes_sum<kLanes>(squares) * reciprocal_dim + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.x[i] *= rstd;
    return rstd;
}

// A projection in shared memory.
template <int kHeadDim>
struct ProjectionWeights {
    alignas(4 * kHeadDim) __nv_bfloat16 linear_data[2 * kHeadDim * kHeadDim];
    float bias[kHeadDim], norm_weight[kHeadDim], norm_bias[kHeadDim];

    __device__ SplitRows<kHeadDim> linear() const { return {{const_cast<__nv_bfloat16*>(linear_data)}}; }

    // From the product with the Linear's weight to the projection.
    template <int kLanes>
    __device__ void finish(Float8& x, int column, bool inside, float reciprocal_dim, float eps,
                           bool norm) const {
        const Float8 b = load8(bias + column), scale = load8(norm_weight + column),
                     shift = load8(norm_bias + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.x[i] += b.x[i];
        if (norm) standardise<kLanes>(x, inside, reciprocal_dim, eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.x[i] = x.x[i] * scale.x[i] + shift.x[i];
    }

    template <class S, int kThreads>
    __device__ void load(const Projection& a, int head_dim) {
        constexpr int kLanes = kHeadDim / 8, kRows = kThreads / kLanes, kCount = kHeadDim / kRows;
        const int column = threadIdx.x % kLanes * 8;
        const auto load_linear = [&](const auto* weight) {
            Float8 x[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const int row = threadIdx.x / kLanes + i * kRows;
                x[i] =
                    row < head_dim && column < head_dim ? load8(weight + row * head_dim + column) : Float8{};
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) linear().store(threadIdx.x / kLanes + i * kRows, column, x[i]);
        };
        a.dtype == DType::kFloat ? load_linear(static_cast<const float*>(a.weight))
                                 : load_linear(static_cast<const S*>(a.weight));
        static_assert(kThreads >= kHeadDim);
        if (const int i = threadIdx.x; i < kHeadDim) {
            const auto value = [&](const void* data, float otherwise) {
                return data && i < head_dim ? parameter<S>(a, data, i) : otherwise;
            };
            bias[i] = value(a.bias, 0);
            norm_weight[i] = value(a.norm_weight, 1);
            norm_bias[i] = value(a.norm_bias, 0);
        }
    }
};

} // namespace eva_attn::cuda::mma
