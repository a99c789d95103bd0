// Products of tiles by a block of four warps, of which each takes 16 rows of the result: Hopper's
// asynchronous products where they fit, else the warps' own. Operands may be used between begin_products and
// end_products only by products.
#pragma once

#include "kernels/cuda/mma/tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace eva_attn::cuda::mma {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

template <int kHeadDim, int kColumns>
constexpr bool kUseWarpgroups = kHasWarpgroups && kHeadDim == 64 && kColumns == 64;

// Between the writes to tiles and the barrier before their products.
__device__ inline void publish_tiles() {
    if constexpr (kHasWarpgroups) fence_async_proxy();
}
template <int kHeadDim>
__device__ inline void begin_products() {
    if constexpr (kUseWarpgroups<kHeadDim, 64>) warpgroup_fence();
}
template <int kHeadDim, class... Accumulators>
__device__ inline void end_products(Accumulators&... accumulators) {
    if constexpr (kUseWarpgroups<kHeadDim, 64>) {
        warpgroup_commit();
        warpgroup_wait();
        (fence_registers(accumulators), ...);
    }
}

// C = A B^T: 16 rows of `a` from `row` onward, columns from the rows of `b`, of which only `columns` matter.
template <class S, int kHeadDim, int kTiles>
__device__ inline void multiply_transposed(float (&c)[kTiles][4], Tile<S, kHeadDim> a, int row,
                                           Tile<S, kHeadDim> b, int columns) {
    if constexpr (kUseWarpgroups<kHeadDim, 8 * kTiles>) {
        const uint64_t from_a = tile_descriptor(a.data), from_b = tile_descriptor(b.data);
#pragma unroll
        for (int k = 0; k < 4; ++k) warpgroup_multiply<S, 0, 0>(c, from_a + 2 * k, from_b + 2 * k, k > 0);
    } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[n][i] = 0;
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; k += 2) {
            uint32_t a0[4], a1[4];
            a.load_a(a0, row, 2 * k);
            a.load_a(a1, row, 2 * k + 2);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                if (8 * n >= columns) continue;
                uint32_t from_b[4];
                b.load_b_transposed(from_b, 8 * n, 2 * k);
                multiply_add<S>(c[n], a0, from_b[0], from_b[1]);
                multiply_add<S>(c[n], a1, from_b[2], from_b[3]);
            }
        }
    }
}

// C += A B: A [16, 16 kSteps] in registers, of whose columns only `columns` matter.
template <class S, int kHeadDim, int kSteps>
__device__ inline void multiply(float (&c)[kHeadDim / 8][4], const uint32_t (&a)[kSteps][4],
                                Tile<S, kHeadDim> b, int columns) {
    if constexpr (kUseWarpgroups<kHeadDim, 16 * kSteps>) {
        const uint64_t from_b = tile_descriptor(b.data);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) warpgroup_multiply<S, 1>(c, a[k], from_b + 128 * k, 1);
    } else {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if (16 * k >= columns) continue;
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; d += 2) {
                uint32_t from_b[4];
                b.load_b(from_b, 16 * k, d);
                multiply_add<S>(c[d], a[k], from_b[0], from_b[1]);
                multiply_add<S>(c[d + 1], a[k], from_b[2], from_b[3]);
            }
        }
    }
}

// C = A^T B: 16 columns of `a` [64, 64] from `column` onward; only `rows` of its rows matter.
template <class S, int kHeadDim>
__device__ inline void multiply_left_transposed(float (&c)[kHeadDim / 8][4], Tile<S, 64> a, int column,
                                                Tile<S, kHeadDim> b, int rows) {
    if constexpr (kUseWarpgroups<kHeadDim, 64>) {
        const uint64_t from_a = tile_descriptor(a.data), from_b = tile_descriptor(b.data);
#pragma unroll
        for (int k = 0; k < 4; ++k) warpgroup_multiply<S, 1, 1>(c, from_a + 128 * k, from_b + 128 * k, k > 0);
    } else {
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[d][i] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (16 * k >= rows) continue;
            uint32_t from_a[4];
            a.load_a_transposed(from_a, 16 * k, column / 8);
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; d += 2) {
                uint32_t from_b[4];
                b.load_b(from_b, 16 * k, d);
                multiply_add<S>(c[d], from_a, from_b[0], from_b[1]);
                multiply_add<S>(c[d + 1], from_a, from_b[2], from_b[3]);
            }
        }
    }
}

} // namespace eva_attn::cuda::mma
