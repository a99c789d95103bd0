#include "cuda/support.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>
#include <limits>

namespace eva_attn::cuda {
namespace {

// `reason` is why tensor cores do not take a problem; said once, where that costs several times the time.
bool on_tensor_cores(DType dtype, const char* reason) {
    if (reason && dtype != DType::kFloat && dtype != DType::kDouble) {
        TORCH_WARN_ONCE("eva_attn runs without tensor cores, and so several times slower: ", reason);
    }
    return !reason;
}

} // namespace

SummaryForward forward_for(DType dtype, const SummaryParams& params) {
    return on_tensor_cores(dtype, mma::supports(dtype, params)) ? mma::chunk_summary_fwd
                                                                : simt::chunk_summary_fwd;
}
AttentionForward forward_for(DType dtype, const AttentionParams& params) {
    return on_tensor_cores(dtype, mma::supports(dtype, params)) ? mma::window_attention_fwd
                                                                : simt::window_attention_fwd;
}

SummaryBackward backward_for(DType dtype, const SummaryParams& params) {
    if (on_tensor_cores(dtype, mma::supports_bwd(dtype, params)))
        return {.run = mma::chunk_summary_bwd,
                .projection_pieces = mma::projection_pieces,
                .on_tensor_cores = true};
    return {.run = simt::chunk_summary_bwd,
            .projection_pieces = simt::projection_pieces,
            .on_tensor_cores = false};
}
AttentionBackward backward_for(DType dtype, const AttentionParams& params) {
    if (on_tensor_cores(dtype, mma::supports_bwd(dtype, params)))
        return {.run_global = mma::window_attention_bwd_global,
                .run = mma::window_attention_bwd,
                .global_pieces = mma::global_pieces,
                .bias_pieces = mma::bias_pieces,
                .on_tensor_cores = true};
    return {.run_global = simt::window_attention_bwd_global,
            .run = simt::window_attention_bwd,
            .global_pieces = simt::global_pieces,
            .bias_pieces = simt::bias_pieces,
            .on_tensor_cores = false};
}

void check_head_dim(const Tensor& query) {
    TORCH_CHECK_VALUE(query.size(3) <= kMaxHeadDim, "query must have a head_dim of at most ", kMaxHeadDim,
                      " on CUDA, got shape ", query.sizes());
}

Shape checked_shape(const Call& call, const Geometry& geometry) {
    const Tensor& query = call.query;
    check_head_dim(query);
    TORCH_CHECK_VALUE(query.size(2) + geometry.num_chunks() <= std::numeric_limits<int32_t>::max(),
                      "query must have fewer than 2^31 tokens and chunks on CUDA, got shape ", query.sizes());
    return shape_of(call, geometry);
}

ProjectionTensors projection_tensors(const ProjectionWeights& weights, at::ScalarType accumulation) {
    if (!weights.weight) return {};
    at::ScalarType dtype = weights.weight->scalar_type();
    for (const OptionalTensor* other : {&weights.bias, &weights.norm_weight, &weights.norm_bias})
        if (*other && (*other)->scalar_type() != dtype) dtype = accumulation;
    return {.weight = contiguous(weights.weight, dtype),
            .bias = contiguous(weights.bias, dtype),
            .norm_weight = contiguous(weights.norm_weight, dtype),
            .norm_bias = contiguous(weights.norm_bias, dtype)};
}

Projection projection(const ProjectionTensors& tensors) {
    if (!tensors.weight.defined()) return {};
    return {.dtype = kernel_dtype(tensors.weight.scalar_type()),
            .weight = data(tensors.weight),
            .bias = data(tensors.bias),
            .norm_weight = data(tensors.norm_weight),
            .norm_bias = data(tensors.norm_bias)};
}

Tensor Room::empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    constexpr int64_t kAlignment = 256;
    const auto size = static_cast<int64_t>(options.dtype().itemsize());
    const int64_t end = used_ + c10::multiply_integers(sizes) * size;
    if (!storage_ || end > static_cast<int64_t>(storage_.nbytes())) return at::empty(sizes, options);
    const Tensor part = at::empty({0}, options).set_(storage_, used_ / size, sizes);
    used_ = detail::ceil_div(end, kAlignment) * kAlignment;
    return part;
}

void sum_into(Tensor out, const Tensor& terms, at::IntArrayRef dims) {
    if (out.scalar_type() == terms.scalar_type()) {
        at::sum_out(out, terms, dims);
    } else {
        out.copy_(at::sum(terms, dims));
    }
}

} // namespace eva_attn::cuda
