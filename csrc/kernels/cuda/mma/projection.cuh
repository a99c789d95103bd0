// The chunks' projections as products of matrices whose factors are sums of two bfloat16, which makes them as
// exact as products of floats are, but for the last few bits.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

// Two floats as sums of two 16-bit numbers.
struct SplitPair {
    uint32_t high, low;
};
template <class S = __nv_bfloat16>
__device__ inline SplitPair split(float x, float y) {
    const uint32_t high = pack<S>(x, y);
    const float2 rounded = unpack<S>(high);
    return SplitPair{high, pack<S>(x - rounded.x, y - rounded.y)};
}

template <class S>
__device__ inline float parameter(const Projection& a, const void* data, int i) {
    if (a.dtype == DType::kFloat) return static_cast<const float*>(data)[i];
    return static_cast<float>(static_cast<const S*>(data)[i]);
}

// Of eight numbers side by side the first four go into the first half of a row, the others into the second,
// so that lanes side by side access 16 bytes side by side.
template <int kHeadDim>
__device__ inline int place_of_float(int column) {
    return column / 4 % 2 * (kHeadDim / 2) + column / 8 * 4 + column % 4;
}

// Rows of floats as sums of two bfloat16, kHeadDim high halves and then as many low ones; the place of either
// half of eight columns may hold four of them as floats.
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
        const int place = place_of_float<kHeadDim>(column);
        return reinterpret_cast<float*>(halves.unit(row, place / 4)) + place % 4;
    }
    __device__ Float8 load_floats(int row, int column) const {
        Float8 x;
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            *reinterpret_cast<float4*>(x.x + i) = *reinterpret_cast<const float4*>(floats(row, column + i));
        return x;
    }
    __device__ void store_floats(int row, int column, const Float8& x) const {
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            *reinterpret_cast<float4*>(floats(row, column + i)) = *reinterpret_cast<const float4*>(x.x + i);
    }
};

// How many halves of each factor the products that lead to gradients take: gradients in bfloat16 are no
// better for the low ones.
template <class S>
constexpr int kGradientHalves = std::is_same_v<S, __nv_bfloat16> ? 1 : 2;

// Whether weights have low halves that are not 0.
__device__ inline bool has_low_halves(const Projection& a) { return a.dtype != DType::kBFloat16; }

// C += A B, but for the product of the low halves: n8 columns of B from its column tile `n` of two.
template <int kHalves>
__device__ inline void multiply_add_split(float (&c)[4], const uint32_t (&a)[kHalves][4],
                                          const uint32_t (&b)[kHalves][4], int n) {
    if constexpr (kHalves == 2) {
        multiply_add<__nv_bfloat16>(c, a[1], b[0][2 * n], b[0][2 * n + 1]);
        multiply_add<__nv_bfloat16>(c, a[0], b[1][2 * n], b[1][2 * n + 1]);
    }
    multiply_add<__nv_bfloat16>(c, a[0], b[0][2 * n], b[0][2 * n + 1]);
}

// A W^T, or A W: 16 kRowTiles rows, 16 columns from `column` onward.
template <bool kTransposed, int kHalves = 2, int kHeadDim, int kRowTiles>
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
        uint32_t b[kHalves][4];
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
            kTransposed
                ? load_matrix(b[half], (b_rows ^ 32 * k) + half * Rows::kLowBytes)
                : load_matrix_transposed(b[half], b_rows + 16 * k * Rows::kRowBytes + half * Rows::kLowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            uint32_t from_a[kHalves][4];
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
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
    for (int n = 0; n < 2; ++n) {
        float* const first = to.floats(group, column + 8 * n + pair); // every eighth row is permuted alike
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                *reinterpret_cast<float2*>(first + (16 * r + 4 * e) * kHeadDim) =
                    make_float2(y[r][n][e], y[r][n][e + 1]);
    }
}

