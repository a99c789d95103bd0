// From torch's tensors to what the kernels take.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include "kernels/cpu/params.h"
#include "ops/call.h"

namespace eva_attn::cpu {

const Kernels& kernels_for(at::ScalarType dtype);

inline Rows rows(const Tensor& tensor) {
    return Rows{tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
inline void* data(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

Shape shape_of(const Call& call, const Geometry& geometry);
double scale_of(const Call& call);
// Contiguous, in the dtype; undefined where there is none.
Tensor contiguous(const OptionalTensor& tensor, at::ScalarType dtype);
// Rows [..., D] to [..., padded(D)], zeros behind.
Tensor pad_rows(const Tensor& tensor);
// int32 [B or 1, C, 4]; `mask` is bool [B, N], contiguous, or undefined.
Tensor chunk_extents(const Shape& shape, const Tensor& mask);
// The sum along dimension 0, always in the same order.
Tensor sum_in_order(const Tensor& terms);

inline const bool* mask_data(const Tensor& mask) {
    return mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
}

template <class Params>
void run(void (*kernel)(const Params&, int64_t, int64_t, char*), size_t (*scratch_size)(const Params&),
         const Params& params, int64_t tasks) {
    if (tasks == 0) return;
    const size_t size = scratch_size(params);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(size);
        kernel(params, begin, end, static_cast<char*>(scratch.get()));
    });
}

} // namespace eva_attn::cpu
