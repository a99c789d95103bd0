// Launches that overlap with the end of the kernel before them on the stream (programmatic dependent launch).
#pragma once

#include "kernels/cuda/device.h"

namespace eva_attn::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasDependentLaunch = true;
#else
constexpr bool kHasDependentLaunch = false;
#endif

// By every thread of such a kernel, before it touches global memory: until the kernels before it are done and
// what they wrote is there.
__device__ inline void wait_for_dependencies() {
    if constexpr (kHasDependentLaunch) asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// Its launch bounds tell whether kernels were compiled to wait for the current device.
template <int>
__global__ void __launch_bounds__(kHasDependentLaunch ? 64 : 32) dependent_launch_kernel() {}
inline bool has_dependent_launch() {
    static LimitsOf limits_of;
    return limits_of(dependent_launch_kernel<0>).threads == 64;
}

// The kernel comes up as soon as all blocks of the one before it have ended, and has to wait for its results.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                      cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = has_dependent_launch() ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace eva_attn::cuda
