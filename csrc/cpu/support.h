// From torch's tensors to what the kernels take.
#pragma once

#include <functional>
#include <vector>

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

// A kernel with its params: tasks for each (batch, head) in turn, and the scratch that a thread needs.
struct Stage {
    std::function<void(int64_t begin, int64_t end, char* scratch)> kernel;
    int64_t tasks_per_head;
    size_t scratch;
};

template <class Params>
Stage stage(void (*kernel)(const Params&, int64_t, int64_t, char*), const Params& params,
            int64_t tasks_per_head, size_t scratch) {
    return {[=, &params](int64_t begin, int64_t end, char* memory) { kernel(params, begin, end, memory); },
            tasks_per_head, scratch};
}

// Runs stages one after another; head by head where there are many, so that a stage finds in cache what the
// one before has read.
void run(const std::vector<Stage>& stages, int64_t heads);

} // namespace eva_attn::cpu
