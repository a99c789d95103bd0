// From a call's tensors and options to what the kernels of every device take.
#pragma once

#include "kernels/philox.h"
#include "kernels/tensors.h"
#include "ops/call.h"

namespace eva_attn {

DType kernel_dtype(at::ScalarType dtype);

inline Rows rows(const Tensor& tensor) {
    return Rows{tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
inline void* data(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
inline const bool* mask_data(const Tensor& mask) {
    return mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
}

// Where a summary's results lie, each contiguous; null: not there.
struct SummaryResults {
    void* landmark_key;               // [B, H, C, D]
    void* landmark_value;             // [B, H, C, D]
    void* key_mean = nullptr;         // [B, H, C, D] of the accumulation type
    void* query_mean = nullptr;       // [B, H, C, D], of that of rows beside no key_mean
    void* omega = nullptr;            // [B, H, C, D] of the accumulation type, where it is kept
    void* landmark_entropy = nullptr; // [B, H, C] of the accumulation type, of tangents
};

Shape shape_of(const Call& call, const Geometry& geometry);
double scale_of(const Call& call);
// All but the seed, which lies on the call's device.
Dropout dropout_of(const AttentionOptions& options);
// Contiguous, in the dtype; undefined where there is none.
Tensor contiguous(const OptionalTensor& tensor, at::ScalarType dtype);

} // namespace eva_attn
