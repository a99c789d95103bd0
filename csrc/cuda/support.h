// From torch's tensors to what the kernels take.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/launch.h"
#include "ops/kernel_arguments.h"

namespace eva_attn::cuda {

// The kernels for one problem: those for tensor cores where they take it.
using SummaryForward = decltype(&simt::chunk_summary_fwd);
using AttentionForward = decltype(&simt::window_attention_fwd);
struct SummaryBackward {
    decltype(&simt::chunk_summary_bwd) run;
    decltype(&simt::projection_pieces) projection_pieces;
    bool on_tensor_cores;
};
struct AttentionBackward {
    decltype(&simt::window_attention_bwd_global) run_global;
    decltype(&simt::window_attention_bwd) run;
    decltype(&simt::global_pieces) global_pieces;
    decltype(&simt::bias_pieces) bias_pieces;
    bool on_tensor_cores;
};
SummaryForward forward_for(DType dtype, const SummaryParams& params);
AttentionForward forward_for(DType dtype, const AttentionParams& params);
SummaryBackward backward_for(DType dtype, const SummaryParams& params);
AttentionBackward backward_for(DType dtype, const AttentionParams& params);

void check_head_dim(const Tensor& query);
// ValueError for what is too large for 32-bit counters.
Shape checked_shape(const Call& call, const Geometry& geometry);

// What a Projection points into, of one dtype: `accumulation` where they differ.
struct ProjectionTensors {
    Tensor weight, bias, norm_weight, norm_bias;
};
ProjectionTensors projection_tensors(const ProjectionWeights& weights, at::ScalarType accumulation);
Projection projection(const ProjectionTensors& tensors);

// Memory that only the last kernel of a backward pass writes: that of a gradient.
class Room {
  public:
    Room() = default;
    explicit Room(const Tensor& gradient) : storage_(gradient.storage()) {}

    // The next part of it, where enough is left, else memory of its own.
    Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

  private:
    c10::Storage storage_;
    int64_t used_ = 0; // bytes
};

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
