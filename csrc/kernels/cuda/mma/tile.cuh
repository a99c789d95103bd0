// Tiles of token rows in shared memory: gathered from global memory, read as the tensor cores' fragments.
#pragma once

#include <algorithm>
#include <climits>
#include <cuda_runtime.h>
#include <type_traits>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/ptx.cuh"

namespace eva_attn::cuda::mma {

constexpr int kWarpSize = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// [rows, kHeadDim] of 16-bit elements. The 16-byte units of a row are permuted by its number, so that the
// same unit of eight rows in a line lies in eight different groups of banks.
template <class S, int kHeadDim>
struct Tile {
    static constexpr int kUnits = kHeadDim / 8;

    S* data;

    __device__ S* unit(int row, int unit) const { return data + row * kHeadDim + ((unit ^ (row & 7)) * 8); }

    // A [16, 16] from rows `row` and columns 8 `unit` onward.
    __device__ void load_a(uint32_t (&a)[4], int row, int first_unit) const {
        const int lane = threadIdx.x % kWarpSize;
        load_matrix(a, unit(row + lane % 16, first_unit + lane / 16));
    }
    // A [16, 16] of the transposed tile: its rows are columns 8 `unit` onward, its columns are rows `row`
    // onward.
    __device__ void load_a_transposed(uint32_t (&a)[4], int row, int first_unit) const {
        const int lane = threadIdx.x % kWarpSize;
        load_matrix_transposed(a, unit(row + lane % 8 + lane / 16 * 8, first_unit + lane / 8 % 2));
    }
    // B [32, 8] of the transposed tile, b[0], b[1] above b[2], b[3]: its columns are rows `row` onward, its
    // rows are columns 8 `unit` onward.
    __device__ void load_b_transposed(uint32_t (&b)[4], int row, int first_unit) const {
        const int lane = threadIdx.x % kWarpSize;
        load_matrix(b, unit(row + lane % 8, first_unit + lane / 8));
    }
    // B [16, 16], b[0], b[1] left of b[2], b[3], from rows `row` and columns 8 `unit` onward.
    __device__ void load_b(uint32_t (&b)[4], int row, int first_unit) const {
        const int lane = threadIdx.x % kWarpSize;
        load_matrix_transposed(b, unit(row + lane % 16, first_unit + lane / 16));
    }
};

// i / width for i and width below 2^15, with `reciprocal` of the width.
constexpr uint32_t reciprocal(int width) { return 0x7fffffffu / width + 1; }
__device__ inline int divide(int i, uint32_t reciprocal) { return __umulhi(2 * i + 1, reciprocal); }
constexpr int kMaxBoxTokens = (1 << 15) - 1;

// The size of windows, of windows' keys or of chunks. Positions in a box are numbered row by row over its
// whole size, also where a border of the grid cuts it.
struct BoxShape {
    int height, width;
    uint32_t width_reciprocal;

    static BoxShape of(int64_t height, int64_t width) {
        const int w = static_cast<int>(width);
        return BoxShape{static_cast<int>(height), w, reciprocal(w)};
    }
    constexpr int size() const { return height * width; }
};

struct Position {
    int y, x;
};

// A box in the grid; (y0, x0), the grid position of its first, may lie outside.
struct TokenBox {
    BoxShape shape;
    int y0, x0;
    int grid_height, grid_width, num_prefix_tokens;

    __device__ Position position(int i) const {
        const int y = divide(i, shape.width_reciprocal);
        return Position{y0 + y, x0 + i - y * shape.width};
    }
    __device__ bool is_whole() const {
        return y0 >= 0 && x0 >= 0 && y0 + shape.height <= grid_height && x0 + shape.width <= grid_width;
    }
    __device__ int first_token() const { return num_prefix_tokens + y0 * grid_width + x0; }
    // The token of position i, -1 outside of the grid.
    __device__ int token(int i) const {
        const Position at = position(i);
        const bool inside = i < shape.size() &&
                            static_cast<unsigned>(at.y) < static_cast<unsigned>(grid_height) &&
                            static_cast<unsigned>(at.x) < static_cast<unsigned>(grid_width);
        return inside ? num_prefix_tokens + at.y * grid_width + at.x : -1;
    }
};

template <class S>
__device__ inline const S* head_rows(const Rows& rows, int64_t batch, int64_t head) {
    return static_cast<const S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
}

// The rows of a tile that a thread copies, all in the same 16-byte column: row(0) .. row(kCount - 1).
template <int kRows, int kThreads, int kHeadDim>
struct GatherRows {
    static constexpr int kUnits = kHeadDim / 8;
    static constexpr int kCount = kRows * kUnits / kThreads;
    static_assert(kWarpSize % kUnits == 0 && kRows * kUnits % kThreads == 0);

