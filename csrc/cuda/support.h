// From torch's tensors to what the kernels take.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/launch.h"
#include "ops/call.h"

namespace eva_attn::cuda {

DType kernel_dtype(at::ScalarType dtype);

// The kernels for one problem: those for tensor cores where they take it.
using SummaryForward = decltype(&simt::chunk_summary_fwd);
using AttentionForward = decltype(&simt::window_attention_fwd);
struct SummaryBackward {
    decltype(&simt::chunk_summary_bwd) run;
    decltype(&simt::projection_pieces) projection_pieces;
    bool needs_projection_rows;
};
struct AttentionBackward {
    decltype(&simt::window_attention_bwd_global) run_global;
    decltype(&simt::window_attention_bwd) run;
    decltype(&simt::global_pieces) global_pieces;
    decltype(&simt::bias_pieces) bias_pieces;
};
SummaryForward forward_for(DType dtype, const SummaryParams& params);
AttentionForward forward_for(DType dtype, const AttentionParams& params);
SummaryBackward backward_for(DType dtype, const SummaryParams& params);
AttentionBackward backward_for(DType dtype, const AttentionParams& params);

inline Rows rows(const Tensor& tensor) {
    return Rows{tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
inline void* data(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
inline const bool* mask_data(const Tensor& mask) {
    return mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
}

Shape shape_of(const Call& call, const Geometry& geometry);
double scale_of(const Call& call);
// Contiguous, in the dtype; undefined where there is none.
Tensor contiguous(const OptionalTensor& tensor, at::ScalarType dtype);
// The sum along the dimensions, rounded to the dtype of `out` once.
void sum_into(Tensor out, const Tensor& terms, at::IntArrayRef dims);

// Runs a backend's work for a call on its device, and names the op and the call in errors of a launch.
template <class Body>
void run(const char* op, const Call& call, Body body) {
    const c10::cuda::CUDAGuard guard(call.query.device());
    body(c10::cuda::getCurrentCUDAStream().stream());
    const cudaError_t error = cudaGetLastError();
    TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error), " (query of shape ",
                call.query.sizes(), ", ", call.query.scalar_type(), ", on ", call.query.device(), ")");
}

} // namespace eva_attn::cuda
