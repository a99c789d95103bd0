// Thin wrappers of Hopper's barriers in shared memory and asynchronous copies of boxes of tensors (sm_90
// upward), and the maps that describe the tensors to them.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "kernels/cuda/ptx.cuh"
#include "kernels/tensors.h"

namespace eva_attn::cuda {

// A phase of a barrier ends with its last arrival and the last byte that was expected. Waiting for parity 1
// before the first phase has ended returns at once.
__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
// Makes initialised barriers known to the copies.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Asleep: threads that poll would be in the way of those that compute.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    constexpr int kMostSleep = 1000000; // ns
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity), "n"(kMostSleep)
                 : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}
// A box at (d, x, y, head, batch) to shared memory, zeros outside of the tensor; `barrier` gets the bytes of
// the whole box.
__device__ inline void load_box(void* shared, const CUtensorMap& map, uint64_t* barrier, int d, int x, int y,
                                int head, int batch) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(shared_address(barrier)), "r"(d), "r"(x), "r"(y), "r"(head), "r"(batch)
                 : "memory");
}
// And back; nothing is written outside of the tensor.
__device__ inline void store_box(const void* shared, const CUtensorMap& map, int d, int x, int y, int head,
                                 int batch) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
                 "[%1, {%2, %3, %4, %5, %6}], [%0];\n" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(d), "r"(x), "r"(y), "r"(head), "r"(batch)
                 : "memory");
}
// What the L2 cache is told of a copy.
struct L2Policy {
    uint64_t bits;

    __device__ static L2Policy normal() {
        L2Policy policy;
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy.bits));
        return policy;
    }
    __device__ static L2Policy evict_first() {
        L2Policy policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy.bits));
        return policy;
    }
};
__device__ inline void load_box(void* shared, const CUtensorMap& map, uint64_t* barrier, int d, int x, int y,
                                int head, int batch, L2Policy policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;\n" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(d), "r"(x), "r"(y), "r"(head), "r"(batch),
        "l"(policy.bits)
        : "memory");
}
__device__ inline void store_box(const void* shared, const CUtensorMap& map, int d, int x, int y, int head,
                                 int batch, L2Policy policy) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint "
                 "[%1, {%2, %3, %4, %5, %6}], [%0], %7;\n" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(d), "r"(x), "r"(y), "r"(head), "r"(batch), "l"(policy.bits)
                 : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Until the shared memory of this thread's stores may be used again.
__device__ inline void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }

// Boxes of [height, width] tokens and 64 columns of a [B, H, height, width, D] tensor of 16-bit elements, a
// row of 128 bytes for each token, 16-byte units permuted by the row modulo 8. False where the hardware
// can't.
inline bool make_tensor_map(CUtensorMap& map, bool is_half, const Rows& rows, int64_t batch, int64_t heads,
                            int64_t grid_height, int64_t grid_width, int64_t head_dim, int box_height,
                            int box_width) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &result);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    if (!encode) return false;
    const auto bytes = [](int64_t size, int64_t stride) {
        return static_cast<cuuint64_t>(size == 1 ? 16 : 2 * stride); // that of a single one is never used
    };
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(grid_width),
                                static_cast<cuuint64_t>(grid_height), static_cast<cuuint64_t>(heads),
                                static_cast<cuuint64_t>(batch)};
    const cuuint64_t strides[] = {bytes(grid_width, rows.token_stride),
                                  bytes(grid_height, grid_width * rows.token_stride),
                                  bytes(heads, rows.head_stride), bytes(batch, rows.batch_stride)};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_width), static_cast<cuuint32_t>(box_height), 1,
                              1};
    const cuuint32_t steps[] = {1, 1, 1, 1, 1};
    return encode(&map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
                  rows.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

} // namespace eva_attn::cuda