    __device__ static int unit() { return threadIdx.x % kUnits; }
    // A warp copies consecutive rows.
    __device__ static int row(int i) {
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        return warp * (kRows * kWarpSize / kThreads) + lane / kUnits + i * (kWarpSize / kUnits);
    }
};

// Begins to copy these rows from index * stride of each, zeros where the index is negative.
template <class Rows, class S, int kHeadDim>
__device__ inline void gather_rows(Tile<S, kHeadDim> tile, const S* base, int64_t stride,
                                   const int (&index)[Rows::kCount]) {
    const auto* column = reinterpret_cast<const char*>(base + Rows::unit() * 8);
    const int stride_bytes = static_cast<int>(stride) * static_cast<int>(sizeof(S));
#pragma unroll
    for (int i = 0; i < Rows::kCount; ++i)
        copy_async_at(index[i], tile.unit(Rows::row(i), Rows::unit()),
                      column + static_cast<int64_t>(index[i]) * stride_bytes);
}

// The same for all rows [0, kRows) of a tile, row r from index_of(r).
template <int kRows, int kThreads, class S, int kHeadDim, class IndexOf>
__device__ inline void gather(Tile<S, kHeadDim> tile, const S* base, int64_t stride, int head_dim,
                              IndexOf index_of) {
    using Rows = GatherRows<kRows, kThreads, kHeadDim>;
    int index[Rows::kCount];
#pragma unroll
    for (int i = 0; i < Rows::kCount; ++i)
        index[i] = Rows::unit() * 8 < head_dim ? index_of(Rows::row(i)) : -1;
    gather_rows<Rows>(tile, base, stride, index);
}

// Four numbers side by side.
template <class W>
__device__ inline float4 load4(const W* data) {
    if constexpr (std::is_same_v<W, float>) {
        return *reinterpret_cast<const float4*>(data);
    } else {
        const uint2 packed = *reinterpret_cast<const uint2*>(data);
        const float2 a = unpack<W>(packed.x), b = unpack<W>(packed.y);
        return float4{a.x, a.y, b.x, b.y};
    }
}

// Eight elements of a row, 16 bytes of them in memory.
struct alignas(16) Float8 {
    float x[8];
};

template <class S>
__device__ inline Float8 unpack8(const uint4& packed) {
    const float2 a = unpack<S>(packed.x), b = unpack<S>(packed.y), c = unpack<S>(packed.z),
                 d = unpack<S>(packed.w);
    return Float8{{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}
template <class S>
__device__ inline uint4 pack8(const Float8& y) {
    return uint4{pack<S>(y.x[0], y.x[1]), pack<S>(y.x[2], y.x[3]), pack<S>(y.x[4], y.x[5]),
                 pack<S>(y.x[6], y.x[7])};
}

template <class W>
__device__ inline Float8 load8(const W* data) {
    Float8 x;
#pragma unroll
    for (int i = 0; i < 8; i += 4) *reinterpret_cast<float4*>(x.x + i) = load4(data + i);
    return x;
}
__device__ inline void store8(float* to, const Float8& y) {
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(y.x + i);
}

// Over kLanes lanes side by side.
template <int kLanes>
__device__ inline float lanes_sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Likewise of four numbers each: lane i gets that of number i % 4.
template <int kLanes>
__device__ inline float lanes_sum(const float (&x)[4]) {
    const auto keep_one = [](float even, float odd, int offset) {
        const bool is_odd = threadIdx.x & offset;
        return (is_odd ? odd : even) + __shfl_xor_sync(0xffffffffu, is_odd ? even : odd, offset);
    };
    float sum = keep_one(keep_one(x[0], x[1], 1), keep_one(x[2], x[3], 1), 2);
#pragma unroll
    for (int offset = 4; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

// Over the four lanes that hold a row of an accumulator.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Of 16 columns of such a row, of which a lane holds a pair of the first eight and one of the last, packed,
// the lane's four side by side, those from exchanged_column() on: lanes of a pair share out the eights.
__device__ inline uint2 exchange_pairs(uint32_t left, uint32_t right) {
    const bool odd = threadIdx.x & 1;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
    return odd ? uint2{got, right} : uint2{left, got};
}
__device__ inline int exchanged_column() { return threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4; }

// Into how many CTAs the work on one (batch, head) is cut at most.
constexpr int kMaxSlices = 1024;

} // namespace eva_attn::cuda::mma