// Leaves such a product, each row times its factor, in rows of S of length head_dim.
template <class S, int kRowTiles>
__device__ inline void store_product(S* to, const float (&y)[kRowTiles][2][4], const float* factors, int rows,
                                     int column, int head_dim) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
        const int row = 8 * r + lane / 4;
        const float factor = factors[row];
        const auto packed = [&](int n) {
            const float* const x = y[r / 2][n] + r % 2 * 2;
            return pack<S>(factor * x[0], factor * x[1]);
        };
        const uint2 four = exchange_pairs(packed(0), packed(1));
        const int first = column + exchanged_column();
        if (row < rows && first < head_dim) *reinterpret_cast<uint2*>(to + row * head_dim + first) = four;
    }
}

// The gradients of 16 of a Linear's outputs, those from `column` onward.
template <int kHeadDim>
struct LinearGradient {
    float weight[kHeadDim / 8][4] = {}, bias[4] = {}; // the bias's in every column

    // Adds what up to 16 kRowTiles rows give, from the gradients of outputs and from inputs.
    template <int kRowTiles, int kHalves>
    __device__ void add(SplitRows<kHeadDim> grads, SplitRows<kHeadDim> inputs, int column, int rows) {
        using Rows = SplitRows<kHeadDim>;
        constexpr uint32_t kOnes = 0x3f803f80;
        const int lane = threadIdx.x % kWarpSize;
        const uint32_t grad_rows = grads.address(lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
        const uint32_t input_rows = inputs.address(lane % 16, lane / 16);
#pragma unroll
        for (int k = 0; k < kRowTiles; ++k) {
            if (16 * k >= rows) break;
            uint32_t a[kHalves][4];
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                load_matrix_transposed(a[half],
                                       grad_rows + 16 * k * Rows::kRowBytes + half * Rows::kLowBytes);
                multiply_add<__nv_bfloat16>(bias, a[half], kOnes, kOnes);
            }
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; n += 2) {
                uint32_t b[kHalves][4];
#pragma unroll
                for (int half = 0; half < kHalves; ++half)
                    load_matrix_transposed(b[half], (input_rows ^ 16 * n) + 16 * k * Rows::kRowBytes +
                                                        half * Rows::kLowBytes);
                multiply_add_split(weight[n], a, b, 0);
                multiply_add_split(weight[n + 1], a, b, 1);
            }
        }
    }

    // [head_dim + 1, head_dim], the bias last.
    __device__ void store(float* to, int column, int head_dim) const {
        const int lane = threadIdx.x % kWarpSize, pair = lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = column + lane / 4 + 8 * r;
            if (row >= head_dim) continue;
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n)
                if (8 * n < head_dim)
                    *reinterpret_cast<float2*>(to + row * head_dim + 8 * n + pair) =
                        make_float2(weight[n][2 * r], weight[n][2 * r + 1]);
            if (pair == 0) to[head_dim * head_dim + row] = bias[2 * r];
        }
    }
};

// Back through 16 of a Linear's inputs and outputs, those from `column` onward, from the gradients of its
// outputs: to those of its inputs times the rows' factors, in rows of S of length head_dim, and of its
// weights.
template <class S, int kRowTiles, int kHeadDim>
__device__ inline void linear_backward(SplitRows<kHeadDim> grads, SplitRows<kHeadDim> inputs,
                                       SplitRows<kHeadDim> weight, int column, int rows, const float* factors,
                                       S* grad_inputs, int head_dim, LinearGradient<kHeadDim>& gradient) {
    float product[kRowTiles][2][4];
    multiply_weight<false, kGradientHalves<S>>(product, grads, weight, column);
    store_product(grad_inputs, product, factors, rows, column, head_dim);
    gradient.template add<kRowTiles, kGradientHalves<S>>(grads, inputs, column, rows);
}

// A row, eight columns of which each of kLanes lanes holds, becomes its deviation from its mean over its
// standard deviation, whose reciprocal is returned. Columns that are not `inside` hold zeros and keep them.
template <int kLanes>
__device__ inline float standardise(Float8& x, bool inside, float reciprocal_dim, float eps) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.x[i];
    const float mean = lanes_sum<kLanes>(sum) * reciprocal_dim, center = inside ? mean : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x.x[i] -= center;
        squares += x.x[i] * x.x[i];
    }
    const float rstd = rsqrtf(lanes_sum<kLanes>(squares) * reciprocal_dim + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.x[i] *= rstd;
    return rstd;
}

// Back from the gradient of a LayerNorm's output to that of its input, whose standardised row is x.
template <int kLanes>
struct NormGradient {
    Float8 weight{}, bias{};

    __device__ void add(Float8& grad, const Float8& x, const Float8& norm_weight, float rstd,
                        float reciprocal_dim, bool exists) {
        float sum = 0, sum_x = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            weight.x[i] += grad.x[i] * x.x[i];
            bias.x[i] += grad.x[i];
            grad.x[i] *= norm_weight.x[i];
            sum += grad.x[i];
            sum_x += grad.x[i] * x.x[i];
        }
        const float factor = exists ? rstd : 0.0f;
        const float mean = factor * reciprocal_dim * lanes_sum<kLanes>(sum);
        const float mean_x = factor * reciprocal_dim * lanes_sum<kLanes>(sum_x);
#pragma unroll
        for (int i = 0; i < 8; ++i) grad.x[i] = factor * grad.x[i] - mean - x.x[i] * mean_x;
    }

    // [2, head_dim], the sums over all rows of a block; `sums` is [kThreads / 32, 8 kLanes] of shared memory.
    template <int kThreads>
    __device__ void store(float* to, float* sums, int head_dim) {
        constexpr int kHeadDim = 8 * kLanes, kWarps = kThreads / kWarpSize;
        static_assert(kThreads >= kHeadDim);
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        const auto store_sum = [&](Float8& x, float* row) {
#pragma unroll
            for (int offset = kLanes; offset < kWarpSize; offset *= 2)
#pragma unroll
                for (int i = 0; i < 8; ++i) x.x[i] += __shfl_xor_sync(0xffffffffu, x.x[i], offset);
            __syncthreads();
            if (lane < kLanes) store8(sums + (warp * kHeadDim + lane * 8), x);
            __syncthreads();
            if (const unsigned i = threadIdx.x; i < static_cast<unsigned>(head_dim)) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) sum += sums[w * kHeadDim + i];
                row[i] = sum;
            }
        };
        store_sum(weight, to);
        store_sum(bias, to + head_dim);
    }
};

// A projection in shared memory.
template <int kHeadDim>
struct ProjectionWeights {
    alignas(4 * kHeadDim) __nv_bfloat16 linear_data[2 * kHeadDim * kHeadDim];
    using Vector = float[kHeadDim];
    Vector bias, norm_weight, norm_bias; // permuted as rows of floats are

    __device__ static Float8 load8(const Vector& vector, int column) {
        Float8 x;
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            *reinterpret_cast<float4*>(x.x + i) =
                *reinterpret_cast<const float4*>(vector + place_of_float<kHeadDim>(column + i));
        return x;
    }
    __device__ SplitRows<kHeadDim> linear() const { return {{const_cast<__nv_bfloat16*>(linear_data)}}; }

    // From the product with the Linear's weight to the LayerNorm's standardised row, or without a LayerNorm
    // to the Linear's output; returns the reciprocal of the standard deviation.
    template <int kLanes>
    __device__ float standardise(Float8& x, int column, bool inside, float reciprocal_dim, float eps,
                                 bool norm) const {
        const Float8 b = load8(bias, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.x[i] += b.x[i];
        return norm ? mma::standardise<kLanes>(x, inside, reciprocal_dim, eps) : 1.0f;
    }
    // ... and on to the projection.
    __device__ void scale(Float8& x, int column) const {
        const Float8 factor = load8(norm_weight, column), shift = load8(norm_bias, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.x[i] = x.x[i] * factor.x[i] + shift.x[i];
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
                x[i] = row < head_dim && column < head_dim ? mma::load8(weight + row * head_dim + column)
                                                           : Float8{};
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
            const int place = place_of_float<kHeadDim>(i);
            bias[place] = value(a.bias, 0);
            norm_weight[place] = value(a.norm_weight, 1);
            norm_bias[place] = value(a.norm_bias, 0);
        }
    }
};

} // namespace eva_attn::cuda::mma
